"""PlacementError: a mesh, a trace, a share or a strategy that a user gave cannot be used."""


class PlacementError(Exception):
    """The user's placement input is at fault; the message is one line: what, where, expected against got, next step."""


class MeshError(PlacementError):
    """A mesh name or mesh file that cannot be used."""

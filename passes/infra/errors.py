"""PassError: one of our passes broke an invariant."""


class PassError(Exception):
    """A pass produced a graph that is wrong; the message names the pass, the layer and the site."""

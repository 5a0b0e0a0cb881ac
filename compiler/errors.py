"""CompileError: the user's model or options are at fault; every message is one line with the next step."""


class CompileError(Exception):
    """A model cannot be compiled as asked."""


class UnsupportedModel(CompileError):
    """Something in the model has no meaning in moec yet: refused by name, never ignored."""


class CheckpointError(CompileError):
    """A checkpoint directory is incomplete, damaged or of another shape than its config.json says."""

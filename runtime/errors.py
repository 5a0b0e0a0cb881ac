"""EngineError: the artifact or the device is at fault; every message is one line with the next step."""


class EngineError(Exception):
    """An engine cannot be loaded or run as asked."""


class FormatError(EngineError):
    """A file of the engine is missing, damaged, of an unknown version, or says something that has no meaning."""


class TargetError(EngineError):
    """The engine was made for a machine with features that this one has not."""


class InputError(EngineError):
    """What was given to a running engine is outside of what it takes."""


class ContextError(InputError):
    """A sequence is longer than the cache or than the model's context."""


class OutputError(EngineError):
    """An engine directory cannot be written where it was asked for."""


class StepError(EngineError):
    """A step of the program failed; the message names the step and its node in the graph."""


class DeviceMemoryError(EngineError):
    """A device has too little memory for the engine, for a cache, or for a step; the message has the sizes."""


class RankError(EngineError):
    """A rank of a placed engine ended, does not answer, or runs another engine; the message names it."""

"""EngineError: the artifact or the device is at fault; every message is one line with the next step."""


class EngineError(Exception):
    """An engine cannot be loaded or run as asked."""

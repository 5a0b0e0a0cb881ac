"""Capture: from a model to a graph. `capture` is the one way in; what it gives is in captured.py."""

from moec.compiler.capture.entry import capture

__all__ = ["capture"]

"""Reading ONNX files. See capture.py."""

from moec.compiler.capture.onnx.capture import capture_onnx

__all__ = ["capture_onnx"]

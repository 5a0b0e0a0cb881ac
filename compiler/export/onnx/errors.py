"""ExportError: a model cannot be written as ONNX as asked."""

from moec.compiler.errors import CompileError


class ExportError(CompileError):
    """Something in the model, or an option, has no form in ONNX; refused by name, never written wrongly."""

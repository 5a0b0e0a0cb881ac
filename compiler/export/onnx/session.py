"""ONNX Runtime: which of its two packages is installed, and sessions on the provider that was asked for or none.

onnxruntime and onnxruntime-gpu own the same Python module; where both are installed, files of one lie over those of the
other. onnxruntime-gpu names providers that cannot be loaded and falls back to the processor without an error, so the
provider of a session is read from the session. Source: measured with 1.31.1, docs/onnx.md.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path
from typing import Any

from moec.compiler.errors import CompileError

PACKAGES = ("onnxruntime", "onnxruntime-gpu")
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntimeError(CompileError):
    """ONNX Runtime is absent, installed twice, or does not run where it was asked to."""


def installed() -> dict[str, str]:
    """Version by package, of those of PACKAGES that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def onnxruntime() -> Any:
    """The module. Raises: OnnxRuntimeError: neither package is installed, or both are."""
    found = installed()
    if len(found) > 1:
        raise OnnxRuntimeError(
            f"{' and '.join(found)} are both installed and overwrite each other: pip uninstall -y {' '.join(found)}, "
            "then install one: pip install 'moec[onnx]' or 'moec[onnx-gpu]'"
        )
    if not found:
        raise OnnxRuntimeError("ONNX Runtime is not installed: pip install 'moec[onnx]' (with a GPU: 'moec[onnx-gpu]')")
    return importlib.import_module("onnxruntime")


def open_session(path: Path, provider: str = "cpu", threads: int = 0) -> Any:
    """An InferenceSession of a model file. provider: "cpu" or "cuda".  threads: within an operator; 0: its own choice.

    Raises: OnnxRuntimeError: as onnxruntime(), the file cannot be loaded, or the session runs on another provider.
    """
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors; warnings about functions and unused initialisers go to standard error
    options.intra_op_num_threads = threads
    wanted = PROVIDERS[provider]
    try:
        session = ort.InferenceSession(str(path), options, providers=[wanted])
    except Exception as error:  # its own exception types share no base class
        first = str(error).strip().splitlines()[0]
        raise OnnxRuntimeError(f"{path}: ONNX Runtime {ort.__version__} cannot load it: {first}") from error
    used = session.get_providers()[0]
    if used != wanted:
        raise OnnxRuntimeError(
            f"{path}: asked for {wanted}, ONNX Runtime runs on {used}; is the provider's library there? `moec doctor`"
        )
    return session


def working_providers() -> list[str]:
    """Those of PROVIDERS on which a session of one node runs; what the package merely lists is left out.

    Raises: OnnxRuntimeError: as onnxruntime(), or nothing runs.
    """
    ort = onnxruntime()
    try:
        import onnx_ir as ir
    except ImportError as error:
        raise OnnxRuntimeError("onnx-ir is not installed beside ONNX Runtime: pip install 'moec[onnx]'") from error
    x, y = (ir.Value(name=n, shape=ir.Shape((1,)), type=ir.TensorType(ir.DataType.FLOAT)) for n in ("x", "y"))
    graph = ir.Graph([x], [y], nodes=[ir.Node("", "Neg", [x], outputs=[y])], opset_imports={"": 21}, name="one")
    content = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    used = [
        ort.InferenceSession(content, options, providers=[name]).get_providers()[0]
        for name in PROVIDERS.values()
        if name in ort.get_available_providers()
    ]
    if not used:
        raise OnnxRuntimeError(f"ONNX Runtime {ort.__version__} runs on none of {', '.join(PROVIDERS.values())}")
    return list(dict.fromkeys(used))

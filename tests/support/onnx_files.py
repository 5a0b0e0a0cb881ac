"""Writes small ONNX files, and runs them in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "uint8": TensorProto.UINT8,
    "bool": TensorProto.BOOL,
}


def port(name: str, dtype: str, shape: list[int | str]) -> Any:
    return helper.make_tensor_value_info(name, TYPES[dtype], shape)


def write(
    path: Path,
    nodes: list[Any],
    inputs: list[Any],
    outputs: list[str],
    constants: dict[str, np.ndarray] | None = None,
    opset: int = 21,
) -> Path:
    """A file with these nodes; outputs are of unnamed type."""
    held = [numpy_helper.from_array(v, n) for n, v in (constants or {}).items()]
    graph = helper.make_graph(nodes, "g", inputs, [onnx.ValueInfoProto(name=o) for o in outputs], held)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def externalised(path: Path, **entries: object) -> Path:
    """The file with its one tensor's values elsewhere, as the entries say: location, offset, length."""
    model = onnx.load(path)
    (tensor,) = model.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())
    return path


def run(path: Path, *values: Tensor | np.ndarray) -> list[np.ndarray]:
    """The file's results in ONNX Runtime on the processor, its own fusions off."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = zip(session.get_inputs(), values, strict=True)
    return session.run(None, {i.name: np.asarray(v) for i, v in given})


class First(nn.Module):
    """A block whose first result alone is exported."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return y[0] if isinstance(y, tuple) else y


def export(block: nn.Module, path: Path, example: Tensor, dynamo: bool) -> Path:
    """The block, written by torch; all leading axes open."""
    axes = {d: f"axis_{d}" for d in range(example.dim() - 1)}
    if dynamo:
        torch.onnx.export(
            First(block),
            (example,),
            path,
            dynamo=True,
            dynamic_shapes=(axes,),
            verbose=False,
            external_data=False,
        )
    else:
        names = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": axes}}
        torch.onnx.export(First(block), (example,), str(path), dynamo=False, **names)
    return path


def relative_error(found: Any, expected: np.ndarray) -> float:
    """Largest difference by the largest magnitude."""
    expected = np.asarray(expected, dtype=np.float64)
    found = np.asarray(found, dtype=np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)) if expected.size else 0.0

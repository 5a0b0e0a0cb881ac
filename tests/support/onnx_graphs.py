"""Single graphs in ONNX Runtime: `from onnx_graphs import run`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from moec.compiler.export.onnx.builder import IR_VERSION, Builder


def run(emit: Callable[..., Any], inputs: list[Tensor], functions: list[Any] = ()) -> list[Tensor]:  # type: ignore[assignment]
    """What emit(builder, *values) gives in ONNX Runtime; sizes are symbolic. functions: FunctionProtos it calls."""
    b = Builder("test", 21)
    values = [b.input(f"x{i}", [f"d{i}_{k}" for k in range(t.dim())], t.dtype) for i, t in enumerate(inputs)]
    made = emit(b, *values)
    outputs = [made] if isinstance(made, ir.Value) else list(made)
    for i, value in enumerate(outputs):
        value = b.op("Identity", value)
        value.name = f"y{i}"
        b.graph.outputs.append(value)
    b.graph.opset_imports.update({node.domain: 1 for node in b.graph if node.domain})
    bodies = [ir.serde.deserialize_function(f) for f in functions]
    model = ir.Model(b.graph, ir_version=IR_VERSION, functions=bodies)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    feed = {f"x{i}": t.numpy() for i, t in enumerate(inputs)}
    return [torch.from_numpy(y) for y in session.run(None, feed)]

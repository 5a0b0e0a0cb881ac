"""A small front of onnx_ir: operators by name, constants made once, dtypes as torch has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from moec.compiler.export.onnx.errors import ExportError

IR_VERSION = 10
LAST = np.iinfo(np.int64).max
DTYPES = {
    torch.float64: ir.DataType.DOUBLE,
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32,
    torch.int16: ir.DataType.INT16,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL,
}


def onnx_dtype(dtype: torch.dtype) -> ir.DataType:
    """Raises: ExportError: ONNX has no such dtype."""
    if dtype not in DTYPES:
        raise ExportError(f"{dtype} has no form in ONNX")
    return DTYPES[dtype]


class Builder:
    """Appends nodes to one graph."""

    def __init__(self, name: str, opset: int) -> None:
        self.graph = ir.Graph([], [], nodes=[], name=name, opset_imports={"": opset})
        self._constants: dict[tuple[Any, ...], ir.Value] = {}

    def input(self, name: str, shape: Sequence[int | str], dtype: torch.dtype) -> ir.Value:
        """A graph input. shape: numbers, or names of open dimensions."""
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(onnx_dtype(dtype)))
        self.graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, shape: Sequence[int | str] | None, dtype: torch.dtype) -> None:
        """Makes a value an output of that name."""
        if value.is_graph_input() or value.is_graph_output() or value.is_initializer():
            value = self.op("Identity", value)
        value.name, value.type = name, ir.TensorType(onnx_dtype(dtype))
        value.shape = None if shape is None else ir.Shape(shape)
        self.graph.outputs.append(value)

    def weight(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> ir.Value:
        """An initialiser whose values are given later."""
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(onnx_dtype(dtype)))
        self.graph.initializers[name] = value
        return value

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """One node of one output; None leaves an optional input out."""
        return self.many(op_type, 1, *inputs, domain=domain, **attributes)[0]

    def many(
        self, op_type: str, num_outputs: int, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """One node of several outputs; None leaves an optional input out."""
        given = list(inputs)
        while given and given[-1] is None:
            given.pop()
        node = ir.node(op_type, given, attributes, domain=domain, num_outputs=num_outputs)
        self.graph.append(node)
        return node.outputs

    def constant(self, array: np.ndarray) -> ir.Value:
        """An initialiser with these values; equal ones are the same."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"const_{len(self._constants)}"
            tensor = ir.tensor(array, name=name)
            value = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self.graph.initializers[name] = value
            self._constants[key] = value
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        """i64[n]."""
        return self.constant(np.array(values, np.int64))

    def number(self, value: float | int | bool, dtype: torch.dtype) -> ir.Value:
        """A scalar; infinities stay what they are."""
        onnx_dtype(dtype)
        return self.constant(_array(value, dtype))

    def cast(self, value: ir.Value, dtype: torch.dtype) -> ir.Value:
        """A node even where the value has the dtype already."""
        return self.op("Cast", value, to=int(onnx_dtype(dtype)))

    def size(self, value: ir.Value, dim: int) -> ir.Value:
        """i64[1]: one dimension, which is counted from the front."""
        return self.op("Shape", value, start=dim, end=dim + 1)

    def reshape(self, value: ir.Value, *sizes: int | ir.Value) -> ir.Value:
        """sizes: numbers (0 keeps, -1 follows), or i64[n] values."""
        return self.op("Reshape", value, self.shape(*sizes))

    def shape(self, *sizes: int | ir.Value) -> ir.Value:
        """The sizes as i64[n]."""
        parts: list[ir.Value] = []
        numbers: list[int] = []
        for size in (*sizes, None):
            if isinstance(size, int):
                numbers.append(size)
                continue
            if numbers:
                parts.append(self.ints(*numbers))
                numbers = []
            if size is not None:
                parts.append(size)
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0) if parts else self.ints()

    def transpose(self, value: ir.Value, *perm: int) -> ir.Value:
        """perm: the axis of the value that each axis of the result is."""
        return self.op("Transpose", value, perm=list(perm))

    def unsqueeze(self, value: ir.Value, *dims: int) -> ir.Value:
        """dims: where the axes of size 1 stand in the result."""
        return self.op("Unsqueeze", value, self.ints(*dims))

    def slice(self, value: ir.Value, dim: int, start: Any, stop: Any, step: int = 1) -> ir.Value:
        """Along one dimension; start and stop: numbers or i64[1] values."""
        bounds = [self.ints(b) if isinstance(b, int) else b for b in (start, stop)]
        steps = () if step == 1 else (self.ints(step),)
        return self.op("Slice", value, *bounds, self.ints(dim), *steps)


def _array(value: float | int | bool, dtype: torch.dtype) -> np.ndarray:
    tensor = torch.tensor(value, dtype=dtype)
    if dtype is torch.bfloat16:
        import ml_dtypes

        return tensor.float().numpy().astype(ml_dtypes.bfloat16)
    return tensor.numpy()

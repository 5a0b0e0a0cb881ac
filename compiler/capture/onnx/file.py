"""Reads an ONNX file into a Graph, and says in one line what is wrong with one that is damaged."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moec.compiler.capture.onnx.external import external_tensor
from moec.compiler.capture.onnx.graph import Graph, Input, Node, Size
from moec.compiler.capture.onnx.host import shortest
from moec.compiler.errors import CheckpointError, CompileError, UnsupportedModel

MOST_BYTES = (1 << 31) - 1  # of a protobuf message
OLDEST_OPSET = 13  # before it Softmax and the axes of several operators meant something else
DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
    17: torch.float8_e4m3fn,
    18: torch.float8_e4m3fnuz,
    19: torch.float8_e5m2,
    20: torch.float8_e5m2fnuz,
}
"""TensorProto.DataType -> dtype."""
_LAYER = re.compile(r"(?:^|[./_])(?:layers?|h|blocks?)[./_](\d+)(?:$|[./_:])")
_OWN = "moec"  # domain of nodes whose function body is not needed: they are read as moec ops


def read_graph(path: Path) -> Graph:
    """The graph of an ONNX file: functions in line, nodes in order, external tensors mapped.

    Raises: CheckpointError: damaged, incomplete, or external data outside of its folder.
            UnsupportedModel: an opset or a type that is not read.  CompileError: the package onnx is missing.
    """
    model = _parse(path)
    versions = {o.domain or "ai.onnx": o.version for o in model.opset_import}
    opset = versions.get("ai.onnx", 0)
    if opset < OLDEST_OPSET:
        raise UnsupportedModel(
            f"{path.name}: opset {opset}; {OLDEST_OPSET} or newer is read (onnx.version_converter makes it newer)"
        )
    return _Reader(path, opset).graph(model.graph, path.name)


def _parse(path: Path) -> Any:
    """The ModelProto, its functions (but those of our own domain) put in line."""
    try:
        import onnx
        import onnx.inliner
    except ImportError as error:
        raise CompileError("reading an ONNX file needs the package onnx: pip install 'moec[onnx]'") from error
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise CheckpointError(
            f"{path.name}: {size} bytes; an ONNX file holds at most {MOST_BYTES}, so save its tensors as external data"
        )
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except Exception as error:  # protobuf's own error class depends on its implementation
        raise CheckpointError(f"{path.name}: no ONNX file, or a truncated one ({_first_line(error)})") from error
    if not model.opset_import or not model.graph.output:
        raise CheckpointError(f"{path.name}: no ONNX model: it names no opset or has no graph")
    if not model.functions:
        return model
    own = [(f.domain, f.name) for f in model.functions if f.domain == _OWN]
    try:
        if own:
            return onnx.inliner.inline_selected_functions(model, own, exclude=True)
        return onnx.inliner.inline_local_functions(model)
    except Exception as error:  # the inliner is C++ and raises what it likes
        raise CheckpointError(f"{path.name}: its functions cannot be put in line: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


class _Reader:
    def __init__(self, path: Path, opset: int) -> None:
        self.path, self.opset = path, opset

    def graph(self, proto: Any, name: str, inside: bool = False) -> Graph:
        """inside: of a node, so it may read values from around it."""
        if proto.sparse_initializer:
            raise UnsupportedModel(f"{name}: sparse initializers are not read; make them dense")
        constants = {t.name: self.tensor(t, t.name) for t in proto.initializer}
        inputs = tuple(self._input(v) for v in proto.input if v.name not in constants)
        known = {i.name for i in inputs} | constants.keys()
        nodes = [self._node(n) for n in proto.node]
        outputs = tuple(o.name for o in proto.output)
        made = self._makers(nodes, known, name)
        outside = {i for i in [*(i for n in nodes for i in n.reads), *outputs] if i not in made and i not in known}
        if outside and not inside:
            missing = min(outside)
            reader = next((str(n) for n in nodes if missing in n.reads), "the graph's output")
            raise CheckpointError(f"{name}: {reader} reads {missing}, which nothing makes")
        ordered = self._in_order(nodes, known | outside, name)
        return Graph(name, inputs, outputs, ordered, constants, self.opset, tuple(sorted(outside)))

    def _input(self, value: Any) -> Input:
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
            raise UnsupportedModel(f"{self.path.name}: input {value.name} is no tensor of known rank")
        shape: list[Size] = []
        for i, d in enumerate(kind.shape.dim):
            shape.append(d.dim_value if d.HasField("dim_value") else d.dim_param or f"{value.name}_{i}")
        return Input(value.name, self._dtype(kind.elem_type, f"input {value.name}"), tuple(shape))

    def _dtype(self, code: int, where: str) -> torch.dtype:
        if code not in DTYPES:
            raise UnsupportedModel(f"{self.path.name}: {where} has the ONNX data type {code}, which is not read")
        return DTYPES[code]

    def tensor(self, proto: Any, name: str) -> Tensor:
        """A TensorProto. Raises: CheckpointError: it holds another number of bytes than its shape takes."""
        dtype, shape = self._dtype(proto.data_type, f"tensor {name}"), tuple(proto.dims)
        if any(n < 0 for n in shape):
            raise CheckpointError(f"{self.path.name}: tensor {name} has the shape {list(shape)}")
        if proto.data_location == proto.EXTERNAL:
            entries = {e.key: e.value for e in proto.external_data}
            return external_tensor(self.path.resolve().parent, entries, name, shape, dtype)
        count = int(np.prod(shape, dtype=np.int64))
        if proto.HasField("raw_data"):
            held, expected = len(proto.raw_data), count * dtype.itemsize
            if held != expected:
                raise CheckpointError(
                    f"{self.path.name}: tensor {name} of shape {list(shape)} takes {expected} bytes, {held} are there"
                )
            raw = torch.frombuffer(bytearray(proto.raw_data), dtype=torch.uint8) if held else torch.empty(0)
            return raw.view(dtype).reshape(shape) if held else torch.empty(shape, dtype=dtype)
        return self._from_fields(proto, name, shape, dtype)

    def _from_fields(self, proto: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        from onnx import numpy_helper

        try:
            array = np.ascontiguousarray(numpy_helper.to_array(proto))
            return torch.from_numpy(array.view(np.uint8).reshape(-1).copy()).view(dtype).reshape(shape)
        except Exception as error:  # numpy says what does not fit
            raise CheckpointError(f"{self.path.name}: tensor {name}: {_first_line(error)}") from error

    def _node(self, proto: Any) -> Node:
        domain = "" if proto.domain in ("", "ai.onnx") else f"{proto.domain}."
        name = proto.name or next(iter(proto.output), proto.op_type)
        attributes = {a.name: self._attribute(a, name) for a in proto.attribute}
        hints = [proto.name, *(p.value for p in proto.metadata_props if "scope" in p.key or "namespace" in p.key)]
        layer = next((int(m[1]) for h in hints if (m := _LAYER.search(h.replace("'", "/").replace(" ", "/")))), None)
        return Node(domain + proto.op_type, name, tuple(proto.input), tuple(proto.output), attributes, layer)

    def _attribute(self, proto: Any, node: str) -> Any:
        import onnx

        if proto.type == onnx.AttributeProto.TENSOR:
            return self.tensor(proto.t, f"{proto.name} of node {node}")
        if proto.type == onnx.AttributeProto.GRAPH:
            return self.graph(proto.g, f"{proto.name} of node {node}", inside=True)
        try:
            value = onnx.helper.get_attribute_value(proto)
        except ValueError as error:
            raise CheckpointError(f"{self.path.name}: node {node}: {_first_line(error)}") from error
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        if proto.type == onnx.AttributeProto.FLOAT:
            return shortest(value)
        return list(value) if proto.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS) else value

    def _in_order(self, nodes: list[Node], known: Iterable[str], graph: str) -> tuple[Node, ...]:
        """The nodes so that each follows those that it reads. Raises: CheckpointError: they are in a cycle."""
        ready, placed, waiting = set(known), list[Node](), nodes
        while waiting:
            left = []
            for node in waiting:
                if ready.issuperset(node.reads):
                    ready.update(node.outputs)
                    placed.append(node)
                else:
                    left.append(node)
            if len(left) == len(waiting):
                raise CheckpointError(f"{graph}: the graph is cyclic: {left[0]} needs its own result")
            waiting = left
        return tuple(placed)

    def _makers(self, nodes: list[Node], known: Iterable[str], graph: str) -> Mapping[str, Node]:
        """Which node makes each value. Raises: CheckpointError: two make one."""
        made: dict[str, Node] = {}
        before = set(known)
        for node in nodes:
            for name in filter(None, node.outputs):
                if name in made or name in before:
                    raise CheckpointError(f"{graph}: {node} makes {name}, which something else makes already")
                made[name] = node
        return made

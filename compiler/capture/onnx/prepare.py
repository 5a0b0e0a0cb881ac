"""Rewrites a graph before it is run: constants that are only rearranged, products with a constant matrix, QMoE.

Before: y = MatMul(x, w); w f32[H, F] a constant          After: y = moec.linear(x, w_turned); w_turned [F, H]
Before: z = com.microsoft.QMoE(x, r, codes, scales, ..)   After: z = com.microsoft.MoE(x, r, fc1, ..)

A constant that is made from others has a recipe over them, so that an engine can store what the file stores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moec.compiler.capture.onnx.graph import Graph, Node
from moec.compiler.errors import UnsupportedModel
from moec.passes.ir.weights import Weight, dequantised, reshape, source, transpose, unpacked

QMOE_ONLY = (
    "expert_weight_bits",
    "fc1_weight_bits",
    "fc2_weight_bits",
    "fc3_weight_bits",
    "block_size",
    "quant_type",
    "accuracy_level",
    "weights_prepacked",
)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """recipes: of the constants that are made from others."""

    graph: Graph
    recipes: dict[str, Weight]


def prepare(graph: Graph) -> Prepared:
    """Raises: UnsupportedModel: a QMoE whose numbers are not what its attributes say."""
    work = _Preparation(dict(graph.constants), graph.name)
    nodes = tuple(new for node in graph.nodes for new in work.rewritten(node))
    return Prepared(dataclasses.replace(graph, nodes=nodes, constants=work.constants), work.recipes)


class _Preparation:
    def __init__(self, constants: dict[str, Tensor], name: str) -> None:
        self.constants, self.name = constants, name
        self.recipes: dict[str, Weight] = {}

    def rewritten(self, node: Node) -> list[Node]:
        """What stands for a node; nothing for one that is a constant."""
        rule: Callable[[Node], Node | list[Node] | None] | None = {
            "Constant": self._constant,
            "ConstantOfShape": _filled,
            "Identity": self._identity,
            "Transpose": self._transpose,
            "MatMul": self._matmul,
            "Gemm": self._gemm,
            "Add": self._add,
            "com.microsoft.QMoE": self._qmoe,
        }.get(node.op)
        found = rule(node) if rule else node
        return found if isinstance(found, list) else [] if found is None else [found]

    def recipe(self, name: str) -> Weight:
        tensor = self.constants[name]
        return self.recipes.get(name) or source(name, tuple(tensor.shape), tensor.dtype)

    def _derive(self, name: str, recipe: Weight, value: Tensor) -> str:
        if name not in self.constants:
            self.constants[name], self.recipes[name] = value, recipe
        return name

    def _constant(self, node: Node) -> None:
        (name,) = node.outputs
        ((kind, value),) = node.attributes.items()
        if kind.startswith("value_float"):
            value = torch.tensor(value, dtype=torch.float32)
        elif kind.startswith("value_int"):
            value = torch.tensor(value, dtype=torch.int64)
        if not isinstance(value, Tensor):
            raise UnsupportedModel(f"{self.name}: {node}: a constant by {kind} is not read")
        self.constants[name] = value

    def _identity(self, node: Node) -> Node | None:
        if node.inputs[0] not in self.constants:
            return node
        name = node.inputs[0]
        self.constants[node.outputs[0]] = self.constants[name]
        self.recipes[node.outputs[0]] = self.recipe(name)
        return None

    def _transpose(self, node: Node) -> Node | None:
        matrix = self.constants.get(node.inputs[0])
        if matrix is None or matrix.dim() not in (2, 3):
            return node
        order = node.attributes.get("perm", list(range(matrix.dim()))[::-1])
        if order[-2:] != [matrix.dim() - 1, matrix.dim() - 2]:
            return node
        recipe = transpose(self.recipe(node.inputs[0]), matrix.dim() - 2, matrix.dim() - 1)
        self._derive(node.outputs[0], recipe, matrix.transpose(-2, -1))
        return None

    def _turned(self, name: str) -> str | None:
        """The transpose of a constant matrix; None: it is no constant, or no matrix."""
        matrix = self.constants.get(name)
        if matrix is None or matrix.dim() != 2 or not matrix.is_floating_point():
            return None
        recipe = self.recipe(name)
        if recipe.op == "transpose":
            (inner,) = recipe.inputs
            if inner.op == "source" and inner.args[0] in self.constants:
                return str(inner.args[0])
        return self._derive(f"{name}.turned", transpose(recipe, 0, 1), matrix.t())

    def _matmul(self, node: Node) -> Node:
        turned = self._turned(node.inputs[1]) if node.inputs[0] not in self.constants else None
        if turned is None:
            return node
        return _as(node, "moec.linear", (node.inputs[0], turned), {})

    def _gemm(self, node: Node) -> Node:
        given = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0} | node.attributes
        bias = self.constants.get(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
        plain = given["alpha"] == given["beta"] == 1.0 and not given["transA"]
        if not plain or (bias is None and len(node.inputs) > 2) or (bias is not None and bias.dim() != 1):
            return node
        matrix = self.constants.get(node.inputs[1])
        turned = node.inputs[1] if given["transB"] and matrix is not None else None
        turned = turned or (None if given["transB"] else self._turned(node.inputs[1]))
        if turned is None:
            return node
        return _as(node, "moec.linear", (node.inputs[0], turned, *node.inputs[2:]), {})

    def _add(self, node: Node) -> list[Node]:
        """A stack of biases [E, 1, n] is one [E, n], to which the sum adds the axis."""
        nodes, inputs = list[Node](), list(node.inputs)
        for place, name in enumerate(node.inputs):
            bias = self.constants.get(name)
            if bias is None or bias.dim() != 3 or bias.shape[1] != 1 or bias.shape[0] == 1:
                continue
            shape = (int(bias.shape[0]), int(bias.shape[2]))
            flat = self._derive(f"{name}.flat", reshape(self.recipe(name), shape), bias.squeeze(1))
            axis = self._derive_plain(f"{name}.axis", torch.tensor([1]))
            inputs[place] = f"{node.outputs[0]}.{place}"
            nodes.append(Node("Unsqueeze", node.name, (flat, axis), (inputs[place],), {}, node.layer))
        return [*nodes, dataclasses.replace(node, inputs=tuple(inputs))]

    def _derive_plain(self, name: str, value: Tensor) -> str:
        self.constants.setdefault(name, value)
        return name

    def _qmoe(self, node: Node) -> Node:
        """QMoE as MoE over the numbers that its codes mean."""
        names = dict(enumerate(node.inputs))
        take = lambda i: names.get(i, "")  # noqa: E731
        given = node.attributes
        kind, prepacked = given.get("quant_type", "int"), given.get("weights_prepacked", -1)
        if kind != "int" or prepacked == 1:
            raise UnsupportedModel(
                f"{self.name}: {node}: quant_type {kind!r}, weights_prepacked {prepacked}; read are 'int' and "
                "codes that are not prepacked"
            )
        if not given.get("normalize_routing_weights", 0) and not take(14):
            raise UnsupportedModel(
                f"{self.name}: {node}: weights are not normalised and router_weights is absent: ONNX Runtime "
                "normalises all the same, so its meaning is open; give router_weights or set normalize_routing_weights"
            )
        extra = [i for i in range(15, len(node.inputs)) if take(i)]
        if extra:
            raise UnsupportedModel(f"{self.name}: {node}: input {extra[0]} (a scale of activations) is not read")
        inputs = [take(0), take(1)]
        for fc, place in ((1, 2), (2, 5), (3, 8)):
            weight = self._dequantised(node, fc, take(place), take(place + 1), take(10 + fc)) if take(place) else ""
            inputs += [weight, take(place + 2)]
        kept = {a: v for a, v in given.items() if a not in QMOE_ONLY}
        return _as(node, "com.microsoft.MoE", (*inputs, take(14)), kept)

    def _dequantised(self, node: Node, fc: int, codes: str, scales: str, zeros: str) -> str:
        given = node.attributes
        bits = given.get(f"fc{fc}_weight_bits", given.get("expert_weight_bits", 4))
        absent = [n for n in (codes, scales, zeros) if n and n not in self.constants]
        if absent or bits not in (2, 4, 8):
            what = f"{absent[0]} is no constant" if absent else f"{bits} bits"
            raise UnsupportedModel(f"{self.name}: {node}: fc{fc}: {what}; 2, 4 and 8 bits in constants are read")
        packed = self.recipe(codes)
        code = packed if bits == 8 else unpacked(packed, bits, 2)
        experts, rows, columns = code.shape
        block = given.get("block_size", 0) or columns
        grid = (experts, rows, -(-columns // block))
        scale, zero, offset = self.recipe(scales), None, 1 << (bits - 1)
        if zeros:
            offset, packed_zeros = 0, self.recipe(zeros)
            if len(packed_zeros.shape) == 2:
                packed_zeros = reshape(packed_zeros, (*packed_zeros.shape, 1))
            zero = packed_zeros if bits == 8 else unpacked(packed_zeros, bits, 2)
            if zero.shape[2] > grid[2]:  # the last byte of a row is not full
                from moec.passes.ir.weights import slice_

                zero = slice_(zero, 2, 0, grid[2])
        if scale.shape != grid and scale.shape != grid[:2]:
            raise UnsupportedModel(
                f"{self.name}: {node}: the scales of fc{fc} have shape {list(scale.shape)}, expected {list(grid)}"
            )
        scale = scale if scale.shape == grid else reshape(scale, grid)
        recipe = dequantised(code, scale, zero, (1, block), offset)
        value = recipe.materialise(lambda n: self.constants[n])
        return self._derive(f"{codes}.dequantised", recipe, value)


def _as(node: Node, op: str, inputs: tuple[str, ...], attributes: dict[str, Any]) -> Node:
    """Another operator in a node's place; messages name the one in the file."""
    written = node.written or node.op
    return dataclasses.replace(node, op=op, inputs=inputs, attributes=attributes, written=written)


def _filled(node: Node) -> Node:
    """ConstantOfShape with its filling as a number, which a trace can read."""
    value: Any = node.attributes.get("value")
    if not isinstance(value, Tensor):
        return node
    filling = {"value": value.reshape(()).item(), "dtype": str(value.dtype).removeprefix("torch.")}
    return dataclasses.replace(node, attributes=filling)

"""Rewrites a graph before it is run: constants that are only rearranged, products with a constant matrix, QMoE.

Before: y = MatMul(x, w); w f32[H, F] a constant          After: y = moec.linear(x, w_turned); w_turned [F, H]
Before: z = com.microsoft.QMoE(x, r, codes, scales, ..)   After: z = com.microsoft.MoE(x, r, fc1, ..)
        z = moec.Experts_silu_int4_g32(.., codes, ..)            z = moec.Experts_silu_int4_g32(.., w_in, w_out)
Before: v = Cast(w), w bf16[H, F] a constant              After: v f32[H, F] a constant

A constant that is made from others has a recipe over them, so that an engine can store what the file stores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moec.compiler.capture.onnx.file import DTYPES
from moec.compiler.capture.onnx.graph import Graph, Node
from moec.compiler.capture.onnx.table import PORTABLE
from moec.compiler.errors import UnsupportedModel
from moec.passes.ir.formats import FormatError, parse_format
from moec.passes.ir.weights import Weight, cast, dequantised, reshape, slice_, source, transpose, unpacked

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


_STACKS = ("x", "weights", "experts", "w_in", "w_out")
"""What an experts node of ours reads first; biases follow, then scales and zeros of stacks that are codes."""
NARROW = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Coded:
    """A stack of experts as codes: names of its constants ("" for zeros: none), bits of a code, values of a scale.

    what: as the node calls it.  block: 0 where a row has one scale.
    """

    what: str
    codes: str
    scales: str
    zeros: str
    bits: int
    block: int


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
            "Cast": self._cast,
        }.get(node.op, self._portable if node.op.startswith(PORTABLE) else None)
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
        bits = lambda fc: given.get(f"fc{fc}_weight_bits", given.get("expert_weight_bits", 4))  # noqa: E731
        inputs = [take(0), take(1)]
        for fc, place in ((1, 2), (2, 5), (3, 8)):
            coded = Coded(f"fc{fc}", take(place), take(place + 1), take(10 + fc), bits(fc), given.get("block_size", 0))
            inputs += [self._dequantised(node, coded) if take(place) else "", take(place + 2)]
        kept = {a: v for a, v in given.items() if a not in QMOE_ONLY}
        return _as(node, "com.microsoft.MoE", (*inputs, take(14)), kept)

    def _portable(self, node: Node) -> Node:
        """An experts node of our own over the numbers of its stacks, whatever they are stored as."""
        inputs, count = list(node.inputs), len(_STACKS)
        if "format" not in node.attributes:
            inputs[3:5] = [self._widened(name) for name in inputs[3:5]]
            return dataclasses.replace(node, inputs=tuple(inputs))
        try:
            format = parse_format(node.attributes["format"])
        except FormatError as error:
            raise UnsupportedModel(f"{self.name}: {node}: {error}") from None
        parts = inputs[len(inputs) - (2 if format.symmetric else 4) :]  # scales of both stacks, zeros of both
        if len(inputs) < count + len(parts):
            raise UnsupportedModel(
                f"{self.name}: {node}: {len(inputs)} inputs; {format.name} has {count + len(parts)} or more"
            )
        for place, stack in enumerate(_STACKS[3:]):
            zeros = "" if format.symmetric else parts[2 + place]
            coded = Coded(stack, inputs[3 + place], parts[place], zeros, int(format.bits), format.group)
            inputs[3 + place] = self._dequantised(node, coded)
        kept = {a: v for a, v in node.attributes.items() if a != "format"}
        return _as(node, node.op, tuple(inputs[: len(inputs) - len(parts)]), kept)

    def _cast(self, node: Node) -> Node | None:
        """A matrix that is stored in half the width is widened here."""
        (name,), to = node.inputs, DTYPES.get(node.attributes["to"])
        matrix = self.constants.get(name)
        if matrix is None or matrix.dim() < 2 or matrix.dtype not in NARROW or to != torch.float32:
            return node
        self._derive(node.outputs[0], cast(self.recipe(name), to), matrix.to(to))
        return None

    def _widened(self, name: str) -> str:
        matrix = self.constants.get(name)
        if matrix is None or matrix.dtype not in NARROW:
            return name
        return self._derive(f"{name}.widened", cast(self.recipe(name), torch.float32), matrix.float())

    def _dequantised(self, node: Node, coded: Coded) -> str:
        """The constant of the numbers that a stack's codes mean."""
        absent = [n for n in (coded.codes, coded.scales, coded.zeros) if n and n not in self.constants]
        if absent or coded.bits not in (2, 4, 8):
            what = f"{absent[0]} is no constant" if absent else f"{coded.bits} bits"
            raise UnsupportedModel(f"{self.name}: {node}: {coded.what}: {what}; 2, 4 and 8 bits in constants are read")
        code = self._unpacked(self.recipe(coded.codes), coded.bits)
        experts, rows, columns = code.shape
        block = coded.block or columns
        grid = (experts, rows, -(-columns // block))
        scale, zero, offset = self.recipe(coded.scales), None, 1 << (coded.bits - 1)
        if coded.zeros:
            offset, packed = 0, self.recipe(coded.zeros)
            zero = self._unpacked(packed if len(packed.shape) == 3 else reshape(packed, (*packed.shape, 1)), coded.bits)
            if zero.shape[2] > grid[2]:  # the last byte of a row is not full
                zero = slice_(zero, 2, 0, grid[2])
        if scale.shape not in (grid, grid[:2]):
            raise UnsupportedModel(
                f"{self.name}: {node}: the scales of {coded.what} have shape {list(scale.shape)}, expected {list(grid)}"
            )
        scale = scale if scale.shape == grid else reshape(scale, grid)
        recipe = dequantised(code, scale, zero, (1, block), offset)
        value = recipe.materialise(lambda n: self.constants[n])
        return self._derive(f"{coded.codes}.dequantised", recipe, value)

    def _unpacked(self, packed: Weight, bits: int) -> Weight:
        return packed if bits == 8 else unpacked(packed, bits, 2)


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

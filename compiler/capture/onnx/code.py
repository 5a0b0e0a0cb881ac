"""Writes a graph as Python: a torch module with one line for each node, which is then captured as any module is.

    def forward(self, v0):
        v1 = linear(v0, self.model_layers_0_mlp_gate_weight_turned)
        v2, v3 = TopK(v1, [2], axis=-1, largest=1, sorted=1)
        ..

The nodes of a layer are a module of that layer's name, so that capture sees layers. A MoE block (regions.py) is one
too; its code has only numbers and names of ours, so blocks that are alike have one class, and lifting looks at one of
them. Names of the file never occur in the code but as identifiers that were cleaned.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import keyword
import linecache
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from moec.compiler.capture.onnx import host
from moec.compiler.capture.onnx.graph import Graph, Node
from moec.compiler.capture.onnx.regions import Region
from moec.compiler.capture.onnx.table import SEVERAL, function_of

BLOCK = "MoE"  # class name of the modules that are MoE blocks


@dataclasses.dataclass(frozen=True)
class Written:
    """module: takes the graph's inputs in order, called inputs.  constants: attribute name -> name in the file, of its
    tensors.  blocks: names of the submodules that are MoE blocks."""

    module: nn.Module
    inputs: tuple[str, ...]
    constants: dict[str, str]
    blocks: frozenset[str]


def write_module(graph: Graph, found: list[Region]) -> Written:
    """The graph as a module whose parts are layers and MoE blocks."""
    writer = _Writer(graph)
    items = _needed(graph, _scheduled(graph, found))
    root = writer.root(list(_grouped(items)))
    blocks = frozenset(n for n, m in root.named_children() if type(m).__name__ == BLOCK)
    return Written(root, tuple(writer.inputs), writer.constants, blocks)


def _scheduled(graph: Graph, found: list[Region]) -> Iterator[Node | Region]:
    """The nodes in order, and each region at the place of the node that makes its result."""
    by_result = {r.result: r for r in found}
    for node in graph.nodes:
        region = next((by_result[o] for o in node.outputs if o in by_result), None)
        yield node if region is None else region


def _needed(graph: Graph, items: Iterable[Node | Region]) -> list[Node | Region]:
    """Those whose results something reads, the graph's outputs among it."""
    read, kept = set(graph.outputs), list[Node | Region]()
    for item in reversed(list(items)):
        made = (item.result,) if isinstance(item, Region) else item.outputs
        if read.intersection(made):
            kept.append(item)
            read.update((item.rows,) if isinstance(item, Region) else item.inputs)
    return kept[::-1]


def _grouped(items: Iterable[Node | Region]) -> Iterator[Region | list[Node]]:
    """Runs of nodes of one layer; a region stands alone."""
    group: list[Node] = []
    for item in items:
        if group and (isinstance(item, Region) or item.layer != group[-1].layer):
            yield group
            group = []
        if isinstance(item, Region):
            yield item
        else:
            group.append(item)
    if group:
        yield group


def identifier(name: str) -> str:
    """A Python name out of any text."""
    cleaned = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_") or "x"
    return f"x_{cleaned}" if cleaned[0].isdigit() or keyword.iskeyword(cleaned) else cleaned


def argument_names(names: Iterable[str], taken: Iterable[str]) -> list[str]:
    """A Python name for each input, none twice, and none that the code uses otherwise."""
    used, found = {"self", "s", *taken}, list[str]()
    for name in names:
        cleaned = identifier(name)
        cleaned = f"x_{cleaned}" if re.fullmatch(r"v\d+", cleaned) else cleaned
        while cleaned in used:
            cleaned += "_"
        used.add(cleaned)
        found.append(cleaned)
    return found


class _Body:
    """The lines of one forward, and the tensors that it holds."""

    def __init__(self, graph: Graph, names: Mapping[str, str] | None = None) -> None:
        """names: what constants are to be called; others are called by their own name."""
        self.graph, self.names = graph, names or {}
        self.lines: list[str] = []
        self.variables: dict[str, str] = {}
        self.held: dict[str, str] = {}  # constant -> attribute

    def new(self, name: str) -> str:
        return self.variables.setdefault(name, f"v{len(self.variables)}")

    def value(self, name: str) -> str:
        """An operand as text."""
        if not name:
            return "None"
        if name not in self.graph.constants or name in self.variables:
            return self.variables[name]
        known = host.constant(self.graph.constants[name])
        if not isinstance(known, Tensor):
            return repr(known)
        if name not in self.held:
            wanted = identifier(self.names.get(name, name))
            taken = set(self.held.values())
            while wanted in taken or hasattr(nn.Module, wanted):
                wanted += "_"
            self.held[name] = wanted
        return f"self.{self.held[name]}"

    def node(self, node: Node) -> None:
        operands = [self.value(i) for i in node.inputs]
        while operands and operands[-1] == "None":
            operands.pop()
        arguments = [*operands, *(f"{k}={v!r}" for k, v in sorted(node.attributes.items()))]
        targets = ", ".join(self.new(o) if o else "_" for o in node.outputs)
        more = ", *_" if node.op in SEVERAL else ""
        self.lines.append(f"{targets}{more} = {identifier(node.op)}({', '.join(arguments)})")


class _Writer:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.constants: dict[str, str] = {}
        self.inputs: list[str] = []
        self.tensors: dict[str, nn.Parameter | Tensor] = {}

    def root(self, groups: list[Region | list[Node]]) -> nn.Module:
        body = _Body(self.graph)
        self.inputs = inputs = argument_names(
            (i.name for i in self.graph.inputs), (identifier(n.op) for n in self.graph.nodes)
        )
        for given, name in zip(self.graph.inputs, inputs, strict=True):
            body.variables[given.name] = name
        children: dict[str, nn.Module] = {}
        last_read = self._last_readers(groups)
        for at, group in enumerate(groups):
            if isinstance(group, Region):
                name = f"layers_{self._layer(group, groups)}_moe_{at}"
                children[name] = self.block(group, name)
                body.lines.append(f"{body.new(group.result)} = self.{name}({body.value(group.rows)})")
            elif group[0].layer is None:
                for node in group:
                    body.node(node)
            else:
                name = f"layers_{group[0].layer}_part_{at}"
                children[name], reads, gives = self.part(group, name, at, last_read)
                arguments = ", ".join(body.value(r) for r in reads)
                body.lines.append(f"{', '.join(body.new(g) for g in gives)} = self.{name}({arguments})")
        body.lines.append("return " + _several([body.value(o) for o in self.graph.outputs]))
        module = self._module(self.graph.name, inputs, body, "")
        for name, child in children.items():
            module.add_module(name, child)
        return module

    def _layer(self, region: Region, groups: list[Region | list[Node]]) -> int:
        """A region's layer; without any in the file, its number among the regions."""
        if region.layer is not None:
            return region.layer
        return [g for g in groups if isinstance(g, Region)].index(region)

    def _last_readers(self, groups: list[Region | list[Node]]) -> dict[str, int]:
        """The last group that reads each value; beyond all for the graph's outputs."""
        last: dict[str, int] = {}
        for at, group in enumerate(groups):
            names = [group.rows] if isinstance(group, Region) else [i for n in group for i in n.inputs]
            last |= dict.fromkeys(names, at)
        return last | dict.fromkeys(self.graph.outputs, len(groups))

    def part(
        self, nodes: list[Node], name: str, at: int, last_read: Mapping[str, int]
    ) -> tuple[nn.Module, list[str], list[str]]:
        """A module of some nodes, the values that it reads, and those that others read."""
        made = {o for n in nodes for o in n.outputs}
        reads = dict.fromkeys(i for n in nodes for i in n.inputs if i and i not in made)
        wanted = [i for i in reads if i not in self.graph.constants]
        body = _Body(self.graph)
        arguments = [body.new(w) for w in wanted]
        for node in nodes:
            body.node(node)
        gives = [o for n in nodes for o in n.outputs if o and last_read.get(o, -1) > at]
        body.lines.append("return " + _several([body.value(g) for g in gives]))
        return self._module("Layer", arguments, body, name), wanted, gives

    def block(self, region: Region, name: str) -> nn.Module:
        """A MoE block: its tensors are called by what they do, so that experts are told by numbers."""
        body = _Body(self.graph, block_names(self.graph, region))
        arguments = [body.new(region.rows)]
        if region.sizes:
            body.lines.append(f"s = {arguments[0]}.shape")
        for value, size in region.sizes.items():
            text = f"[{', '.join(size)}]" if isinstance(size, list) else size
            body.lines.append(f"{body.new(value)} = {text}")
        for node in region.nodes:
            body.node(node)
        body.lines.append(f"return {body.value(region.result)}")
        return self._module(BLOCK, arguments, body, name)

    def _module(self, title: str, arguments: list[str], body: _Body, prefix: str) -> nn.Module:
        functions = {identifier(n.op): function_of(n.op) for n in self.graph.nodes}
        lines = [f"def forward({', '.join(['self', *arguments])}):", *(f"    {line}" for line in body.lines)]
        module = _class(title, "\n".join(lines) + "\n", frozenset(functions.items()))()
        for constant, attribute in body.held.items():
            tensor = self._tensor(constant)
            if isinstance(tensor, nn.Parameter):
                module.register_parameter(attribute, tensor)
            else:
                module.register_buffer(attribute, tensor)
            self.constants[f"{prefix}.{attribute}".lstrip(".")] = constant
        return module

    def _tensor(self, constant: str) -> nn.Parameter | Tensor:
        if constant not in self.tensors:
            value = self.graph.constants[constant]
            floats = value.is_floating_point() and value.dtype.itemsize > 1
            self.tensors[constant] = nn.Parameter(value, requires_grad=False) if floats else value
        return self.tensors[constant]


def _several(values: list[str]) -> str:
    return values[0] if len(values) == 1 else f"({', '.join(values)})"


@functools.lru_cache(maxsize=4096)
def _class(title: str, source: str, functions: frozenset[tuple[str, Any]]) -> type[nn.Module]:
    """A module class with this forward. Its source is kept where inspect finds it."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    file = f"<onnx {title} {digest}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    space: dict[str, Any] = {**dict(functions), "inf": math.inf, "nan": math.nan}
    exec(compile(source, file, "exec"), space)
    return type(title, (nn.Module,), {"forward": space["forward"], "__module__": __name__})


def block_names(graph: Graph, region: Region) -> dict[str, str]:
    """Names for the constants of a block: `expert_<e>_<role>` where every expert has its own, else `<role>`.

    A role is the shape, how it is used, and by what its result is used. Of so many constants with one role as there are
    experts, or a multiple, the first in order are the first expert's. A wrong guess is found when lifting measures it.
    """
    users: dict[str, list[Node]] = {}
    for node in region.nodes:
        for name in node.inputs:
            users.setdefault(name, []).append(node)
    roles: dict[tuple[Any, ...], list[str]] = {}
    known: set[str] = set()
    for node in region.nodes:
        for position, name in enumerate(node.inputs):
            tensor = graph.constants.get(name)
            if tensor is None or name in known or not isinstance(host.constant(tensor), Tensor):
                continue
            known.add(name)
            after = tuple(sorted(u.op for u in users.get(node.outputs[0], ())))
            roles.setdefault((tuple(tensor.shape), tensor.dtype, node.op, position, after), []).append(name)
    named: dict[str, str] = {}
    for place, names in enumerate(roles.values()):
        letter, (each, rest) = _letters(place), divmod(len(names), region.num_experts)
        for i, name in enumerate(names):
            of_experts = bool(each) and not rest
            named[name] = f"expert_{i // each}_{letter}{_letters(i % each)}" if of_experts else f"{letter}_{i}"
    return named


def _letters(number: int) -> str:
    text = ""
    while True:
        text = chr(ord("a") + number % 26) + text
        number = number // 26 - 1
        if number < 0:
            return text

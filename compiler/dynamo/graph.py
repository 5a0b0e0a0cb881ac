"""Dynamo's graph as a module that capture takes: weights are its attributes, sizes are read from its inputs.

Dynamo hands parameters and buffers over as inputs of the graph, and symbolic sizes as inputs of their own. Which inputs
are weights follows from where Dynamo found them: inside of a module. Sizes that Dynamo keeps symbolic stay so.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from moec.compiler.capture.compare import DynamicDims
from moec.compiler.capture.module import LETTERS
from moec.compiler.errors import UnsupportedModel

_STEP = re.compile(r"\.(?:_modules|_parameters|_buffers)\['([^']+)'\]|\.([A-Za-z_]\w*)|\[(\d+)\]")
_KINDS = ("_modules", "_parameters", "_buffers")


@dataclasses.dataclass(frozen=True)
class Result:
    """Where one output of Dynamo's graph comes from.

    kind: "value" (index: of the module's outputs), "input" (index: of the graph's inputs), "constant", or "number".
    contiguous: eager's tensor would be, so ours must be.  number: what a number follows from.
    """

    kind: str
    index: int = 0
    constant: Any = None
    contiguous: bool = False
    number: Number | None = None


@dataclasses.dataclass(frozen=True)
class Number:
    """A whole number or a truth value that follows from sizes. homes: symbol -> argument and its dimension."""

    expression: sympy.Basic
    homes: tuple[tuple[sympy.Symbol, int, int], ...]

    def of(self, arguments: Sequence[Any]) -> int | bool:
        """Its value for the arguments of Dynamo's graph."""
        given = {s: a.shape[d] if isinstance(a := arguments[at], Tensor) else a for s, at, d in self.homes}
        found = self.expression.subs(given)
        return bool(found) if found.is_Boolean else int(found)


@dataclasses.dataclass(frozen=True)
class DynamoGraph:
    """module: takes `inputs` alone.  weights, inputs: positions among the arguments of Dynamo's graph.

    An input that is a symbolic number arrives as an empty tensor [number, 0]: programs know numbers from shapes alone.
    names: of the weights in the module.  dims: the symbolic dimensions of the inputs.  results: one for each output.
    """

    module: GraphModule
    weights: tuple[int, ...]
    names: tuple[str, ...]
    inputs: tuple[int, ...]
    dims: DynamicDims
    results: tuple[Result, ...]


def read_graph(gm: GraphModule, arguments: Sequence[Any]) -> DynamoGraph:
    """Takes Dynamo's graph apart; gm is not changed.

    arguments: one for each placeholder, real tensors and numbers, as Dynamo calls the backend.
    Raises: UnsupportedModel: it is on another device, asks for autocast, or gives numbers that follow from values.
    """
    graph, root = _copy(gm), nn.Module()
    placeholders = graph.find_nodes(op="placeholder")
    _copy_attributes(gm, graph, root)
    weights: dict[int, Node] = {}
    inputs: dict[int, Node] = {}
    numbers: dict[int, Node] = {}
    for at, (node, value) in enumerate(zip(placeholders, arguments, strict=True)):
        if not isinstance(value, Tensor):
            numbers[at] = node
        elif is_weight(node, value):
            weights[at] = _as_attribute(graph, root, node, value)
        else:
            inputs[at] = node
    _check_devices([v for v in arguments if isinstance(v, Tensor)])
    dims, homes = _symbolic(list(inputs.values()))
    for at, node in numbers.items():
        expr = _symbol(node)
        if expr is not None and expr not in homes:
            inputs[at], letter = _carrier(graph, node), _letter(len(homes))
            dims[len(inputs) - 1], homes[expr] = {0: letter}, (inputs[at], 0)
    sizes = {at: _replace_number(graph, node, homes) for at, node in numbers.items()}
    origins = {n: at for known in (weights, inputs, sizes) for at, n in known.items() if isinstance(n, Node)}
    results = _split_results(graph, origins, homes)
    _drop_autocast(graph)
    graph.lint()
    module = GraphModule(root, graph, "DynamoGraph")
    names = tuple(str(n.target) for n in weights.values())
    return DynamoGraph(module, tuple(weights), names, tuple(inputs), dims, results)


def _copy(gm: GraphModule) -> Graph:
    graph, known = Graph(), dict[Any, Any]()
    for node in gm.graph.nodes:
        known[node] = graph.node_copy(node, known.__getitem__)
        if hasattr(node, "_dynamo_source"):
            known[node]._dynamo_source = node._dynamo_source
    return graph


def _copy_attributes(gm: GraphModule, graph: Graph, root: nn.Module) -> None:
    """Tensors that Dynamo's graph itself holds; a subgraph (a branch, a checkpoint) has no place in ours."""
    for node in graph.find_nodes(op="get_attr"):
        value = gm
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if not isinstance(value, Tensor):
            raise UnsupportedModel(f"{node.target}: the graph holds a {type(value).__name__}, not only tensors")
        _assign(root, str(node.target), value)
    for node in graph.find_nodes(op="call_module"):
        raise UnsupportedModel(f"{node.target}: the graph calls a module")


def is_weight(node: Node, value: Tensor) -> bool:
    """Whether a tensor belongs to a module. Dynamo's source says where it was found."""
    if isinstance(value, nn.Parameter):
        return True
    name = _source_name(node)
    return any(f"{kind}[" in name for kind in _KINDS)


def _source_name(node: Node) -> str:
    name = getattr(getattr(node, "_dynamo_source", None), "name", "")
    return str(name() if callable(name) else name)


def _dotted(node: Node) -> str:
    """L['self']._modules['layers']._modules['0']._parameters['weight'] -> layers.0.weight."""
    steps = [a or b or c for a, b, c in _STEP.findall(_source_name(node).partition("]")[2])]
    return ".".join(s for s in steps if s not in _KINDS) or node.name


def _as_attribute(graph: Graph, root: nn.Module, node: Node, value: Tensor) -> Node:
    """Replaces a placeholder by an attribute."""
    name = _assign(root, _dotted(node), value)
    with graph.inserting_before(node):
        attribute = graph.get_attr(name)
    attribute.meta = dict(node.meta)
    node.replace_all_uses_with(attribute)
    graph.erase_node(node)
    return attribute


def _assign(root: nn.Module, name: str, value: Tensor) -> str:
    """Puts a tensor under a dotted name, another one where it is taken; gives the name."""
    *path, last = name.split(".")
    home = root
    for part in path:
        if not isinstance(getattr(home, part, None), nn.Module):
            if hasattr(home, part):
                return _assign(root, name.replace(".", "_"), value)
            home.add_module(part, nn.Module())
        home = getattr(home, part)
    free, n = last, 1
    while hasattr(home, free):
        free, n = f"{last}_{n}", n + 1
    home.register_buffer(free, value.detach())
    return ".".join([*path, free])


def _check_devices(tensors: list[Tensor]) -> None:
    other = next((t.device for t in tensors if t.device.type != "cpu"), None)
    if other is not None:
        raise UnsupportedModel(f"a tensor is on {other}; this backend compiles for the CPU")


def _symbolic(inputs: list[Node]) -> tuple[DynamicDims, dict[Any, tuple[Node, int]]]:
    """The symbolic dimensions, named, and an input and dimension for each symbol."""
    dims: DynamicDims = {}
    homes: dict[Any, tuple[Node, int]] = {}
    names: dict[Any, str] = {}
    for i, node in enumerate(inputs):
        for d, size in reversed(list(enumerate(node.meta["example_value"].shape))):
            if not isinstance(size, torch.SymInt):
                continue
            expr = size.node.expr
            if expr.is_number:
                continue
            if not isinstance(expr, sympy.Symbol):
                raise UnsupportedModel(f"input {node.name} has the size {expr}, which is no size of its own")
            homes.setdefault(expr, (node, d))
            names.setdefault(expr, _letter(len(names)))
            dims.setdefault(i, {})[d] = names[expr]
    return dims, homes


def _letter(count: int) -> str:
    return LETTERS[count] if count < len(LETTERS) else f"D{count}"


def _symbol(node: Node) -> Any:
    """The symbol that a number is, None for a fixed one. Raises: UnsupportedModel: it is no whole number."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.SymInt | int):
        raise UnsupportedModel(f"the argument {node.name} is a {type(value).__name__}, not a tensor or a size")
    if isinstance(value, int) or value.node.expr.is_number:
        return None
    if not isinstance(value.node.expr, sympy.Symbol):
        raise UnsupportedModel(f"the argument {node.name} is {value.node.expr}, which is no number of its own")
    return value.node.expr


def _carrier(graph: Graph, node: Node) -> Node:
    """A placeholder for the empty tensor that brings a number."""
    with graph.inserting_after(_last_placeholder(graph)):
        return graph.placeholder(f"{node.name}_rows")


def _last_placeholder(graph: Graph) -> Node:
    return graph.find_nodes(op="placeholder")[-1]


def _replace_number(graph: Graph, node: Node, homes: dict[Any, tuple[Node, int]]) -> Node | int:
    """A number is read from the input that has it as a size. Gives what stands for it now."""
    value, symbol = node.meta["example_value"], _symbol(node)
    size: Any = int(value) if symbol is None else None
    if size is None:
        with graph.inserting_after(_last_placeholder(graph)):
            size = graph.call_method("size", homes[symbol])
        size.meta["example_value"] = value
    for user in list(node.users):
        user.args = torch.fx.map_arg(user.args, lambda a: size if a is node else a)
        user.kwargs = torch.fx.map_arg(user.kwargs, lambda a: size if a is node else a)
    graph.erase_node(node)
    return size


def _split_results(graph: Graph, origins: dict[Node, int], homes: dict[Any, tuple[Node, int]]) -> tuple[Result, ...]:
    """Leaves only computed tensors among the outputs. origins: nodes that stand for arguments of Dynamo's graph."""
    output = graph.output_node()
    values: list[Node] = []
    numbers: list[Node] = []
    results = []
    for arg in output.args[0]:  # type: ignore[union-attr]
        if not isinstance(arg, Node):
            results.append(Result("constant", constant=arg))
        elif arg in origins:
            results.append(Result("input", origins[arg]))
        elif isinstance(arg.meta.get("example_value"), Tensor):
            results.append(Result("value", len(values), contiguous=arg.meta["example_value"].is_contiguous()))
            values.append(arg)
        else:
            results.append(Result("number", number=_number(arg, origins, homes)))
            numbers.append(arg)
    if not values:
        raise UnsupportedModel("the graph computes no tensor")
    output.args = (tuple(values),)
    for node in numbers:
        _erase_numbers(graph, node)
    return tuple(results)


def _number(node: Node, origins: dict[Node, int], homes: dict[Any, tuple[Node, int]]) -> Number:
    """What a number among the results is. Raises: UnsupportedModel: it follows from values, or is no whole number."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.SymInt | torch.SymBool):
        raise UnsupportedModel(f"the result {node.name} is a {type(value).__name__}, not a tensor or a size")
    expression = value.node.expr
    if any(s not in homes for s in expression.free_symbols):
        raise UnsupportedModel(f"the result {node.name} is {expression}, which no size of an input tells")
    known = ((s, *homes[s]) for s in sorted(expression.free_symbols, key=str))
    return Number(expression, tuple((s, origins[home], d) for s, home, d in known))


def _erase_numbers(graph: Graph, node: Node) -> None:
    """A number that nobody reads, and those that only it read."""
    if node.users or node.op != "call_function" or isinstance(node.meta.get("example_value"), Tensor):
        return
    read = node.all_input_nodes
    graph.erase_node(node)
    for inner in read:
        _erase_numbers(graph, inner)


def _drop_autocast(graph: Graph) -> None:
    """Regions that switch autocast off do nothing where it is off already."""
    autocast = torch.amp.autocast_mode
    entered = [n for n in graph.nodes if n.target is autocast._enter_autocast]
    for node in entered:
        if node.args[2]:
            raise UnsupportedModel("the graph switches autocast on; cast the module instead")
    for node in [n for n in graph.nodes if n.target is autocast._exit_autocast] + entered:
        graph.erase_node(node)

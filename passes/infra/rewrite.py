"""Graph surgery that every pass shares: new calls with shapes, replacement that keeps the name, regions by dataflow.

A replacement takes over the NAME of the value that it replaces: evidence lines two graphs up by name, and a ledger or a
profile keeps meaning the same thing through the pipeline.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from moec.passes.infra.errors import PassError

aten = torch.ops.aten
PRODUCTS = (
    aten.linear.default,
    aten.mm.default,
    aten.addmm.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.einsum.default,
    aten.convolution.default,
)
"""Products with a matrix: what a region of elementwise routing ends at."""
KEPT_META = ("layer", "nn_module_stack")


def is_call(node: object, *targets: Any) -> bool:
    """Whether a node calls one of these functions (op overloads); with no target: any function."""
    return isinstance(node, Node) and node.op == "call_function" and (not targets or node.target in targets)


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """A call's argument, wherever the caller wrote it."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def value(arg: Any) -> Any:
    """A node's fake value (tensor, SymInt or tuple); anything else is itself. Raises: PassError: no meta["val"]."""
    if not isinstance(arg, Node):
        return arg
    if "val" not in arg.meta:
        raise PassError(f"{arg.name}: no meta['val']; every new node needs one (make it with rewrite.call)")
    return arg.meta["val"]


def fake_value(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """What a call would give, from the fake values of its arguments (nodes among them). No data is touched.

    Remembered per trace, op and operand types: making a symbolic fake tensor costs milliseconds, and the layers of a
    model repeat each other.
    """
    flat: list[Any] = []
    values = map_arg((args, kwargs or {}), lambda n: _collect(value(n), flat))
    mode = next((v.fake_mode for v in flat if isinstance(v, FakeTensor)), None)
    if mode is None:
        return target(*values[0], **values[1])
    remembered = _REMEMBERED.setdefault(mode, {})
    key = (target, repr(map_arg((args, kwargs or {}), lambda n: _type_key(value(n)))))
    if key not in remembered:
        device = next(v.device for v in flat if isinstance(v, FakeTensor))
        values = torch.utils._pytree.tree_map_only(Tensor, lambda t: _as_fake(t, mode, device), values)
        remembered[key] = _symbolically(mode, target, values)
    return remembered[key]


def _symbolically(mode: FakeTensorMode, target: Callable[..., Any], values: Any) -> Any:
    """Calls the shape function. Raises: PassError: it fixed a symbolic size to the trace's own."""
    env = mode.shape_env
    known = dict(env.replacements) if env is not None else {}
    with mode:
        result = target(*values[0], **values[1])
    fixed = [s for s, e in env.replacements.items() if s not in known and e.is_number] if env is not None else []
    if fixed:
        raise PassError(
            f"{target} fixes the symbolic size {fixed[0]} to {env.replacements[fixed[0]]}; compose it of ops whose "
            "shape function is symbolic (slice, cat, view, elementwise)"
        )
    return result


_REMEMBERED: weakref.WeakKeyDictionary[FakeTensorMode, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _type_key(val: Any) -> str:
    """Everything about an operand that an op's shape function may look at."""
    if isinstance(val, (tuple, list)):
        return str([_type_key(v) for v in val])
    if not isinstance(val, Tensor):
        return f"{type(val).__name__} {symbolic(val)}"
    return f"{val.dtype} {[symbolic(n) for n in val.shape]} {[symbolic(n) for n in val.stride()]}"


def _collect(val: Any, flat: list[Any]) -> Any:
    flat.append(val)
    return val


def _as_fake(tensor: Tensor, mode: FakeTensorMode, device: torch.device) -> Tensor:
    """Weights are plain meta tensors; beside fake ones of a "cpu" trace they must look alike."""
    if isinstance(tensor, FakeTensor) and tensor.device == device:
        return tensor
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def call(
    graph: Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *, like: Node | None = None
) -> Node:
    """Adds a call at the insertion point. meta["val"] is computed; layer and module stack come from `like`."""
    node = graph.call_function(target, args, kwargs or {})
    node.meta["val"] = fake_value(target, args, kwargs)
    for key in KEPT_META:
        if like is not None and key in like.meta:
            node.meta[key] = like.meta[key]
    return node


def call_many(
    graph: Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *, like: Node | None = None
) -> tuple[Node, ...]:
    """As call, for an op with several results: one getitem node each."""
    node = call(graph, target, args, kwargs, like=like)
    return tuple(call(graph, operator.getitem, (node, i), like=like) for i in range(len(node.meta["val"])))


def replace(old: Node, new: Node) -> None:
    """`new` takes over every use and the name of `old`, which is erased; so does its layer where `new` has none.

    Dead producers of `old` stay for remove_dead. Raises: PassError: shape or dtype differ (see same_value).
    """
    reason = differing(old.meta.get("val"), new.meta.get("val"))
    if reason:
        raise PassError(f"{old.name} cannot be replaced by {new.name} ({new.target}): {reason}")
    old.replace_all_uses_with(new, propagate_meta=False)
    name = old.name
    for key in KEPT_META:
        if key in old.meta:
            new.meta.setdefault(key, old.meta[key])
    old.graph.erase_node(old)
    new.name = name
    new.graph._graph_namespace._obj_to_name[new] = name


def replace_or_cast(old: Node, new: Node) -> None:
    """As replace; where the dtypes differ and something else than a moec op reads `old`, a cast takes its place."""
    moec_only = all(getattr(u.target, "namespace", "") == "moec" for u in old.users)
    dtype = old.meta["val"].dtype
    if not moec_only and new.meta["val"].dtype != dtype:
        with old.graph.inserting_before(new.next):
            new = call(old.graph, torch.ops.aten.to.dtype, (new, dtype), like=new)
    replace(old, new)


WIDER = {torch.bfloat16: (torch.float32,), torch.float16: (torch.float32,), torch.int64: (torch.int32,)}


def differing(old: Any, new: Any) -> str | None:
    """Why two fake values of one name do not agree, None where they do.

    A replacement may be a wider float (bf16 weights that moec::gate gives as rounded f32) or i32 for i64 indices; its
    users must then be moec ops, which take both.
    """
    if isinstance(old, Tensor) != isinstance(new, Tensor):
        return f"expected {type(old).__name__}, got {type(new).__name__}"
    if not isinstance(old, Tensor):
        return None
    if not _same_shape(old.shape, new.shape):
        return f"expected shape {list(old.shape)}, got {list(new.shape)}"
    if new.dtype != old.dtype and new.dtype not in WIDER.get(old.dtype, ()):
        return f"expected dtype {old.dtype}, got {new.dtype}"
    return None


def _same_shape(a: torch.Size, b: torch.Size) -> bool:
    return len(a) == len(b) and all(symbolic(x) == symbolic(y) for x, y in zip(a, b, strict=True))


def symbolic(size: Any) -> Any:
    """A size as an int or a sympy expression: comparable without adding a guard."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def num_elements(node: Node) -> Any:
    """How many numbers a tensor node holds: an int or a sympy expression."""
    return math.prod((symbolic(s) for s in node.meta["val"].shape), start=1)


def refresh_values(gm: GraphModule) -> None:
    """Computes every call's fake value anew: a value that kept its name may have other strides than when it was made.

    A view that its operand's strides no longer allow becomes a reshape.
    Raises: PassError: a shape or dtype is another than the node says.
    """
    for node in gm.graph.nodes:
        if node.op != "call_function" or not _has_a_shape_function(node):
            continue
        old = node.meta["val"]
        if node.target is aten.view.default and not _views(value(node.args[0]), old):
            node.target = aten.reshape.default
        node.meta["val"] = fake_value(node.target, node.args, dict(node.kwargs))
        reason = differing(old, node.meta["val"])
        if reason:
            raise PassError(f"{node.name} ({node.target}): its operands give another value than it says: {reason}")


def _views(source: Tensor, result: Tensor) -> bool:
    """Whether the strides allow such a view, for sizes as in the trace: the shape function of a symbolic view lets
    some pass that do not."""
    shape, strides, wanted = ([_traced(n) for n in sizes] for sizes in (source.shape, source.stride(), result.shape))
    try:
        torch.empty_strided(shape, strides, device="meta").view(wanted)
    except RuntimeError:
        return False
    return True


def _traced(size: Any) -> int:
    """A size as it was when the graph was traced."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


FIXING_SIZES = (aten.polar.default, aten.pad.default)


def _has_a_shape_function(node: Node) -> bool:
    """Whether a call's value can be computed anew: not sizes, nor ops without a tensor operand (zeros), nor those whose
    result's size depends on data, nor weights that are spread over tokens, nor ops whose shape function fixes symbolic
    sizes; nor plain functions, which give numbers on the host."""
    if not isinstance(node.target, torch._ops.OpOverload) and node.target is not operator.getitem:
        return False
    tags = getattr(node.target, "tags", ())
    data = torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags
    reads_tensor = any(isinstance(p.meta.get("val"), (Tensor, tuple, list)) for p in node.all_input_nodes)
    is_size = isinstance(node.meta.get("val"), torch.SymInt)
    given = [p.meta.get("val") for p in node.all_input_nodes]
    spread = any(isinstance(v, torch.SymInt) for v in given) and not any(isinstance(v, FakeTensor) for v in given)
    return reads_tensor and not (data or is_size or spread or node.target in FIXING_SIZES)


def remove_dead(gm: GraphModule) -> int:
    """Drops calls and weights that nothing reads; returns how many nodes went. Writes to caches stay, and so do
    collectives and their waits: other ranks take part in them, whoever reads the result."""
    removed = 0
    for node in reversed(gm.graph.nodes):
        dead = not node.users and node.op in ("call_function", "get_attr")
        if dead and not (node.op == "call_function" and _has_effects(node.target)):
            gm.graph.erase_node(node)
            removed += 1
    return removed


def _has_effects(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and (schema.is_mutable or schema.name.startswith("_c10d_functional::"))


@dataclasses.dataclass(frozen=True)
class Region:
    """A piece of a graph. nodes: in order; inputs: tensors that they read from outside (get_attr nodes lie inside).

    sizes: SymInts from outside.  templates: outside tensors of which only shape or dtype matters (type_as, zeros_like).
    """

    inputs: tuple[Node, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Node, ...]
    sizes: tuple[Node, ...] = ()
    templates: tuple[Node, ...] = ()


def cut(outputs: Iterable[Node], stop: Callable[[Node], bool], limit: int = 400) -> Region | None:
    """The region that computes `outputs`: backwards by dataflow to nodes where stop(node), and to placeholders.

    stop is asked about every producer, not about get_attr nodes. None where more than `limit` nodes would be inside.
    """
    wanted = list(outputs)
    inside: dict[Node, None] = dict.fromkeys(wanted)
    inputs: dict[Node, None] = {}
    sizes: dict[Node, None] = {}
    templates: dict[Node, None] = {}
    todo = list(wanted)
    while todo:
        node = todo.pop()
        for producer in node.all_input_nodes:
            if producer in inside:
                continue
            if isinstance(producer.meta.get("val"), torch.SymInt):
                sizes[producer] = None
            elif _is_template(node, producer):
                templates[producer] = None
            elif producer.op == "placeholder" or (producer.op != "get_attr" and stop(producer)):
                inputs[producer] = None
            else:
                inside[producer] = None
                todo.append(producer)
                if len(inside) > limit:
                    return None
    only = [t for t in templates if t not in inside and t not in inputs]
    return Region(tuple(inputs), tuple(in_order(inside)), tuple(wanted), tuple(sizes), tuple(only))


SECOND_IS_TEMPLATE = (aten.type_as.default, aten.expand_as.default, aten.view_as.default, aten.reshape_as.default)
FIRST_IS_TEMPLATE = (
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
)


def weighs(node: Node) -> bool:
    """Whether a call is a product with a weight (through casts and transposes), not one of two moving values."""
    return node.target in PRODUCTS and any(_is_weight(p) for p in node.all_input_nodes)


def _is_weight(node: Node, depth: int = 8) -> bool:
    """Whether a value follows from weights alone."""
    if node.op != "call_function" or not depth:
        return node.op == "get_attr"
    made_from = node.all_input_nodes
    return bool(made_from) and all(_is_weight(p, depth - 1) for p in made_from)


def _is_template(node: Node, producer: Node) -> bool:
    """Whether a call reads only the shape or dtype of this producer."""
    if node.target in SECOND_IS_TEMPLATE:
        return node.args[1] is producer and node.args[0] is not producer
    return node.target in FIRST_IS_TEMPLATE and node.args[0] is producer


def in_order(nodes: Iterable[Node]) -> list[Node]:
    """Nodes of one graph in execution order. Cost: a sort, no walk over the graph."""
    return sorted(nodes, key=_position)


def _position(node: Node) -> Any:
    return node._sort_key


def calls(gm: GraphModule, *targets: Any) -> Iterator[Node]:
    """The calls of these functions, in order, as they were when asked (rewriting while iterating is safe)."""
    found = [n for t in targets for n in gm.graph.find_nodes(op="call_function", target=t, sort=False)]
    return iter(in_order(found))

"""Replaces in-place ops by their out-of-place forms, views of the written tensor included.

Before: y = aten.div_(w, s); z = aten.mul(w, 2)        After: y = aten.div(w, s); z = aten.mul(y, 2)
Leaves alone: the moec ops, which write into caches by contract.
Raises: UnsupportedModel: a write into an input or a parameter, or through a view that cannot be undone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moec.compiler.capture.sizes import Sizes
from moec.compiler.capture.tensors import storage_of
from moec.compiler.errors import UnsupportedModel
from moec.passes.infra.rewrite import call, replace

aten = torch.ops.aten


def writes_in_place(node: Node) -> bool:
    """Whether a node calls an ATen op that changes one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable and getattr(node.target, "namespace", "") == "aten"


def make_functional(gm: GraphModule, sizes: Sizes) -> None:
    """Rewrites the graph in one walk, in execution order."""
    if any(writes_in_place(n) for n in gm.graph.nodes):
        _Functional(gm, sizes).run()


def _storage(node: Node) -> int | None:
    value = node.meta.get("val")
    return storage_of(value) if isinstance(value, Tensor) else None


class _Functional:
    """Which nodes are views of which tensor, and what each written tensor's value is by now.

    Two nodes are views of one tensor when the trace gave them one storage. For every such node: root, the first node
    with that storage; path, the view ops between the two; made_at, the version of the root that it shows.
    """

    def __init__(self, gm: GraphModule, sizes: Sizes) -> None:
        self.graph, self.sizes = gm.graph, sizes
        self.storage = {n: _storage(n) for n in gm.graph.nodes}
        self.root: dict[Node, Node] = {}
        self.path: dict[Node, tuple[Node, ...]] = {}
        self.made_at: dict[Node, int] = {}
        self.version: dict[Node, int] = {}
        self.current: dict[Node, Node] = {}  # root -> its value now, once written

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op in ("call_function", "output"):
                renew = functools.partial(self._fresh, at=node)
                node.args, node.kwargs = torch.fx.map_arg((node.args, node.kwargs), renew)
            if node.op == "call_function" and writes_in_place(node):
                self._write(node)
            elif self.storage[node] is not None:
                self._record(node)

    def _record(self, node: Node) -> None:
        same = (a for a in node.all_input_nodes if a in self.root and self.storage[a] == self.storage[node])
        parent = next(same, None)
        if parent is None:
            self._know(node, node, (), self.storage[node])
        else:
            self._know(node, self.root[parent], (*self.path[parent], node), self.storage[node])

    def _know(self, node: Node, root: Node, path: tuple[Node, ...], storage: int | None) -> None:
        self.root[node], self.path[node], self.storage[node] = root, path, storage
        self.made_at[node] = self.version.get(root, 0)

    def _fresh(self, node: Node, at: Node) -> Node:
        """The node, or its path replayed on the root's new value where that was written since."""
        root = self.root.get(node)
        if root is None or self.made_at[node] == self.version.get(root, 0):
            return node
        with self.graph.inserting_before(at):
            value = self._replay(root, self.path[node])
        self._know(value, root, self.path[node], self.storage[node])
        return value

    def _replay(self, root: Node, path: tuple[Node, ...]) -> Node:
        value = self.current[root]
        for view in path:
            if view.target not in _UNDO:
                raise UnsupportedModel(f"{view.name}: {view.target} of a tensor that is written in place")
            value = call(self.graph, view.target, (value, *view.args[1:]), dict(view.kwargs), like=view)
        return value

    def _write(self, node: Node) -> None:
        destination = node.args[0]
        assert isinstance(destination, Node)
        root = self.root.get(destination)
        if root is None or root.op in ("placeholder", "get_attr"):
            raise UnsupportedModel(
                f"{node.name}: {node.target} writes into {destination.name}, an input or a parameter"
            )
        path, storage = self.path[destination], self.storage[destination]
        self.current.setdefault(root, root)
        with self.graph.inserting_before(node):
            new = value = self._out_of_place(node, destination)
            for i in reversed(range(len(path))):
                value = self._undo(path[i], self._replay(root, path[:i]), value)
        self.current[root] = value
        self.version[root] = self.version.get(root, 0) + 1
        self._know(value, root, (), storage)
        self._know(new, root, path, storage)
        replace(node, new)

    def _undo(self, view: Node, parent: Node, value: Node) -> Node:
        if view.target not in _UNDO:
            raise UnsupportedModel(f"{view.name}: a write through {view.target} cannot be made functional")
        return _UNDO[view.target](self, view, parent, value)

    def _out_of_place(self, node: Node, destination: Node) -> Node:
        if node.target is aten.copy_.default:
            source = node.args[1]
            assert isinstance(source, Node)
            dtype = destination.meta["val"].dtype
            if source.meta["val"].dtype != dtype:
                source = call(self.graph, aten.to.dtype, (source, dtype), like=node)
            return call(self.graph, aten.expand.default, (source, self.shape(destination)), like=node)
        name = node.target._schema.name.removeprefix("aten::").removesuffix("_")  # type: ignore[union-attr]
        overload = node.target._overloadname  # type: ignore[union-attr]
        packet = getattr(aten, name, None)
        if packet is None or overload not in packet.overloads() or node.target._schema.name[-1] != "_":  # type: ignore[union-attr]
            raise UnsupportedModel(f"{node.name}: {node.target} has no out-of-place form")
        new = call(self.graph, getattr(packet, overload), node.args, dict(node.kwargs), like=node)
        dtype = destination.meta["val"].dtype
        if new.meta["val"].dtype != dtype:
            new = call(self.graph, aten.to.dtype, (new, dtype), like=node)
        return new

    def shape(self, node: Node) -> list[Any]:
        """A tensor's sizes as ints and nodes."""
        found = [self.sizes.node(s) for s in node.meta["val"].shape]
        if any(s is None for s in found):
            raise UnsupportedModel(f"{node.name}: the shape {list(node.meta['val'].shape)} of a written tensor")
        return found


def _reshape(f: _Functional, view: Node, parent: Node, value: Node) -> Node:
    return call(f.graph, aten.reshape.default, (value, f.shape(parent)), like=view)


def _same_again(f: _Functional, view: Node, parent: Node, value: Node) -> Node:
    return call(f.graph, view.target, (value, *view.args[1:]), like=view)


def _unpermute(f: _Functional, view: Node, parent: Node, value: Node) -> Node:
    dims: Any = view.args[1]
    order = [d % len(dims) for d in dims]
    return call(f.graph, aten.permute.default, (value, [order.index(i) for i in range(len(order))]), like=view)


def _slice_scatter(f: _Functional, view: Node, parent: Node, value: Node) -> Node:
    return call(f.graph, aten.slice_scatter.default, (parent, value, *view.args[1:]), like=view)


def _select_scatter(f: _Functional, view: Node, parent: Node, value: Node) -> Node:
    return call(f.graph, aten.select_scatter.default, (parent, value, *view.args[1:]), like=view)


def _whole(f: _Functional, view: Node, parent: Node, value: Node) -> Node:
    return value


_UNDO: dict[Any, Callable[[_Functional, Node, Node, Node], Node]] = {
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten.unsqueeze.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.transpose.int: _same_again,
    aten.t.default: _same_again,
    aten.permute.default: _unpermute,
    aten.slice.Tensor: _slice_scatter,
    aten.select.int: _select_scatter,
    aten.alias.default: _whole,
    aten.detach.default: _whole,
    aten.contiguous.default: _whole,
}

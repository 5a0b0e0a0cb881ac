"""Lazy weights: a graph names a weight and how to make it from checkpoint tensors; nothing is read before it is needed.

A Weight is a small expression tree. `get_attr` nodes of a graph name entries of `graph_module.meta["weights"]`; the
attribute itself is a meta tensor of the weight's shape and dtype. Expressions compare and hash by structure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from moec.passes.ir.dequantise import dequantise, unpack
from moec.passes.ir.formats import parse_format
from moec.passes.ir.quantise import dequantise_parts, quantise

Read = Callable[[str], Tensor]


@dataclasses.dataclass(frozen=True)
class Weight:
    """One node of the expression: an operation on other weights, or the name of a source tensor.

    op: "source" (name), "stack" (dim 0), "concat" (dim), "transpose" (dim0, dim1), "reshape" (shape), "slice" (dim,
        start, stop, step), "cast" (dtype name), "add" (number), "scale" (number), "pad" (F.pad amounts, zeros),
        "literal" (the numbers, flat), "unpack" (bits, dim, order, plus), "gather" (rows of the first input, named by
        the second), "dequantise" (block rows, block columns, offset, kind), see dequantise.py, "quantise" (format name;
        the numbers that its codes mean, see quantise.py), "stored" (the bytes of a quantised weight, see stored.py),
        "named" (a name; the numbers as they are, stored apart from equal ones), or "pack" (a layout name that a kernel
        package knows, then its numbers).
    args: the operation's constants.  inputs: the weights that it works on.  shape, dtype: of the result.
    """

    op: str
    args: tuple[Any, ...]
    inputs: tuple[Weight, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor that it makes."""
        count = self.dtype.itemsize
        for n in self.shape:
            count *= n
        return count

    def sources(self) -> Iterator[str]:
        """The names of the tensors that it is made from, in reading order."""
        if self.op == "source":
            yield self.args[0]
        for w in self.inputs:
            yield from w.sources()

    def materialise(self, read: Read, pack: Callable[..., Tensor] | None = None) -> Tensor:
        """Makes the tensor. read: name -> tensor. pack(layout, args, tensor): needed only where a "pack" occurs.

        A stack is filled one input at a time, so that at most one expert more than the result is in memory.
        Raises: ValueError: a source has another shape than the graph was captured with.
        """
        if self.op == "source":
            tensor = read(self.args[0])
            if tuple(tensor.shape) != self.shape:
                raise ValueError(f"weight {self.args[0]}: expected shape {list(self.shape)}, got {list(tensor.shape)}")
            return tensor if tensor.dtype == self.dtype else tensor.to(self.dtype)
        if self.op in ("stack", "concat"):
            return self._gather(read, pack)
        if self.op == "literal":
            return torch.tensor(self.args, dtype=self.dtype).reshape(self.shape)
        if self.op == "dequantise":
            codes, scales, *zeros = (w.materialise(read, pack) for w in self.inputs)
            rows, columns, offset, kind = self.args
            zero = zeros[0] if zeros else None
            return dequantise(codes, scales, zero, block=(rows, columns), offset=offset, kind=kind, dtype=self.dtype)
        if self.op == "gather":
            tensor, rows = (w.materialise(read, pack) for w in self.inputs)
            return tensor[_checked(rows, len(tensor), str(self.inputs[1]))]
        (inner,) = self.inputs
        if self.op == "stored":
            from moec.passes.ir.quantised import stored_bytes  # follows recipes, so it imports this module

            return stored_bytes(inner, read)
        if self.op == inner.op == "transpose" and _axes(self) == _axes(inner):
            return inner.inputs[0].materialise(read, pack)  # there and back: two copies of a stack, for nothing
        tensor = inner.materialise(read, pack)
        if self.op == "quantise":
            return dequantise_parts(quantise(tensor, parse_format(self.args[0]), str(inner)), self.dtype)
        if self.op == "pack":
            if pack is None:
                raise ValueError(f"weight layout {self.args[0]!r} is made by the compiler's kernel catalogue only")
            return pack(self.args[0], self.args[1:], tensor)
        return _APPLY[self.op](tensor, *self.args)

    def _gather(self, read: Read, pack: Callable[..., Tensor] | None) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype)
        if self.op == "stack":
            for i, w in enumerate(self.inputs):
                out[i] = w.materialise(read, pack)
            return out
        (dim,) = self.args
        at = 0
        for w in self.inputs:
            out.narrow(dim, at, w.shape[dim]).copy_(w.materialise(read, pack))
            at += w.shape[dim]
        return out

    def __str__(self) -> str:
        if self.op == "source":
            return str(self.args[0])
        if self.op == "literal":
            return f"literal({', '.join(f'{n:g}' for n in self.args[:4])}{', ..' if len(self.args) > 4 else ''})"
        shown = [str(w) for w in self.inputs[:2]] + (["..", str(self.inputs[-1])] if len(self.inputs) > 2 else [])
        return f"{self.op}({', '.join(shown + [str(a) for a in self.args])})"


def _checked(rows: Tensor, count: int, name: str) -> Tensor:
    """The row numbers, all of them in 0..count-1."""
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < count:
        raise ValueError(f"{name}: expected numbers from 0 to {count - 1}, got {int(rows.min())} to {int(rows.max())}")
    return rows.long()


def _axes(turned: Weight) -> set[int]:
    """The two axes of a transpose, counted from the front."""
    return {a % len(turned.shape) for a in turned.args}


def _sliced(tensor: Tensor, dim: int, start: int, stop: int, step: int) -> Tensor:
    """A copy of some rows along an axis; rows in their order are copied in one piece, not one by one."""
    if step < 0:
        return tensor.index_select(dim, torch.arange(start, stop, step))
    kept = (slice(None),) * (dim % tensor.dim())
    return tensor[(*kept, slice(start, stop, step))].clone(memory_format=torch.contiguous_format)


_APPLY: dict[str, Callable[..., Tensor]] = {
    "transpose": lambda t, a, b: t.transpose(a, b).contiguous(),
    "reshape": lambda t, *shape: t.reshape(shape),
    "slice": _sliced,
    "cast": lambda t, name: t.to(getattr(torch, name)),
    "add": lambda t, number: t + number,
    "scale": lambda t, number: t * number,
    "pad": lambda t, *amounts: torch.nn.functional.pad(t, amounts),
    "unpack": unpack,
    "named": lambda t, name: t,
}


def source(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Weight:
    """The tensor of that name in the checkpoint."""
    return Weight("source", (name,), (), tuple(shape), dtype)


def literal(tensor: Tensor) -> Weight:
    """A small constant by its values."""
    return Weight("literal", tuple(tensor.flatten().tolist()), (), tuple(tensor.shape), tensor.dtype)


def named(w: Weight, name: str) -> Weight:
    """The weight under a name of its own: equal weights are stored once, and this one may be written while serving."""
    return Weight("named", (name,), (w,), w.shape, w.dtype)


def stack(parts: list[Weight]) -> Weight:
    """Equal shapes [..] -> [n, ..]."""
    return Weight("stack", (), tuple(parts), (len(parts), *parts[0].shape), parts[0].dtype)


def concat(parts: list[Weight], dim: int) -> Weight:
    """Along an axis that is there; the shapes agree in all others."""
    shape = list(parts[0].shape)
    shape[dim] = sum(p.shape[dim] for p in parts)
    return Weight("concat", (dim,), tuple(parts), tuple(shape), parts[0].dtype)


def transpose(w: Weight, a: int, b: int) -> Weight:
    """With axes a and b exchanged."""
    shape = list(w.shape)
    shape[a], shape[b] = shape[b], shape[a]
    return Weight("transpose", (a, b), (w,), tuple(shape), w.dtype)


def reshape(w: Weight, shape: tuple[int, ...]) -> Weight:
    """The same numbers in row-major order; no size may be -1."""
    return Weight("reshape", tuple(shape), (w,), tuple(shape), w.dtype)


def slice_(w: Weight, dim: int, start: int, stop: int, step: int = 1) -> Weight:
    """Along one axis; start and stop are counted from 0, neither may be negative."""
    shape = list(w.shape)
    shape[dim] = len(range(start, stop, step))
    return Weight("slice", (dim, start, stop, step), (w,), tuple(shape), w.dtype)


_KEEP_VALUES = ("stack", "concat", "transpose", "reshape", "slice")


def cast(w: Weight, dtype: torch.dtype) -> Weight:
    """The weight in another dtype. What is dequantised is made in that dtype at once, rounded a single time."""
    if w.dtype == dtype:
        return w
    if w.op in ("dequantise", "quantise"):
        return dataclasses.replace(w, dtype=dtype)
    if w.op in _KEEP_VALUES and _is_quantised(w):
        return dataclasses.replace(w, inputs=tuple(cast(part, dtype) for part in w.inputs), dtype=dtype)
    return Weight("cast", (str(dtype).removeprefix("torch."),), (w,), w.shape, dtype)


def _is_quantised(w: Weight) -> bool:
    return w.op == "dequantise" or (w.op in _KEEP_VALUES and any(map(_is_quantised, w.inputs)))


def unpacked(w: Weight, bits: int, dim: int, order: tuple[int, ...] | None = None, plus: int = 0) -> Weight:
    """The small unsigned numbers in a weight of integers, lowest bits first unless `order` says where each lies.

    plus: added to each number, modulo 2 ** bits.
    """
    order = order or tuple(range(8 * w.dtype.itemsize // bits))
    shape = list(w.shape)
    shape[dim] *= len(order)
    return Weight("unpack", (bits, dim, order, plus), (w,), tuple(shape), torch.uint8)


def gathered(w: Weight, rows: Weight) -> Weight:
    """[n, ..] and numbers [m] below n -> [m, ..]."""
    return Weight("gather", (), (w, rows), (*rows.shape, *w.shape[1:]), w.dtype)


def dequantised(
    codes: Weight, scales: Weight, zeros: Weight | None, block: tuple[int, int], offset: int = 0, kind: str = "number"
) -> Weight:
    """Numbers from codes and the scales of blocks, in float32 until they are cast; see dequantise.py."""
    inputs = (codes, scales) if zeros is None else (codes, scales, zeros)
    return Weight("dequantise", (*block, offset, kind), inputs, codes.shape, torch.float32)


def pack(w: Weight, layout: str, numbers: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype) -> Weight:
    """The weight in a kernel's own layout; `layout` is looked up in the kernel catalogue when it is made."""
    return Weight("pack", (layout, *numbers), (w,), tuple(shape), dtype)


def weights_of(gm: torch.fx.GraphModule) -> dict[str, Weight]:
    """The graph's weights by attribute name."""
    return gm.meta.setdefault("weights", {})


def weight_of(gm: torch.fx.GraphModule, node: object) -> Weight | None:
    """The lazy weight that a get_attr node of the graph names; None for anything else."""
    if not isinstance(node, torch.fx.Node) or node.op != "get_attr":
        return None
    return weights_of(gm).get(str(node.target))


def add_weight(gm: torch.fx.GraphModule, name: str, weight: Weight) -> str:
    """Registers a weight under a free attribute name derived from `name`, and returns that name."""
    base = "".join(c if c.isalnum() else "_" for c in name)
    free, n = base, 1
    while hasattr(gm, free):
        free, n = f"{base}_{n}", n + 1
    gm.register_buffer(free, torch.empty(weight.shape, dtype=weight.dtype, device="meta"), persistent=False)
    weights_of(gm)[free] = weight
    return free


def weight_node(gm: torch.fx.GraphModule, name: str, weight: Weight) -> torch.fx.Node:
    """Adds a get_attr node for a new weight at the graph's current insertion point; sets its meta["val"]."""
    attr = add_weight(gm, name, weight)
    node = gm.graph.get_attr(attr)
    node.meta["val"] = getattr(gm, attr)
    return node

"""Codes and scales of lazy weights: of those that a pass quantised, and of those that a checkpoint stores quantised.

What a checkpoint stores is taken as it is (passes/ir/coded.py). A weight whose codes have no known form has no parts;
`refusal` says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moec.passes.ir.coded import Make, NoParts, coded_parts
from moec.passes.ir.formats import SCALE_NAMES, FormatError, WeightFormat, parse_format
from moec.passes.ir.quantise import Parts, check_parts, quantise
from moec.passes.ir.stored import store, stored_matrix_bytes
from moec.passes.ir.weights import Read, Weight, slice_, stack, transpose


def quantised(weight: Weight, format: WeightFormat, what: str) -> Weight:
    """The weight in a format: of its shape and dtype, with the numbers that its codes mean.

    A stack is quantised part by part, so that one expert at a time is in memory. A plain format that the weight has
    already changes nothing.  Raises: FormatError: no group size divides K.
    """
    parts = unstacked(weight)
    if parts is not None:
        return stack([quantised(part, format, what) for part in parts])
    format = format.fitted(weight.shape[-1], what)
    if format.is_plain and not format.is_packed and format.dtype == weight.dtype:
        return weight
    return Weight("quantise", (format.name,), (weight,), weight.shape, weight.dtype)


def quantised_by_expert(weight: Weight, formats: Sequence[WeightFormat], what: str) -> Weight:
    """A stack [E, N, K] with a format for each expert. Raises: FormatError: one does not divide K."""
    each = zip(by_expert(weight), formats, strict=True)
    return stack([quantised(one, format, f"{what}, expert {e}") for e, (one, format) in enumerate(each)])


def unrounded(weight: Weight) -> Weight:
    """The weight as it was before a pass quantised it; the weight itself where none did."""
    if weight.op == "quantise":
        return weight.inputs[0]
    inputs = tuple(map(unrounded, weight.inputs))
    return weight if inputs == weight.inputs else dataclasses.replace(weight, inputs=inputs)


def same_numbers(left: Weight, right: Weight) -> bool:
    """Whether two recipes make the same tensor, stacks compared expert by expert."""
    stacks = left.shape == right.shape and len(left.shape) == 3
    return left == right or (stacks and by_expert(left) == by_expert(right))


def is_stored_quantised(weight: Weight) -> bool:
    """Whether a checkpoint stores a weight, or a part of it, as codes; not where it is quantised anew."""
    return weight.op == "dequantise" or (weight.op != "quantise" and any(map(is_stored_quantised, weight.inputs)))


def plainly_grouped(weight: Weight, read: Read | None) -> Weight:
    """The weight with groups that a table of indices names brought into blocks, where the table is 0 0 .. 1 1 .. .

    Such tables (GPTQ's g_idx) are stored whether or not columns were reordered.
    """
    if read is None or not is_stored_quantised(weight):
        return weight
    if weight.op != "dequantise":
        return dataclasses.replace(weight, inputs=tuple(plainly_grouped(w, read) for w in weight.inputs))
    codes, *grids = weight.inputs
    turned = grids[0].op == "transpose" and grids[0].inputs[0].op == "gather"
    gathers = [g.inputs[0] if turned else g for g in grids]
    if any(g.op != "gather" for g in gathers):
        return weight
    table, indices = gathers[0].inputs
    count, length = table.shape[0], indices.shape[0]
    if length % count or not torch.equal(indices.materialise(read).long(), torch.arange(length) // (length // count)):
        return weight
    plain = [transpose(g.inputs[0], 0, 1) if turned else g.inputs[0] for g in gathers]
    block = (weight.args[0], length // count) if turned else (length // count, weight.args[1])
    return dataclasses.replace(weight, args=(*block, *weight.args[2:]), inputs=(codes, *plain))


def unstacked(weight: Weight) -> list[Weight] | None:
    """[E, N, K] -> its E matrices, where each is made of tensors of its own; None where one tensor holds several."""
    if len(weight.shape) != 3:
        return None
    one = weight.shape[1:]
    if weight.op == "stack":
        return list(weight.inputs)
    if weight.op == "reshape" and weight.shape == (1, *weight.inputs[0].shape):
        return list(weight.inputs)
    if weight.op not in ("concat", "transpose", "slice", "cast"):
        return None
    inner = [unstacked(w) for w in weight.inputs]
    if any(parts is None for parts in inner):
        return None
    columns = [parts for parts in inner if parts is not None]
    axes = _axes(weight)
    if 0 not in axes:
        args = (*(a - 1 for a in axes), *weight.args[len(axes) :])
        return [Weight(weight.op, args, parts, one, weight.dtype) for parts in zip(*columns, strict=True)]
    if weight.op == "transpose":
        return None
    together = [part for parts in columns for part in parts]
    return [together[i] for i in range(*weight.args[1:])] if weight.op == "slice" else together


def _axes(weight: Weight) -> tuple[int, ...]:
    """The axes that a concat, transpose or slice works along, counted from the front; () of a cast."""
    count = {"transpose": 2, "cast": 0}.get(weight.op, 1)
    return tuple(a % len(weight.shape) for a in weight.args[:count])


def by_expert(weight: Weight) -> list[Weight]:
    """[E, N, K] -> E weights [N, K]; slices of one tensor where it is no stack."""
    parts = unstacked(weight)
    if parts is not None:
        return parts
    one = weight.shape[1:]
    return [Weight("reshape", one, (slice_(weight, 0, e, e + 1),), one, weight.dtype) for e in range(weight.shape[0])]


def stored_format(weight: Weight) -> WeightFormat | None:
    """The format of a weight that has parts; None for one that is stored as its numbers. Reads nothing."""
    try:
        return _parts(weight, _unread).format
    except NoParts:
        return None


def formats_of(weight: Weight) -> tuple[WeightFormat, ...]:
    """The formats of a weight's matrices: one, or one for each expert where they differ; () where none is quantised.

    Experts that are not quantised among others that are have the plain format of their dtype.
    """
    if weight.op != "stack" or len(weight.shape) < 3:
        found = stored_format(weight)
        return () if found is None else (found,)
    parts = [stored_format(w) for w in weight.inputs]
    if not any(parts) or (weight.dtype not in SCALE_NAMES and not all(parts)):
        return ()
    formats = tuple(f or parse_format(SCALE_NAMES[weight.dtype]) for f in parts)
    return formats[:1] if len(set(formats)) == 1 else formats


def stored_formats(weight: Weight) -> tuple[WeightFormat, ...]:
    """As formats_of; of a weight that is not quantised the plain format of its dtype."""
    return formats_of(weight) or (parse_format(SCALE_NAMES[weight.dtype]),)


def stored(weight: Weight) -> Weight:
    """The bytes of a weight in its stored_formats, u8[..]; see passes/ir/stored.py."""
    formats, (*lead, rows, columns) = stored_formats(weight), weight.shape
    total = sum(stored_matrix_bytes(f, rows, columns) for f in formats)
    count = torch.Size(lead).numel() if len(formats) == 1 else 1
    return Weight("stored", (), (weight,), (total * count,), torch.uint8)


def stored_bytes(weight: Weight, read: Read) -> Tensor:
    """What `stored` stands for, made one expert at a time where the weight has experts."""
    if len(weight.shape) == 2:
        return store(_parts_or_numbers(weight, read))
    out = torch.empty(stored(weight).shape, dtype=torch.uint8)
    at = 0
    for parts in parts_by_expert(weight, read):
        one = store(parts)
        out[at : at + len(one)] = one
        at += len(one)
    return out


def parts_by_expert(weight: Weight, read: Read) -> Iterator[Parts]:
    """The parts of each matrix of [E, N, K], in order; what is not quantised in its plain format.

    Cost: a stack has one expert in memory, one tensor for all experts that tensor; each source is read once.
    """
    parts = unstacked(weight)
    if parts is not None:
        for one in parts:
            yield _parts_or_numbers(one, read)
    elif weight.op == "quantise":
        (inner,) = weight.inputs
        for numbers in inner.materialise(read):
            yield quantise(numbers, parse_format(weight.args[0]), str(inner))
    else:
        whole = _parts_or_numbers(weight, read)
        for i in range(weight.shape[0]):
            codes, scales, zeros = (None if t is None else t[i] for t in (whole.codes, whole.scales, whole.zeros))
            assert codes is not None
            yield Parts(whole.format, codes, scales, zeros)


def _parts_or_numbers(weight: Weight, read: Read) -> Parts:
    """The parts of a quantised weight, else its numbers as parts of a plain format."""
    if formats_of(weight):
        return quantised_parts(weight, read)
    return Parts(parse_format(SCALE_NAMES[weight.dtype]), weight.materialise(read))


def refusal(weight: Weight) -> str:
    """Why a weight has no parts, "" where it has."""
    try:
        _parts(weight, _unread)
    except NoParts as reason:
        return str(reason)
    return ""


def quantised_parts(weight: Weight, read: Read) -> Parts:
    """Codes and scales of a quantised weight. Raises: FormatError: it has none (see refusal), or they are damaged."""
    try:
        parts = _parts(weight, lambda w: w.materialise(read))
    except NoParts as reason:
        raise FormatError(f"{weight}: {reason}") from None
    return check_parts(parts, str(weight))


def _unread(weight: Weight) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device="meta")


def _parts(weight: Weight, make: Make) -> Parts:
    """Parts of real tensors, or of shapes alone: `make` says which. Raises: NoParts."""
    if weight.op == "quantise":
        format = parse_format(weight.args[0])
        if make is not _unread:
            return quantise(make(weight.inputs[0]), format, str(weight.inputs[0]))
        grid = (*weight.shape[:-2], *format.grid(*weight.shape[-2:]))
        zeros = None if format.symmetric else torch.empty(grid, dtype=torch.uint8, device="meta")
        return Parts(format, _unread(weight), torch.empty(grid, device="meta"), zeros)
    if weight.op == "stack":
        return _stacked([_parts(w, make) for w in weight.inputs])
    return coded_parts(weight, make)


def _stacked(parts: list[Parts]) -> Parts:
    formats = {p.format.name for p in parts}
    if len(formats) > 1:
        raise NoParts(f"its experts have different formats: {', '.join(sorted(formats))}")
    tensors = [(p.codes, p.scales, p.zeros) for p in parts]
    codes, scales, zeros = (None if some[0] is None else torch.stack(some) for some in zip(*tensors, strict=True))
    return Parts(parts[0].format, codes, scales, zeros)

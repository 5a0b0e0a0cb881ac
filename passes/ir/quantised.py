"""Codes and scales of lazy weights: of those that a pass quantised, and of those that a checkpoint stores quantised.

What a checkpoint stores is taken as it is: its codes and scales are sliced, turned and joined as the weight's recipe
says, never rounded again. A recipe that cuts through a group, or a form that is none of passes/ir/formats.py, has no
parts; `refusal` says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from moec.passes.ir.formats import FLOATS, FormatError, WeightFormat, parse_format
from moec.passes.ir.quantise import Parts, check_parts, quantise
from moec.passes.ir.stored import matrix_bytes, store
from moec.passes.ir.weights import Read, Weight, slice_, stack, transpose

Make = Callable[[Weight], Tensor]
SCALE_NAMES = {dtype: name for name, dtype in FLOATS.items()}


class _NoParts(Exception):
    """Why a weight has no codes and scales of a known format."""


def quantised(weight: Weight, format: WeightFormat, what: str) -> Weight:
    """The weight in a format: of its shape and dtype, with the numbers that its codes mean.

    A stack is quantised part by part, so that one expert at a time is in memory. A plain format that the weight has
    already changes nothing.  Raises: FormatError: no group size divides K.
    """
    parts = unstacked(weight)
    if parts is not None:
        return stack([quantised(part, format, what) for part in parts])
    format = format.fitted(weight.shape[-1], what)
    if format.is_plain and FLOATS[format.name] == weight.dtype:
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
    if weight.op == "stack":
        return list(weight.inputs)
    if weight.op not in ("concat", "transpose", "slice", "cast") or (weight.op != "cast" and 0 in _axes(weight)):
        return None
    inner = [unstacked(w) for w in weight.inputs]
    if any(parts is None for parts in inner):
        return None
    columns = [parts for parts in inner if parts is not None]
    args = weight.args if weight.op == "cast" else (*(a - 1 for a in _axes(weight)), *weight.args[len(_axes(weight)) :])
    one = weight.shape[1:]
    return [Weight(weight.op, args, parts, one, weight.dtype) for parts in zip(*columns, strict=True)]


def _axes(weight: Weight) -> tuple[int, ...]:
    """The axes that a concat, transpose or slice works along, counted from the front."""
    count = 2 if weight.op == "transpose" else 1
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
    except _NoParts:
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
    total = sum(matrix_bytes(f, rows, columns) for f in formats)
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
    except _NoParts as reason:
        return str(reason)
    return ""


def quantised_parts(weight: Weight, read: Read) -> Parts:
    """Codes and scales of a quantised weight. Raises: FormatError: it has none (see refusal), or they are damaged."""
    try:
        parts = _parts(weight, lambda w: w.materialise(read))
    except _NoParts as reason:
        raise FormatError(f"{weight}: {reason}") from None
    return check_parts(parts, str(weight))


def _unread(weight: Weight) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device="meta")


def _parts(weight: Weight, make: Make) -> Parts:
    """Parts of real tensors, or of shapes alone: `make` says which. Raises: _NoParts."""
    if weight.op == "quantise":
        format = parse_format(weight.args[0])
        if make is not _unread:
            return quantise(make(weight.inputs[0]), format, str(weight.inputs[0]))
        grid = (*weight.shape[:-2], *format.grid(*weight.shape[-2:]))
        zeros = None if format.symmetric else torch.empty(grid, dtype=torch.uint8, device="meta")
        return Parts(format, _unread(weight), torch.empty(grid, device="meta"), zeros)
    if weight.op == "stack":
        return _stacked([_parts(w, make) for w in weight.inputs])
    return _in_format(_coded(weight, make))


def _stacked(parts: list[Parts]) -> Parts:
    formats = {p.format.name for p in parts}
    if len(formats) > 1:
        raise _NoParts(f"its experts have different formats: {', '.join(sorted(formats))}")
    tensors = [(p.codes, p.scales, p.zeros) for p in parts]
    codes, scales, zeros = (None if some[0] is None else torch.stack(some) for some in zip(*tensors, strict=True))
    return Parts(parts[0].format, codes, scales, zeros)


@dataclasses.dataclass(frozen=True)
class _Coded:
    """Codes [.., N, K] as a checkpoint means them: (code - zero - offset) * scale, with the block of each scale."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    block: tuple[int, int]
    offset: int
    kind: str
    bits: int

    def each(self, change: Callable[[Tensor], Tensor], **fields) -> _Coded:
        """The same change of codes, scales and zeros."""
        zeros = None if self.zeros is None else change(self.zeros)
        return dataclasses.replace(self, codes=change(self.codes), scales=change(self.scales), zeros=zeros, **fields)


def _coded(weight: Weight, make: Make) -> _Coded:
    """Follows a recipe down to what the checkpoint stores."""
    if weight.op == "dequantise":
        codes, _, *zeros = weight.inputs
        rows, columns, offset, kind = weight.args
        bits = _bits(codes)
        made = [make(w) for w in weight.inputs]
        return _Coded(made[0], made[1], made[2] if zeros else None, (rows, columns), offset, kind, bits)
    follow = _FOLLOW.get(weight.op)
    if follow is None or not weight.inputs:
        raise _NoParts("it is stored as its numbers" if weight.op in ("source", "literal") else f"{weight.op} of it")
    return follow([_coded(w, make) for w in weight.inputs], weight)


def _bits(codes: Weight) -> int:
    """Bits of a code: what words were unpacked to, else the whole element."""
    while codes.op != "unpack" and codes.inputs:
        codes = codes.inputs[0]
    return int(codes.args[0]) if codes.op == "unpack" else 8 * codes.dtype.itemsize


def _transposed(parts: list[_Coded], weight: Weight) -> _Coded:
    rank = len(weight.shape)
    if {a % rank for a in weight.args} != {rank - 2, rank - 1}:
        raise _NoParts("its recipe moves the experts' axis")
    (one,) = parts
    return one.each(lambda t: t.transpose(-1, -2), block=one.block[::-1])


def _reshaped(parts: list[_Coded], weight: Weight) -> _Coded:
    (one,) = parts
    if one.codes.shape[-2:] != weight.shape[-2:] or len(weight.shape) < 2:
        raise _NoParts("its recipe reshapes the matrix")
    return one.each(lambda t: t.reshape(*weight.shape[:-2], *t.shape[-2:]))


def _sliced(parts: list[_Coded], weight: Weight) -> _Coded:
    (one,) = parts
    dim, start, stop, step = weight.args
    rank = len(weight.shape)
    wanted = lambda t: t.index_select(dim, torch.arange(start, stop, step, device=t.device))  # noqa: E731
    if dim < rank - 2:
        return one.each(wanted)
    size, width = one.codes.shape[dim], one.block[dim - rank]
    if width == 1:
        return one.each(wanted)
    if width >= size:
        return dataclasses.replace(one, codes=wanted(one.codes), block=_with(one.block, dim - rank, weight.shape[dim]))
    if step != 1 or start % width or (stop % width and stop != size):
        raise _NoParts(f"its recipe cuts through blocks of {width} that share a scale")
    first, last = start // width, -(-stop // width)
    cut = one.each(lambda t: t.narrow(dim, first, last - first))
    return dataclasses.replace(cut, codes=wanted(one.codes))


def _joined(parts: list[_Coded], weight: Weight) -> _Coded:
    (dim,) = weight.args
    rank = len(weight.shape)
    if dim == rank - 2:
        parts = [_by_row(p) if p.block[0] >= p.codes.shape[-2] else p for p in parts]
    if len({(p.block, p.offset, p.kind, p.bits, p.codes.dtype, p.scales.dtype, p.zeros is None) for p in parts}) > 1:
        raise _NoParts("its recipe joins matrices that are stored differently")
    first = parts[0]
    if dim >= rank - 2 and any(p.codes.shape[dim] % first.block[dim - rank] for p in parts[:-1]):
        raise _NoParts("its recipe joins matrices in the middle of a block that shares a scale")
    zeros = None if first.zeros is None else torch.cat([p.zeros for p in parts if p.zeros is not None], dim)
    codes, scales = torch.cat([p.codes for p in parts], dim), torch.cat([p.scales for p in parts], dim)
    return dataclasses.replace(first, codes=codes, scales=scales, zeros=zeros)


def _by_row(one: _Coded) -> _Coded:
    """One scale for all rows as one for each: nothing is lost."""
    rows = one.codes.shape[-2]
    wide = lambda t: t.expand(*t.shape[:-2], rows, t.shape[-1])  # noqa: E731
    zeros = None if one.zeros is None else wide(one.zeros)
    return dataclasses.replace(one, scales=wide(one.scales), zeros=zeros, block=(1, one.block[1]))


def _all_of(parts: list[_Coded], weight: Weight) -> _Coded:
    return _joined([p.each(lambda t: t.unsqueeze(0)) for p in parts], dataclasses.replace(weight, args=(0,)))


_FOLLOW: dict[str, Callable[[list[_Coded], Weight], _Coded]] = {
    "transpose": _transposed,
    "reshape": _reshaped,
    "slice": _sliced,
    "concat": _joined,
    "stack": _all_of,
}


def _with(pair: tuple[int, int], place: int, value: int) -> tuple[int, int]:
    return (value, pair[1]) if place == -2 else (pair[0], value)


def _in_format(one: _Coded) -> Parts:
    """The coded form as one of our formats. Raises: _NoParts: it is none."""
    format = _format_of(one)
    codes, zeros, scales = one.codes, one.zeros, one.scales
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    if format.kind == "float":
        codes = codes.view(torch.uint8)
    elif format.kind == "int" and zeros is None:
        codes = (codes.short() - one.offset).to(torch.int8)
    elif format.kind == "int":
        signed = 128 if codes.dtype == torch.int8 else 0
        assert zeros is not None
        codes = (codes.short() + signed).to(torch.uint8)
        zeros = (zeros.short() + one.offset + signed).to(torch.uint8)
    return Parts(format, codes.contiguous(), scales.float().contiguous(), zeros)


def _format_of(one: _Coded) -> WeightFormat:
    height, width = one.block
    whole_row, whole = width >= one.codes.shape[-1], height >= one.codes.shape[-2]
    shape = f"blocks of {height} x {width}"
    if one.kind == "e2m1":
        if (height, width) != (1, 32) or one.scales.dtype not in (torch.uint8, torch.float8_e8m0fnu):
            raise _NoParts(f"4-bit floats with scales for {shape}")
        return parse_format("mxfp4")
    if one.codes.dtype.is_floating_point:
        if one.codes.dtype != torch.float8_e4m3fn or one.offset or one.zeros is not None:
            raise _NoParts(f"codes of {one.codes.dtype}")
        if whole_row and (height == 1 or whole):
            return parse_format("fp8" if height == 1 else "fp8-tensor")
        if one.block != (128, 128):
            raise _NoParts(f"8-bit floats with scales for {shape}")
        return parse_format("fp8-block128")
    if height != 1 or one.scales.dtype not in SCALE_NAMES:
        raise _NoParts(f"integers with scales of {one.scales.dtype} for {shape}")
    per_row = whole_row and one.bits == 8
    name = f"int{one.bits}" + ("" if per_row else f"-g{width}") + ("" if one.zeros is None else "-asym")
    scale = "" if per_row else f"-{SCALE_NAMES[one.scales.dtype]}"  # f32 holds any scale of a row
    try:
        return parse_format(name + scale)
    except FormatError:
        raise _NoParts(f"{one.bits}-bit integers with scales for {shape}") from None

"""Codes and scales as a checkpoint stores them, followed through a weight's recipe: sliced, turned and joined, never
rounded again.

A recipe that cuts through a group of values with one scale, or a form that is none of passes/ir/formats.py, has no
parts: NoParts says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from moec.passes.ir.formats import SCALE_NAMES, FormatError, WeightFormat, parse_format
from moec.passes.ir.quantise import Parts
from moec.passes.ir.weights import Weight

Make = Callable[[Weight], Tensor]
"""Gives a weight's tensor, or a meta tensor of its shape where shapes alone are wanted."""


class NoParts(Exception):
    """Why a weight has no codes and scales of a known format."""


def coded_parts(weight: Weight, make: Make) -> Parts:
    """The parts of a weight that a checkpoint stores as codes. Raises: NoParts."""
    return _in_format(_coded(weight, make))


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
        raise NoParts("it is stored as its numbers" if weight.op in ("source", "literal") else f"{weight.op} of it")
    return follow([_coded(w, make) for w in weight.inputs], weight)


def _bits(codes: Weight) -> int:
    """Bits of a code: what words were unpacked to, else the whole element."""
    while codes.op != "unpack" and codes.inputs:
        codes = codes.inputs[0]
    return int(codes.args[0]) if codes.op == "unpack" else 8 * codes.dtype.itemsize


def _transposed(parts: list[_Coded], weight: Weight) -> _Coded:
    rank = len(weight.shape)
    if {a % rank for a in weight.args} != {rank - 2, rank - 1}:
        raise NoParts("its recipe moves the experts' axis")
    (one,) = parts
    return one.each(lambda t: t.transpose(-1, -2), block=one.block[::-1])


def _reshaped(parts: list[_Coded], weight: Weight) -> _Coded:
    (one,) = parts
    if one.codes.shape[-2:] != weight.shape[-2:] or len(weight.shape) < 2:
        raise NoParts("its recipe reshapes the matrix")
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
        raise NoParts(f"its recipe cuts through blocks of {width} that share a scale")
    first, last = start // width, -(-stop // width)
    cut = one.each(lambda t: t.narrow(dim, first, last - first))
    return dataclasses.replace(cut, codes=wanted(one.codes))


def _joined(parts: list[_Coded], weight: Weight) -> _Coded:
    (dim,) = weight.args
    rank = len(weight.shape)
    if dim == rank - 2:
        parts = [_by_row(p) if p.block[0] >= p.codes.shape[-2] else p for p in parts]
    if len({(p.block, p.offset, p.kind, p.bits, p.codes.dtype, p.scales.dtype, p.zeros is None) for p in parts}) > 1:
        raise NoParts("its recipe joins matrices that are stored differently")
    first = parts[0]
    if dim >= rank - 2 and any(p.codes.shape[dim] % first.block[dim - rank] for p in parts[:-1]):
        raise NoParts("its recipe joins matrices in the middle of a block that shares a scale")
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
    """The coded form as one of our formats. Raises: NoParts: it is none."""
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
            raise NoParts(f"4-bit floats with scales for {shape}")
        return parse_format("mxfp4")
    if one.codes.dtype.is_floating_point:
        if one.codes.dtype != torch.float8_e4m3fn or one.offset or one.zeros is not None:
            raise NoParts(f"codes of {one.codes.dtype}")
        if whole_row and (height == 1 or whole):
            return parse_format("fp8" if height == 1 else "fp8-tensor")
        if one.block != (128, 128):
            raise NoParts(f"8-bit floats with scales for {shape}")
        return parse_format("fp8-block128")
    if height != 1 or one.scales.dtype not in SCALE_NAMES:
        raise NoParts(f"integers with scales of {one.scales.dtype} for {shape}")
    per_row = whole_row and one.bits == 8
    name = f"int{one.bits}" + ("" if per_row else f"-g{width}") + ("" if one.zeros is None else "-asym")
    scale = "" if per_row else f"-{SCALE_NAMES[one.scales.dtype]}"  # f32 holds any scale of a row
    try:
        return parse_format(name + scale)
    except FormatError:
        raise NoParts(f"{one.bits}-bit integers with scales for {shape}") from None

"""Experts' stacks as codes and scales: the layout of com.microsoft.QMoE, which moec's own node shares.

A stack [E, N, K] of an integer format is three tensors:
    codes   u8[E, N, K]    8 bits: a symmetric format's code plus 128, so that 128 means 0
            u8[E, N, K/2]  4 bits, likewise plus 8; the first code in the low half of a byte (2 bits: four in a byte)
    scales  f32[E, N, K/g], or f32[E, N] where a row has one: what the format's scales are, exactly
    zeros   u8, of formats that have them: shaped as the scales, along the last axis packed as the codes are
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moec.passes.ir.formats import WeightFormat
from moec.passes.ir.quantise import Parts
from moec.passes.ir.quantised import formats_of, parts_by_expert
from moec.passes.ir.weights import Read, Weight

CODES, SCALES, ZEROS = "codes", "scales", "zeros"
WIDTHS = (2, 4, 8)
"""Bits of codes that fill bytes."""


def has_layout(format: WeightFormat) -> bool:
    """Whether codes of a format have this layout: integers that fill bytes, without rounding of activations."""
    return format.kind == "int" and format.bits in WIDTHS and format.act is None


def format_of(stack: Weight) -> WeightFormat | None:
    """The one integer format of a stack that has this layout; None: it is stored as its numbers."""
    formats = formats_of(stack)
    if len(formats) != 1:
        return None
    (format,) = formats
    return format if has_layout(format) and stack.shape[-1] * int(format.bits) % 8 == 0 else None


@dataclasses.dataclass
class CodedStack:
    """A stack of experts whose codes, scales and zeros are written apart, and quantised once where one follows another.

    weight: [E, N, K] with format_of.  in_turn: rows of gate and up, one half after the other, are written in turn.
    """

    weight: Weight
    in_turn: bool
    _made: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def format(self) -> WeightFormat:
        """format_of the stack, which must have one."""
        found = format_of(self.weight)
        assert found is not None
        return found

    def parts(self) -> dict[str, CodedPart]:
        """The tensors that are written, by what they are."""
        format, (experts, rows, columns) = self.format, self.weight.shape
        packed = columns * int(format.bits) // 8
        grid = (experts, rows, columns // format.group) if format.group else (experts, rows)
        made = {
            CODES: CodedPart(self, CODES, (experts, rows, packed), torch.uint8),
            SCALES: CodedPart(self, SCALES, grid, torch.float32),
        }
        if not format.symmetric:
            last = -(-grid[-1] * int(format.bits) // 8) if format.group else rows
            made[ZEROS] = CodedPart(self, ZEROS, (*grid[:-1], last), torch.uint8)
        return made

    def make(self, part: str, read: Read) -> Tensor:
        """One of the tensors; the others are kept until they are asked for."""
        if part not in self._made:
            self._made = self._all(read)
        return self._made.pop(part)

    def _all(self, read: Read) -> dict[str, Tensor]:
        out = {name: torch.empty(part.shape, dtype=part.dtype) for name, part in self.parts().items()}
        for e, parts in enumerate(parts_by_expert(self.weight, read)):
            for name, tensor in laid_out(parts, self.in_turn).items():
                out[name][e] = tensor
        return out


@dataclasses.dataclass(frozen=True)
class CodedPart:
    """One tensor of a stack, made when it is written. part: CODES, SCALES or ZEROS."""

    stack: CodedStack
    part: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def make(self, read: Read) -> Tensor:
        """Quantises the stack, or takes what another part of it left. read: name -> tensor of the checkpoint."""
        return self.stack.make(self.part, read)

    def __str__(self) -> str:
        return f"{self.part} of {self.stack.weight}"


def laid_out(parts: Parts, in_turn: bool) -> dict[str, Tensor]:
    """One expert's parts [N, K] as they are written."""
    format = parts.format
    assert parts.scales is not None
    bits, per_row = int(format.bits), format.group == 0
    lowest = 1 << (bits - 1) if format.symmetric else 0
    codes = (parts.codes.to(torch.int16) + lowest).to(torch.uint8)
    made = {CODES: _packed(codes, bits), SCALES: parts.scales[..., 0] if per_row else parts.scales}
    if parts.zeros is not None:
        made[ZEROS] = parts.zeros[..., 0] if per_row else _packed(parts.zeros, bits)
    return {name: rows_in_turn(t) if in_turn else t for name, t in made.items()}


def _packed(codes: Tensor, bits: int) -> Tensor:
    """u8[N, K] of `bits` bits each -> u8[N, K * bits / 8], rounded up; the first code in the lowest bits."""
    per_byte = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
    packed = codes[..., 0].clone()
    for place in range(1, per_byte):
        packed |= codes[..., place] << (bits * place)
    return packed


def rows_in_turn(rows: Tensor) -> Tensor:
    """[2F, ..] gate half first -> gate and up rows in turn."""
    return rows.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)

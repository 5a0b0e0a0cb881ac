"""Weights that are stored as codes and scales: their numbers, made one matrix at a time when a step needs them.

What runs where no kernel takes a format, and the reference for those that do. A matrix of N rows and K columns is three
sections, each filled up to 64 bytes: codes row by row, scales, zeros; passes/ir/stored.py writes them. A format is
    {"name", "bits": 32, 16, 8, 4, 3, 2 or 1.6, "kind": "int", "float" or "codebook", "block": [rows, columns],
     "scale": "f32", "bf16", "f16", "e8m0" or "none", "symmetric": bool, "codebook": [16 numbers],
     "act": "int8", "fp8", null}
where a block of 0 means all of that axis, and a format without scales holds numbers of the dtype in "name".
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moec.runtime.errors import FormatError

ALIGN_BYTES = 64
E4M3_MAX = 448
ROWS_BY_BYTES = 32  # measured: with more rows, torch's product with int8 weights is slower than making them bfloat16
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "e8m0": torch.float8_e8m0fnu}


class StoredMatrix:
    """How to read matrices [rows, columns] of one format out of bytes."""

    def __init__(self, format: dict[str, Any], rows: int, columns: int) -> None:
        try:
            self.bits, self.kind, self.symmetric = format["bits"], format["kind"], format["symmetric"]
            self.scale, self.act = format["scale"], format["act"]
            self.plain = DTYPES[format["name"]] if self.scale == "none" else None
            width = 0 if self.plain else DTYPES[self.scale].itemsize
            self.block = format["block"][0] or max(rows, 1), format["block"][1] or max(columns, 1)
            codebook = format["codebook"]
        except (KeyError, TypeError, IndexError) as error:
            raise FormatError(f"a stored weight has the format {format!r}, unknown to this runtime: {error}") from None
        self.rows, self.columns = rows, columns
        self.grid = -(-rows // self.block[0]), -(-columns // self.block[1])
        self.row_bytes = -(-columns // 5) if self.bits < 2 else -(-columns * int(self.bits) // 8)
        count = 0 if self.plain else self.grid[0] * self.grid[1]
        sizes = (rows * self.row_bytes, count * width, 0 if self.symmetric else count)
        self.ends = list(itertools.accumulate(size + -size % ALIGN_BYTES for size in sizes))
        self.lengths = sizes
        self.tables = _tables(self.bits, self.kind, self.symmetric, tuple(codebook or ()))

    @property
    def num_bytes(self) -> int:
        """Bytes of one matrix: codes, scales and zeros, each padded."""
        return self.ends[2]

    def read(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        """u8[num_bytes] -> dtype[rows, columns]: (code - zero) * scale in float32, rounded once."""
        codes = stored[: self.lengths[0]].view(self.rows, self.row_bytes)
        if self.plain is not None:
            return codes.view(self.plain).to(dtype)
        numbers = self._numbers(codes)
        if not self.symmetric:
            zeros = stored[self.ends[1] : self.ends[1] + self.lengths[2]].view(self.grid)
            numbers = numbers - self._spread(zeros.float())
        scales = stored[self.ends[0] : self.ends[0] + self.lengths[1]].view(DTYPES[self.scale]).view(self.grid)
        return (numbers * self._spread(scales.float())).to(dtype)

    def _numbers(self, codes: Tensor) -> Tensor:
        """What the codes stand for before scales, f32[rows, columns]."""
        if self.bits == 8:
            return codes.view({"float": torch.float8_e4m3fn}.get(self.kind, _byte(self.symmetric))).float()
        if self.bits == 3:
            low = -(-self.columns // 4)
            parts = zip((codes[:, :low], codes[:, low:]), self._tables_on(codes), strict=True)
            first, second = (F.embedding(some.int(), table).flatten(1)[:, : self.columns] for some, table in parts)
            return first + second
        return F.embedding(codes.int(), self._tables_on(codes)[0]).flatten(1)[:, : self.columns]

    def _tables_on(self, codes: Tensor) -> list[Tensor]:
        """The tables where the codes are; they move once."""
        if self.tables[0].device != codes.device:
            self.tables = [t.to(codes.device) for t in self.tables]
        return self.tables

    def _spread(self, grid: Tensor) -> Tensor:
        """One number for each block -> for each value; axes with one block stay 1."""
        if self.block[0] > 1 and grid.shape[0] > 1:
            grid = grid.repeat_interleave(self.block[0], 0)[: self.rows]
        return grid.repeat_interleave(self.block[1], 1)[:, : self.columns] if grid.shape[1] > 1 else grid


def _byte(symmetric: bool) -> torch.dtype:
    return torch.int8 if symmetric else torch.uint8


@functools.cache
def _tables(bits: float, kind: str, symmetric: bool, codebook: tuple[float, ...]) -> list[Tensor]:
    """byte -> the numbers of its codes, f32[256, codes in a byte]; two tables for 3 bits, none for whole bytes."""
    if bits >= 8:
        return []
    if bits < 2:
        return [_table(5, 3, [-1.0, 0.0, 1.0])]
    if bits == 3:
        low = 0.0 if not symmetric else -4.0
        return [_table(4, 4, [low, low + 1, low + 2, low + 3]), _table(8, 2, [0.0, 4.0])]
    count = 1 << int(bits)
    numbers = list(codebook) if kind == "codebook" else [float(c - symmetric * count // 2) for c in range(count)]
    return [_table(8 // int(bits), count, numbers)]


def _table(count: int, base: int, numbers: list[float]) -> Tensor:
    digits = torch.arange(256)[:, None] // torch.tensor([base**i for i in range(count)]) % base
    return torch.tensor(numbers)[digits]


class StoredStack:
    """The matrices of a stack [E, rows, columns], made when they are asked for.

    formats: one, or one for each of the E matrices.
    """

    def __init__(self, formats: Sequence[dict[str, Any]], rows: int, columns: int, count: int) -> None:
        layouts = [StoredMatrix(f, rows, columns) for f in formats]
        self.layouts = layouts * count if len(layouts) == 1 else layouts
        self.shape = (count, rows, columns)
        self.ends = list(itertools.accumulate(one.num_bytes for one in self.layouts))
        if len(self.layouts) != count:
            raise FormatError(f"a stored weight has {len(formats)} formats for {count} experts; make the engine again")

    def read(self, stored: Tensor, index: int, dtype: torch.dtype) -> Tensor:
        """Matrix `index` of u8[..]."""
        layout, end = self.layouts[index], self.ends[index]
        return layout.read(stored[end - layout.num_bytes : end], dtype)


def stored_weight(formats: list[dict[str, Any]], shape: list[int], dtype: str) -> Callable[[Tensor], Tensor]:
    """-> f(stored u8[..]) -> dtype[*shape]: the whole weight, for steps that take no other form."""
    *lead, rows, columns = shape
    stack, wanted = StoredStack(formats, rows, columns, torch.Size(lead).numel()), getattr(torch, dtype)

    def read(stored: Tensor) -> Tensor:
        if not lead:
            return stack.read(stored, 0, wanted)
        out = torch.empty(stack.shape, dtype=wanted, device=stored.device)
        for i in range(len(out)):
            out[i] = stack.read(stored, i, wanted)
        return out.view(shape)

    return read


def stored_linear(format: dict[str, Any], rows: int, columns: int) -> Callable[..., Tensor]:
    """-> f(x [T,K], stored u8[..], bias?) -> [T,N]; the matrix is made for the call, or its bytes are multiplied."""
    layout = StoredMatrix(format, rows, columns)
    by_bytes = (layout.bits, layout.kind, layout.symmetric, layout.act) == (8, "int", True, None)
    by_bytes &= layout.grid == (rows, 1)

    def apply(x: Tensor, stored: Tensor, bias: Tensor | None) -> Tensor:
        if by_bytes and x.dtype == torch.bfloat16 and 0 < len(x) <= ROWS_BY_BYTES and x.device.type == "cpu":
            codes = stored[: layout.lengths[0]].view(torch.int8).view(rows, columns)
            scales = stored[layout.ends[0] : layout.ends[0] + layout.lengths[1]].view(torch.float32)
            y = torch._weight_int8pack_mm(x.contiguous(), codes, scales.to(x.dtype))
            return y if bias is None else y + bias
        return linear(x, layout.read(stored, x.dtype), bias, layout.act)

    return apply


def stored_embedding(format: dict[str, Any], rows: int, columns: int, dtype: str) -> Callable[[Tensor, Tensor], Tensor]:
    """-> f(stored u8[..], index int[..]) -> dtype[.., columns]: only the wanted rows are made."""
    whole, wanted = StoredMatrix(format, rows, columns), getattr(torch, dtype)
    one = {**format, "block": [1, format["block"][1]]}

    def apply(stored: Tensor, index: Tensor) -> Tensor:
        flat = index.reshape(-1)
        some = StoredMatrix(one, len(flat), columns)
        codes = stored[: whole.lengths[0]].view(rows, whole.row_bytes)[flat]
        parts = [codes.reshape(-1)]
        for at, length in zip(whole.ends, whole.lengths[1:], strict=False):
            if length:
                grid = stored[at : at + length].view(whole.grid[0], -1)
                parts.append(grid[flat // whole.block[0]].reshape(-1))
        filled = [F.pad(p, (0, -len(p) % ALIGN_BYTES)) for p in parts]
        return some.read(torch.cat(filled), wanted).view(*index.shape, columns)

    return apply


def linear(x: Tensor, w: Tensor, bias: Tensor | None, act: str | None) -> Tensor:
    """x W^T + b; act "int8" or "fp8": the rows of x are rounded to int8 or e4m3 first, with a scale for each.

    Such products are summed in float32.
    """
    if act is None:
        return F.linear(x, w, bias)
    largest = 127 if act == "int8" else E4M3_MAX
    scale = x.float().abs().amax(-1, keepdim=True).div_(largest).clamp_(min=torch.finfo(torch.float32).tiny)
    rounded = (x.float() / scale).round_() if act == "int8" else (x.float() / scale).to(torch.float8_e4m3fn).float()
    y = F.linear(rounded, w.float()) * scale
    return (y if bias is None else y + bias).to(x.dtype)

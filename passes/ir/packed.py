"""bf16-packed: bf16 numbers in 12 bits, without loss.

A row of weights has few exponents that differ, as their sizes differ little: 16 of them hold all but 0.01 % of numbers
that are normally distributed. So a number is coded by its sign, its 7 bits of mantissa, and how far its exponent is
below the largest of its row, in 4 bits; the row's scale is the power of two that belongs to the largest. A number that
is smaller, 0 too, is coded as the smallest there is and is an exception: it is kept beside the codes, and products with
what it is more than its code are added to the sums, which are f32 as those of bf16 are.

There is room for one exception in 512 numbers. Where rows have more of them, as in weights that were pruned, refusal()
says so, and they stay as they are.

Source: that exponents of trained weights need fewer than 3 bits: Zhang et al., 70 % Size, 100 % Accuracy (DFloat11),
arXiv 2504.11651. There they are Huffman codes; codes of one length are decoded by few vector instructions.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

NAME, BITS = "bf16-packed", 12
ROWS = 32  # whose exceptions are in one place
EXCEPTION_BYTES = 8
KEPT, TOP = 16, 127  # exponents that have codes, and the largest of them: of numbers in [1, 2)
SMALLEST = 2.0 ** (1 - KEPT)  # code, before its row's scale
_ROWS_AT_ONCE = 512
_SHARE = 512  # numbers for which there is room for one exception, at least
_TOGETHER = 8  # exceptions, and their number in the place of one, fill lines of 64 bytes


@dataclasses.dataclass(frozen=True)
class Packed:
    """A matrix: its numbers are codes * scales, but for exceptions, which are as they were.

    codes: i32[N, K], the bits of bf16 numbers with exponents 112 .. 127; of an exception those of SMALLEST.
    scales: f32[N], powers of two, 0 for a row of zeros.  exceptions: bool[N, K].
    """

    codes: Tensor
    scales: Tensor
    exceptions: Tensor


def room(depth: int) -> int:
    """Exceptions that there is room for in ROWS rows of K = depth."""
    return (-(-depth * ROWS // _SHARE) // _TOGETHER + 1) * _TOGETHER - 1


def exception_bytes(depth: int) -> int:
    """Of ROWS rows of K = depth: how many there are, and the room for them."""
    return (room(depth) + 1) * EXCEPTION_BYTES


def pack(numbers: Tensor) -> Packed:
    """bf16[N, K], finite -> its codes."""
    bits = numbers.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    exponent, largest = _exponents(bits)
    exceptions = _exceptions(numbers, exponent, largest)
    smallest = (TOP + 1 - KEPT) << 7
    codes = bits & 0x8000 | (exponent + (TOP - largest)) << 7 | bits & 0x7F
    codes = torch.where(exceptions | (largest == 0), smallest, codes)
    return Packed(codes, (largest << 23).view(torch.float32)[:, 0], exceptions)


def refusal(numbers: Tensor) -> str | None:
    """Why a matrix bf16[N, K] has no place for its exceptions, or None: the worst ROWS rows must have room together."""
    bits = numbers.contiguous().view(torch.int16)
    some = zip(numbers.split(_ROWS_AT_ONCE), bits.split(_ROWS_AT_ONCE), strict=True)
    counts = torch.cat([_exceptions(n, *_exponents(b)).sum(1) for n, b in some])
    rows, limit = min(ROWS, len(counts)), room(numbers.shape[1])
    worst = int(counts.topk(rows).values.sum())
    if worst <= limit:
        return None
    return (
        f"{worst:,} of {rows * numbers.shape[1]:,} numbers in {rows} rows are 0 or under 2**-{KEPT - 1} of their row's "
        f"largest, {NAME} has room for {limit}"
    )


def _exponents(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Bits of bf16 [N, K] -> exponents [N, K], the largest of each row [N, 1]."""
    exponent = bits >> 7 & 0xFF
    return exponent, exponent.amax(1, keepdim=True) if bits.shape[1] else exponent.new_zeros(len(bits), 1)


def _exceptions(numbers: Tensor, exponent: Tensor, largest: Tensor) -> Tensor:
    """bool[N, K]: without a code; in a row of zeros none is."""
    return ((exponent <= largest - KEPT) | (exponent == 0)) & ((largest > 0) | (numbers != 0))

"""How quantised expert weights lie in a GPU's memory: codes in the order of mma.sync's B fragments.

    w        u32 [E, N/16, K/64, 32 x bits]      bits 4 or 8; a unit of 16 weight rows by 64 of K, 32 lanes
      4 bits   [lane, 4 words]: word 2h+s holds row half h (8 rows) and k 32s..32s+31; code - 8 is the number
      8 bits   [row half, lane, 4 words]: word s holds k 16s..16s+15; two's complement
    w_scale  bf16 [E, K/group, N], or f32 [E, N] where a row has one scale

A lane keeps row lane / 4 of the half and, of every 16 k, the pairs from 2 (lane % 4) and from 8 + 2 (lane % 4): what
it feeds to mma.m16n8k16. The two numbers of a pair lie 16 bits apart, so one mask turns a word into a pair of bf16.
Rows stand as moec::experts has them (gate rows first). N is a multiple of 16, K of 64.
Source of the fragment's order: PTX ISA, "Matrix fragments for mma.m16n8k16".
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.errors import CompileError
from moec.compiler.kernels.cuda.gemm_problem import CODE_BITS, GROUPS, UNIT_DEPTH, UNIT_ROWS
from moec.passes.ir.formats import FormatError, WeightFormat, parse_format
from moec.passes.ir.quantise import Parts


class CodesError(CompileError):
    """A stack of weights that has no packed form."""


def refusal(format: WeightFormat, rows: int, depth: int) -> str | None:
    """Why weights [.., rows, depth] in a format have no packed form, or None."""
    try:
        fitted = format.fitted(depth)
    except FormatError as error:
        return str(error)
    wanted = fitted.kind == "int" and fitted.symmetric and fitted.bits in CODE_BITS and fitted.act is None
    scale = "bf16" if fitted.group else "f32"
    if not wanted or fitted.scale != scale or fitted.group not in (0, *GROUPS) or fitted.block[0] != 1:
        return f"{format.name} weights; packed are int4 and int8 in groups of 32, 64 or 128 with bf16 scales, and int8"
    if rows % UNIT_ROWS or depth % UNIT_DEPTH:
        return f"weights of {rows} x {depth}, not multiples of {UNIT_ROWS} x {UNIT_DEPTH}"
    return None


def code_bits_and_group(name: str, depth: int) -> tuple[int, int]:
    """What GemmProblem calls code_bits and group, for a format's name. Raises: FormatError."""
    format = parse_format(name).fitted(depth)
    return int(format.bits), format.group


def pack(parts: Parts) -> tuple[Tensor, Tensor]:
    """Parts [.., N, K] -> w i32 [.., N/16, K/64, 32 x bits] (the bits are unsigned), w_scale as in the module.

    Raises: CodesError.
    """
    format, (*lead, rows, depth) = parts.format, parts.codes.shape
    if reason := refusal(format, rows, depth):
        raise CodesError(f"{reason}; choose another --weights")
    assert parts.scales is not None  # plain formats are refused
    stacked = parts.codes.reshape(-1, rows, depth)
    words = (_words_of_4 if format.bits == 4 else _words_of_8)(stacked)
    w = words.reshape(*lead, rows // UNIT_ROWS, depth // UNIT_DEPTH, -1)
    if not format.group:
        return w, parts.scales.reshape(*lead, rows).float().contiguous()
    return w, parts.scales.transpose(-1, -2).to(torch.bfloat16).contiguous()


def _words_of_4(codes: Tensor) -> Tensor:
    """i8[E,N,K], -8..7 -> i32[E, N/16, K/64, 128]."""
    count, rows, depth = codes.shape
    parts = (codes.to(torch.int32) + 8).view(count, rows // 16, 2, 8, depth // 64, 2, 2, 2, 4, 2)
    # E, tile, half, row, step, k32, k16, k8, quad, parity -> E, tile, step, row, quad, half, k32 | parity, k16, k8
    nibbles = parts.permute(0, 1, 4, 3, 8, 2, 5, 9, 6, 7).reshape(count, -1, 8)
    return _joined(nibbles, 4)


def _words_of_8(codes: Tensor) -> Tensor:
    """i8[E,N,K] -> i32[E, N/16, K/64, 256]."""
    count, rows, depth = codes.shape
    parts = (codes.to(torch.int32) & 0xFF).view(count, rows // 16, 2, 8, depth // 64, 4, 2, 4, 2)
    # E, tile, half, row, step, k16, k8, quad, parity -> E, tile, step, half, row, quad, k16 | parity, k8
    return _joined(parts.permute(0, 1, 4, 2, 3, 7, 5, 8, 6).reshape(count, -1, 4), 8)


def _joined(parts: Tensor, bits: int) -> Tensor:
    """i32[.., 32 / bits] -> i32[..]: the first in the lowest bits; the highest bit becomes the sign."""
    word = parts[..., 0].clone()
    for j in range(1, parts.shape[-1]):
        word |= parts[..., j] << (bits * j)
    return word

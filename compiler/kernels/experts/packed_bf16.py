"""How bf16-packed weights (passes/ir/packed.py) lie in panels, and the LLVM-IR functions that make them bf16 again.

    panel      [column scales, 32 x f32] [number of exceptions, i32; 4 bytes] [exception, ...] [block, ...]
    exception  [k * 32 + column, i32] [the number, f32], from the smallest place on
    block      32 k: 8 of [3 units of 64 bytes], each 8 k of a half of the panel, the halves in turn

The low byte of a code (lowest bit of the exponent, mantissa) is stored as it is, of the high byte the sign and the
three bits that differ, as a nibble. The first unit has the low bytes of two pairs of k, the second those of two more,
the third the nibbles, the first two pairs' in the low half of a byte. 64 low bytes are in the order in which registers
are interleaved by 16 bytes: 4 columns of one pair of k, then the same columns of the next.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.kernels.experts.layout import HALF, PANEL
from moec.passes.ir import packed
from moec.passes.ir.formats import FormatError

UNIT_PAIRS, UNIT_DEPTH = 4, 8  # pairs of k, and k, of three units
EXCEPTIONS_AT = PANEL * 4
_COLUMNS = 4  # in 16 bytes
_PANELS_AT_ONCE = 16
_HIGH = (packed.TOP + 1 - packed.KEPT) >> 1  # high byte of the smallest positive code; seven follow it


def head_bytes(depth: int) -> int:
    """Scales and exceptions of a panel."""
    return EXCEPTIONS_AT + packed.exception_bytes(depth)


def pack(numbers: Tensor, depth: int, out: Tensor) -> None:
    """bf16[N, K], whole panels and blocks of K = depth -> u8[panels, bytes]. Raises: FormatError: no room is left.

    Cost: what is made meanwhile is for 16 panels.
    """
    for some, target in zip(numbers.split(_PANELS_AT_ONCE * PANEL), out.split(_PANELS_AT_ONCE), strict=True):
        made = packed.pack(some)
        target[:, head_bytes(depth) :] = _units(made.codes)
        target[:, :EXCEPTIONS_AT] = made.scales.view(-1, PANEL).view(torch.uint8)
        for one, rows, are in zip(target, some.split(PANEL), made.exceptions.split(PANEL), strict=True):
            _put_exceptions(one[EXCEPTIONS_AT : head_bytes(depth)], rows[:, :depth], are[:, :depth])


def _put_exceptions(out: Tensor, numbers: Tensor, exceptions: Tensor) -> None:
    """The exceptions bool[32, K] of one panel into the room for them."""
    places = exceptions.t().flatten().nonzero()
    if len(places) > packed.room(numbers.shape[1]):
        raise FormatError(f"{packed.refusal(numbers)}; choose bf16")
    values = numbers.t().flatten()[places].float().view(torch.int32)
    entries = torch.cat([places.to(torch.int32), values], 1)
    entries = torch.cat([entries.new_tensor([[len(places), 0]]), entries]).flatten().view(torch.uint8)
    out[: len(entries)] = entries
    out[len(entries) :] = 0


def _units(codes: Tensor) -> Tensor:
    """i32[N, K] -> u8[panels, bytes]."""
    n, k = codes.shape
    lanes = HALF // _COLUMNS
    # panel, half, lane, column, unit, two pairs, pair, parity
    # -> panel, unit, half, two pairs, lane, pair, column, parity
    parts = codes.view(n // PANEL, 2, lanes, _COLUMNS, k // UNIT_DEPTH, 2, 2, 2).permute(0, 4, 1, 5, 2, 6, 3, 7)
    low = (parts & 0xFF).to(torch.uint8)
    high = (parts >> 12 & 8 | parts >> 8 & 7).to(torch.uint8)
    nibbles = high[:, :, :, :1] | high[:, :, :, 1:] << 4
    return torch.cat([low, nibbles], 3).reshape(n // PANEL, -1)


def decoder_text(tag: str, lanes: int, native: bool) -> str:
    """word0 .. word3 of `native`: bf16 of each pair of k from the words of three units; else low0, high0 ..: as f32."""
    size = 4 * lanes
    lookup = "@llvm.x86.avx512.pshuf.b.512" if lanes == 16 else "@llvm.x86.avx2.pshuf.b"
    text = [f"\ndeclare <{size} x i8> {lookup}(<{size} x i8>, <{size} x i8>)"]
    words, floats = f"<{lanes} x i32>", f"<{lanes} x float>"
    for j in range(UNIT_PAIRS):
        body = _word(j, lanes, lookup)
        if native:
            text += _function(words, f"word{j}_{tag}", words, [*body, f"ret {words} %r"])
            continue
        for name, widen in (("low", "shl {} %r, splat (i32 16)"), ("high", "and {} %r, splat (i32 -65536)")):
            more = [f"%s = {widen.format(words)}", f"%f = bitcast {words} %s to {floats}", f"ret {floats} %f"]
            text += _function(floats, f"{name}{j}_{tag}", words, body + more)
    return "\n".join([*text, ""])


def _word(j: int, lanes: int, lookup: str) -> list[str]:
    """%r: the bf16 numbers of pair j, high bytes looked up and put beside the low ones."""
    size = 4 * lanes
    kind, words = f"<{size} x i8>", f"<{lanes} x i32>"
    table = ", ".join(f"i8 {(code >> 3) << 7 | (_HIGH + (code & 7))}" for code in [*range(16)] * (size // 16))
    low = [16 * lane + 8 * (j % 2) + i for lane in range(size // 16) for i in range(8)]
    order = ", ".join(f"i32 {i}, i32 {size + i}" for i in low)
    return [
        f"%n = lshr {words} %w2, splat (i32 {4 * (j // 2)})",
        f"%m = and {words} %n, splat (i32 {0x0F0F0F0F})",
        f"%b = bitcast {words} %m to {kind}",
        f"%h = call {kind} {lookup}({kind} <{table}>, {kind} %b)",
        f"%l = bitcast {words} %w{j // 2} to {kind}",
        f"%u = shufflevector {kind} %l, {kind} %h, <{size} x i32> <{order}>",
        f"%r = bitcast {kind} %u to {words}",
    ]


def _function(result: str, name: str, words: str, body: list[str]) -> list[str]:
    head = f"define linkonce_odr {result} @moec_{name}({words} %w0, {words} %w1, {words} %w2) alwaysinline {{"
    return [head, *("  " + line for line in body), "}"]

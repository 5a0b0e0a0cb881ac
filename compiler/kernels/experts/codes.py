"""How quantised expert weights lie in memory: panels of 32 columns as streams of bytes, scales beside their codes.

    panel    [channel scales, 32 x f32]? [block, ...]                       over the whole of K, contiguous
    block    [scales, 32 x bf16 or f32]? [zeros, 32 x u8]? [unit, ...]      the k of one group, at least one k step
    unit     64 bytes: 16 columns (one half of the panel), each with a 32-bit word

    for bf16 arithmetic (k step 32) a word is two 16-bit lanes, k even and k odd; a lane holds 16 / bits codes, and
        code j of it belongs to the j-th next pair of k. 3-bit codes come in three units for 32 k: 5 codes in each lane,
        and the sixteenth in the three highest bits.
    for int8 and int16 arithmetic (k step 64) a word is four bytes, four k; a byte holds 8 / bits codes, and code j of
        it belongs to the j-th next four k. 3-bit codes come in three units for 32 k: codes 2u and 2u + 1 in the six low
        bits of unit u's bytes, and codes 6 and 7 in the two high bits of all three. int16: the four k of a word are in
        the order 0, 2, 1, 3, so that even bytes are a pair of k and odd bytes the next one.

A group is at least 32 k where codes are in bytes and rows int16: a k step then has the codes of one or two groups.
Units of half 0 and 1 take turns. So one 64-byte load and one shift give what a vector product or a row of an AMX tile
wants, on every instruction set. Codes are stored without sign: what they mean is in `numbers` or follows from `offset`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moec.compiler.kernels.experts import packed_bf16
from moec.compiler.kernels.experts.layout import HALF, PANEL, interleave_gate_up, padded
from moec.passes.ir.formats import WeightFormat, parse_format
from moec.passes.ir.quantise import Parts

UNIT_BYTES = 64
BF16_STEP, INT8_STEP = 32, 64  # k of one row of an AMX tile
WORD_ORDER = [0, 2, 1, 3]  # k of the bytes of a word made for int16 activations
INT8_MOST, INT16_MOST = 127, 127 * 256 + 127  # of activations as integers; int16: both bytes have a sign


@dataclasses.dataclass(frozen=True)
class Codes:
    """The geometry of one stack of weights in a format.

    format: with one group size.  depth: K, unpadded.
    """

    format: WeightFormat
    depth: int

    @property
    def bits(self) -> int:
        """Of a stored code; ternary codes take 2."""
        return max(2, int(self.format.bits))

    @property
    def int8(self) -> bool:
        """Products of int8 activations and codes, else of bf16 activations."""
        return self.format.act == "int8"

    @property
    def split(self) -> bool:
        """Made for products with int16 activations, in two planes of bytes; see rounding.py."""
        narrow = self.bits < 8 and not self.int8 and self.group % BF16_STEP == 0
        return narrow and (self.format.kind == "int" or self._is_whole)

    @property
    def _is_whole(self) -> bool:
        """A codebook whose numbers are halves of integers of a byte."""
        twice = [2 * number for number in self.format.codebook]
        return bool(twice) and all(n == int(n) for n in twice) and max(twice) - min(twice) < 128

    @property
    def spacing(self) -> float:
        """What numbers are whole multiples of, where codes are made for products with integers."""
        return 0.5 if self.format.kind == "codebook" else 1.0

    @property
    def byte_offset(self) -> int:
        """What the bytes in products with integers are above numbers / spacing, where there are no zeros."""
        return -int(min(self.format.codebook) / self.spacing) if self._is_whole else self.offset

    @property
    def bytes(self) -> tuple[int, ...]:
        """What a code of a codebook is in products with integers."""
        return tuple(int(number / self.spacing) + self.byte_offset for number in self.format.codebook)

    def sums_fit(self, largest: int) -> bool:
        """Whether 32 bits hold a group's sum of products of numbers / spacing with integers of such a magnitude."""
        if self.has_zeros:
            return False
        highest = max(self.bytes) if self._is_whole else (1 << self.bits) - 1
        farthest = max(self.byte_offset, highest - self.byte_offset)
        return (self.group or self.padded_depth) * farthest * largest < 1 << 31

    @property
    def scales_exponents(self) -> bool:
        """Scales are powers of two for whole k steps of table entries, none of which is smaller than 2**-40 but 0."""
        small = self.bits < 8 and self.group and self.group % BF16_STEP == 0
        return bool(small) and self.format.kind == "codebook" and self.format.scale == "e8m0"

    @property
    def is_short(self) -> bool:
        """A k step of bytes has the codes of several groups."""
        return 0 < self.group < INT8_STEP

    @property
    def in_bytes(self) -> bool:
        """A word of codes is four k in bytes, else two k in 16-bit lanes."""
        return self.int8 or self.split

    @property
    def step(self) -> int:
        """k of a k step: what one round of units covers."""
        return INT8_STEP if self.in_bytes else BF16_STEP

    @property
    def tile_depth(self) -> int:
        """k of a row of an AMX tile where weights are multiplied as they are, or as numbers of bf16."""
        return INT8_STEP if self.int8 else BF16_STEP

    @property
    def group(self) -> int:
        """k that share a scale; 0: all."""
        return self.format.group if self.format.group < self.depth else 0

    @property
    def block(self) -> int:
        """k of a block."""
        return max(self.group, self.step)

    @property
    def groups_per_block(self) -> int:
        """Scale rows of a block."""
        return self.block // self.group if self.group else 0

    @property
    def padded_depth(self) -> int:
        """K in whole blocks."""
        return -(-self.depth // self.block) * self.block

    @property
    def num_groups(self) -> int:
        """Groups of K padded; 1 for channel scales."""
        return self.padded_depth // self.group if self.group else 1

    @property
    def unit_depth(self) -> int:
        """k that one unit covers (3-bit codes: three units together)."""
        if self.bits == 3:
            return BF16_STEP
        if self.is_packed:
            return packed_bf16.UNIT_DEPTH
        return (4 * 8 if self.in_bytes else 2 * 16) // self.bits

    @property
    def has_zeros(self) -> bool:
        """A zero beside each scale."""
        return not self.format.symmetric

    @property
    def offset(self) -> int:
        """What a stored code of a symmetric int format is above the number that it means."""
        if self.format.kind != "int" or self.has_zeros:
            return 0
        return 1 if self.format.bits < 2 else 1 << (self.bits - 1)

    @property
    def is_e4m3(self) -> bool:
        """Codes are the bits of 8-bit floats."""
        return self.format.kind == "float" and self.bits == 8

    @property
    def is_packed(self) -> bool:
        """Codes are bf16 numbers without loss; see packed_bf16.py."""
        return self.format.is_packed

    @property
    def numbers(self) -> tuple[float, ...]:
        """What each code means before zero and scale; of e4m3 nothing."""
        if self.format.kind == "codebook":
            return self.format.codebook
        if self.format.kind == "float":
            return ()
        return tuple(float(code - self.offset) for code in range(1 << self.bits))

    @property
    def scale_bytes(self) -> int:
        """Of a stored scale: bf16 holds bf16 and e8m0 scales exactly, f32 the others."""
        return 2 if self.group and self.format.scale in ("bf16", "e8m0") else 4

    @property
    def head_bytes(self) -> int:
        """Channel scales, and zeros, at the start of a panel."""
        if self.is_packed:
            return packed_bf16.head_bytes(self.depth)
        return 0 if self.group else PANEL * self.scale_bytes + (UNIT_BYTES if self.has_zeros else 0)

    @property
    def code_bytes(self) -> int:
        """Codes of a block."""
        return self.block * PANEL * self.bits // 8

    @property
    def block_head_bytes(self) -> int:
        """Scales and zeros of a block, before its codes."""
        return self.groups_per_block * PANEL * (self.scale_bytes + int(self.has_zeros))

    @property
    def block_bytes(self) -> int:
        """A block with its scales."""
        return self.block_head_bytes + self.code_bytes

    @property
    def panel_bytes(self) -> int:
        """A panel."""
        return self.head_bytes + self.padded_depth // self.block * self.block_bytes


def refusal(format: str, rows: int, depth: int, what: str) -> str | None:
    """Why a format of a stack [E, rows, depth] has no packed form, or None."""
    try:
        fitted = parse_format(format).fitted(depth, what)
    except ValueError as error:
        return str(error)
    if fitted.is_plain and not fitted.is_packed:
        return f"{what} in {format}: no codes"
    codes = Codes(fitted, depth)
    if not codes.in_bytes and codes.padded_depth != padded(depth):
        return f"{what} in {format}: {depth} values along K are no whole blocks of {codes.block}"
    if codes.bits == 3 and codes.group and codes.group % codes.unit_depth:
        return f"{what} in {format}: groups of {fitted.group} cut three units of {codes.unit_depth} codes; use int3-g32"
    if fitted.act == "int8" and fitted.group and fitted.group % INT8_STEP:
        return (
            f"{what} in {format}: groups of {fitted.group} cut an int8 tile of {INT8_STEP}; use g64, g128 or drop -a8"
        )
    return None


def of_format(name: str, depth: int) -> Codes:
    """The geometry for K = depth. Raises: FormatError."""
    return Codes(parse_format(name).fitted(depth), depth)


def pack_expert(parts: Parts, codes: Codes, gated: bool | None, out: Tensor) -> None:
    """One expert's parts (codes [N, K]) into out u8[panels, panel_bytes].

    gated: rows are gate and up halves that take turns in panels (True), plain rows of gate_up (False), or rows of the
    down projection (None).
    """
    if codes.is_packed:
        numbers = torch.nn.functional.pad(_in_order(parts.codes, gated), (0, codes.padded_depth - codes.depth))
        packed_bf16.pack(numbers, codes.depth, out)
        return
    stored = parts.codes.view(torch.uint8) if parts.codes.dtype == torch.int8 else parts.codes
    if codes.offset:
        stored = stored + codes.offset  # modulo 256: from two's complement to unsigned
    assert parts.scales is not None  # plain formats have no packed form (refusal)
    rows = stored.shape[0]
    scales = _in_order(_by_row(parts.scales, codes.format, rows), gated)  # [N, groups]
    stored = _in_order(stored, gated)
    panels = stored.shape[0] // PANEL
    stored = torch.nn.functional.pad(stored, (0, codes.padded_depth - codes.depth))
    form = (_bytes3 if codes.bits == 3 else _bytes) if codes.in_bytes else _lanes3 if codes.bits == 3 else _lanes
    units = form(stored, codes)
    units = units.reshape(panels, codes.padded_depth // codes.block, codes.code_bytes)
    missing = codes.num_groups - scales.shape[1]
    scales = torch.nn.functional.pad(scales, (0, missing))
    narrow = torch.bfloat16 if codes.scale_bytes == 2 else torch.float32
    heads = [_heads(scales.to(narrow), panels)]
    if parts.zeros is not None:
        zeros = torch.nn.functional.pad(_in_order(_by_row(parts.zeros, codes.format, rows), gated), (0, missing))
        heads.append(_heads(zeros, panels))
    _write(out, codes, heads, units)


def _write(out: Tensor, codes: Codes, heads: list[Tensor], units: Tensor) -> None:
    """heads: u8[panels, groups, bytes]; units: u8[panels, blocks, bytes]."""
    panels, blocks = units.shape[:2]
    if not codes.group:
        at = 0
        for head in heads:
            out[:, at : at + head.shape[2]] = head[:, 0]
            at += head.shape[2]
        out[:, at : codes.head_bytes] = 0
        out[:, codes.head_bytes :] = units.reshape(panels, -1)
        return
    target = out.view(panels, blocks, codes.block_bytes)
    at = 0
    for head in heads:
        size = head.shape[2] * codes.groups_per_block
        target[:, :, at : at + size] = head.reshape(panels, blocks, size)
        at += size
    target[:, :, at:] = units


def _by_row(grid: Tensor, format: WeightFormat, rows: int) -> Tensor:
    """Scales of blocks [a, b] -> of rows [N, b]."""
    height = format.block[0]
    if grid.shape[0] == rows and height == 1:
        return grid
    return grid.expand(rows, -1) if not height else grid.repeat_interleave(height, 0)[:rows]


def _in_order(rows: Tensor, gated: bool | None) -> Tensor:
    """Rows in panel order, padded with zeros: a scale of 0 silences a column that is not there."""
    if gated is not None:
        return interleave_gate_up(rows, gated)
    return torch.nn.functional.pad(rows, (0, 0, 0, padded(rows.shape[0]) - rows.shape[0]))


def _heads(grid: Tensor, panels: int) -> Tensor:
    """[N, groups] -> u8[panels, groups, 32 x itemsize]."""
    return grid.view(panels, PANEL, -1).transpose(1, 2).contiguous().view(torch.uint8)


def _lanes(stored: Tensor, codes: Codes) -> Tensor:
    """u8[N, K] -> u8[panels, bytes]: 16-bit lanes of 16 / bits codes."""
    n, k = stored.shape
    count = 16 // codes.bits
    parts = stored.view(n // PANEL, 2, HALF, k // (2 * count), count, 2)  # panel, half, column, unit, code, parity
    lanes = sum(parts[:, :, :, :, j].to(torch.int32) << (codes.bits * j) for j in range(count))
    return lanes.permute(0, 3, 1, 2, 4).to(torch.int16).contiguous().view(n // PANEL, -1).view(torch.uint8)  # type: ignore[union-attr]


def _lanes3(stored: Tensor, codes: Codes) -> Tensor:
    """As _lanes for 3 bits: lanes of 5 codes in three units, the sixteenth code in their highest bits."""
    n, k = stored.shape
    parts = stored.view(n // PANEL, 2, HALF, k // BF16_STEP, 16, 2).to(torch.int32)
    units = []
    for u in range(3):
        lanes = sum(parts[:, :, :, :, 5 * u + j] << (3 * j) for j in range(5))
        units.append(lanes | ((parts[:, :, :, :, 15] >> u & 1) << 15))
    whole = torch.stack(units, 0).permute(1, 4, 2, 0, 3, 5)  # panel, step, half, unit, column, parity
    return whole.to(torch.int16).contiguous().view(n // PANEL, -1).view(torch.uint8)


def _fours(stored: Tensor, codes: Codes, count: int) -> Tensor:
    """u8[N, K] -> [panel, half, column, unit, code, k]: the four k of each word in their order."""
    n, k = stored.shape
    parts = stored.view(n // PANEL, 2, HALF, k // (4 * count), count, 4)
    return parts[..., WORD_ORDER] if codes.split else parts


def _bytes(stored: Tensor, codes: Codes) -> Tensor:
    """u8[N, K] -> u8[panels, bytes]: bytes of 8 / bits codes, four k to a word."""
    count = 8 // codes.bits
    parts = _fours(stored, codes, count)
    packed = parts[:, :, :, :, 0].clone()
    for j in range(1, count):
        packed |= parts[:, :, :, :, j] << (codes.bits * j)
    return packed.permute(0, 3, 1, 2, 4).reshape(stored.shape[0] // PANEL, -1)


def _bytes3(stored: Tensor, codes: Codes) -> Tensor:
    """As _bytes for 3 bits: two codes in the low six bits of each of three units, two more in their high bits."""
    parts = _fours(stored, codes, 8)
    high = parts[:, :, :, :, 6] | parts[:, :, :, :, 7] << 3
    units = [
        parts[:, :, :, :, 2 * u] | parts[:, :, :, :, 2 * u + 1] << 3 | (high >> (2 * u) & 3) << 6 for u in range(3)
    ]
    whole = torch.stack(units, 0).permute(1, 4, 2, 0, 3, 5)  # panel, step, half, unit, column, k
    return whole.reshape(stored.shape[0] // PANEL, -1)

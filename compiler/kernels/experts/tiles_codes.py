"""What tiles over quantised weights share: the units of a k step, the scales of a group, and the sum over groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts import packed_bf16
from moec.compiler.kernels.experts.ahead import Ahead, further_on
from moec.compiler.kernels.experts.codes import UNIT_BYTES, Codes
from moec.compiler.kernels.experts.decode import Decoder
from moec.compiler.kernels.experts.layout import PANEL
from moec.compiler.kernels.experts.plan import Plan
from moec.compiler.kernels.experts.tiles import Result, Step
from moec.compiler.kernels.template import intrinsics as ins

AHEAD_BYTES = 4096  # between a load and its prefetch
PLANES_AHEAD_BYTES = 8192  # the same where rows are two planes on vector registers, beside AMX as above
TILES_AHEAD_BYTES = 8192  # the same where codes become tiles: their loads come two k steps before the products


@dataclasses.dataclass(frozen=True)
class UnitGroup:
    """Units that are decoded together.

    offset: bytes from the k step's first unit; stride: to the unit of the other half; loads: 64-byte units in a row;
    first: number of the first pair (of codes in bytes: of the first four) of k in the step.
    """

    offset: int
    stride: int
    loads: int
    first: int
    codes: tuple[tuple[int, int, int], ...]  # (k pair or four within the group, unit or -1 for all, code in the unit)


def unit_groups(codes: Codes, depth: int = 0) -> Iterator[UnitGroup]:
    """The units of one k step (or of its first `depth` k), in memory order of half 0."""
    depth = depth or codes.step
    if codes.bits == 3 and codes.in_bytes:
        fours = tuple((j, j // 2 if j < 6 else -1, j) for j in range(8))
        for n in range(depth // codes.unit_depth):
            yield UnitGroup(6 * n * UNIT_BYTES, 3 * UNIT_BYTES, 3, 8 * n, fours)
        return
    if codes.bits == 3:
        inner = tuple((5 * u + j, u, j) for u in range(3) for j in range(5))
        yield UnitGroup(0, 3 * UNIT_BYTES, 3, 0, (*inner, (15, -1, 5)))
        return
    if codes.is_packed:
        inner = tuple((j, -1, j) for j in range(packed_bf16.UNIT_PAIRS))
        for n in range(depth // codes.unit_depth):
            yield UnitGroup(6 * n * UNIT_BYTES, 3 * UNIT_BYTES, 3, packed_bf16.UNIT_PAIRS * n, inner)
        return
    count = (8 if codes.in_bytes else 16) // codes.bits
    for u in range(depth // codes.unit_depth):
        inner = tuple((j, 0, j) for j in range(count))
        yield UnitGroup(2 * u * UNIT_BYTES, UNIT_BYTES, 1, u * count, inner)


def load_units(w: Any, at: Any, group: UnitGroup, half: int, part: int, lanes: int) -> list[Any]:
    """The words of 16 (or from column `part` on, 8) columns of a half."""
    base = at + (group.offset + half * group.stride + 4 * part)
    return [T.Bind(ins.load_i32(T.address_of(w[0, 0, base + u * UNIT_BYTES]), lanes)) for u in range(group.loads)]


def decode_each(group: UnitGroup, words: list[Any], emit: Callable[[int, int, list[Any]], None]) -> None:
    """emit(pair or four of k in the step, code number, its words) for every code of a unit group."""
    for place, unit, j in group.codes:
        emit(group.first + place, j, words if unit < 0 else [words[unit]])


def block_ahead(step: Step, codes: Codes, num_blocks: Any, num_bytes: int = AHEAD_BYTES, locality: int = 2) -> Ahead:
    """What is prefetched while a block is worked on: what lies `num_bytes` further on, and a block at least."""
    return further_on(step, num_blocks, codes.block_bytes, max(1, num_bytes // codes.block_bytes), locality)


def prefetch(step: Step, at: Any, num_bytes: int, locality: int = 2) -> None:
    """Asks for the lines from a byte on."""
    for line in range(0, num_bytes, UNIT_BYTES):
        ins.prefetch(T.address_of(step.w[0, 0, at + line]), locality)


def prefetch_part(step: Step, at: Any, num_bytes: int, part: int, parts: int, locality: int = 2) -> None:
    """Asks for the lines of a part. Lines that are asked for one at a time between products come at the full rate of
    the memory; a run of them holds up the loads behind it until the last has a place in the queue."""
    lines = num_bytes // UNIT_BYTES
    first, last = (n * lines // parts * UNIT_BYTES for n in (part, part + 1))
    prefetch(step, at + first, last - first, locality)


def load_scales(step: Result, codes: Codes, at: Any, lanes: int) -> list[Any]:
    """f32 vectors of a group's 32 scales at a byte."""
    load = ins.load_bf16 if codes.scale_bytes == 2 else ins.load_f32
    return [T.Bind(load(T.address_of(step.w[0, 0, at + c * codes.scale_bytes]), lanes)) for c in range(0, PANEL, lanes)]


def load_zeros(
    step: Result, codes: Codes, scales_at: Any, lanes: int, group: int = 0, unsigned: bool = False
) -> list[Any] | None:
    """f32 vectors of a group's 32 zeros, what to subtract from its codes (unsigned: as stored); None: nothing."""
    if codes.has_zeros:
        scales = max(1, codes.groups_per_block) * PANEL * codes.scale_bytes
        at = scales_at + (scales + group * PANEL)
        return [T.Bind(ins.load_u8(T.address_of(step.w[0, 0, at + c]), lanes)) for c in range(0, PANEL, lanes)]
    if unsigned and codes.byte_offset:
        return [T.broadcast(T.float32(codes.byte_offset), lanes)] * (PANEL // lanes)
    return None


ADD_SCALED_TEXT = """
declare <{n} x float> @llvm.fma.v{n}f32(<{n} x float>, <{n} x float>, <{n} x float>)
define linkonce_odr i32 @moec_add_scaled_x{n}(ptr %to, <{n} x float> %value, <{n} x float> %scale) alwaysinline {{
  %before = load volatile <{n} x float>, ptr %to, align 4
  %after = call <{n} x float> @llvm.fma.v{n}f32(<{n} x float> %value, <{n} x float> %scale, <{n} x float> %before)
  store volatile <{n} x float> %after, ptr %to, align 4
  ret i32 0
}}
"""
"""Volatile, or LLVM keeps what it has stored for the next load: in registers that it then has to spill."""


class Flush:
    """Adds scale * (sum of code products - zero * sum of the row) of one group to a step's out.

    at: byte of the group's scales; group: its number in the step, for the rows' sums; unsigned: products are of codes
    as stored; shift: what the codes in the products are less than those; in_memory: `out` is read and written in every
    group (ADD_SCALED_TEXT), for tiles that need all registers for products.
    """

    def __init__(
        self,
        step: Result,
        codes: Codes,
        at: Any,
        group: Any,
        lanes: int,
        group_in_block: int = 0,
        unsigned: bool = False,
        shift: float = 0.0,
        in_memory: bool = False,
    ) -> None:
        self.lanes, self.step, self._in_memory = lanes, step, in_memory
        self._scales = load_scales(step, codes, at, lanes)
        block_at = at - group_in_block * PANEL * codes.scale_bytes
        self._zeros = load_zeros(step, codes, block_at, lanes, group_in_block, unsigned)
        if self._zeros is not None and shift:
            self._zeros = [T.Bind(z - T.broadcast(T.float32(shift), lanes)) for z in self._zeros]
            self._zeros = self._zeros if codes.has_zeros or codes.offset != shift else None
        group = T.Cast("int64", step.first_sum) + T.Cast("int64", group)
        self._sums_at = ins.let(T.Cast("int64", step.a_row) * step.num_sums + group)

    def row(self, r: Any, products: list[Any], first: bool) -> None:
        """products: f32 vectors of the row's 32 columns (None: columns not computed). first: out has nothing yet."""
        lanes = self.lanes
        total = self._total(r)
        for n, product in enumerate(products):
            if product is None:
                continue
            product = self._shifted(product, total, n)
            place = self.step.place(r, n * lanes, lanes)
            if first:
                T.buffer_store(self.step.out, product * self._scales[n], [place])
            elif self._in_memory:
                address = T.address_of(self.step.out[self.step.out_at + (r * PANEL + n * lanes)])
                name = f"moec_add_scaled_x{lanes}"
                T.evaluate(T.call_extern("int32", name, address, product, self._scales[n]))
            else:
                T.buffer_store(self.step.out, T.fma(product, self._scales[n], self.step.out[place]), [place])

    def value(self, r: Any, column: int, product: Any) -> Any:
        """What row() puts down first for a product whose first column is so."""
        n = column // self.lanes
        return self._shifted(product, self._total(r), n) * self._scales[n]

    def added(self, r: Any) -> Any:
        """What is added to a row's integers before they are f32 (Side.sum_factor), or None."""
        if not self.step.side.sum_factor:
            return None
        return T.Bind(T.broadcast(T.reinterpret("int32", self._sum(r)), self.lanes))

    def _total(self, r: Any) -> Any:
        return None if self._zeros is None else T.Bind(T.broadcast(self._sum(r), self.lanes))

    def _sum(self, r: Any) -> Any:
        return self.step.sums[self._sums_at + T.Cast("int64", r) * self.step.num_sums]

    def _shifted(self, product: Any, total: Any, n: int) -> Any:
        return product if self._zeros is None else product - total * self._zeros[n]


def keeps_integers(codes: Codes) -> bool:
    """Whether C can stay as integers until it is used: rows and codes are bytes, and a column has one scale."""
    return codes.int8 and codes.bits == 8 and not codes.group


def from_planes(planes: list[Any], lanes: int, added: Any = None) -> Any:
    """f32 of i32 products of int8 rows (one plane), or of the high and the low bytes of int16 rows.

    added: i32 vector; then the whole is an integer first, whose result fits although its parts may not.
    """
    if added is not None:
        high = [plane * T.broadcast(T.int32(256), lanes) for plane in planes[:-1]]
        return ins.from_i32(sum(high, planes[-1]) + added, lanes)
    wide = [ins.from_i32(plane, lanes) for plane in planes]
    return wide[0] if len(wide) == 1 else T.fma(wide[0], T.broadcast(T.float32(256), lanes), wide[1])


def decoders(plan: Plan, lanes: int, native: bool) -> dict[Codes, Decoder]:
    """The decoders of the stacks; two stacks in one format may differ in how it is fitted to their depth."""
    fields = ins.has_fields(plan.level)
    return {s.codes: Decoder(s.codes, lanes, native, fields) for s in (plan.up, plan.down) if s.codes}


def decoder_text(all_of: dict[Codes, Decoder]) -> str:
    """LLVM IR of several decoders, each function and each declaration once."""
    lines = "\n".join(dict.fromkeys(d.text() for d in all_of.values())).splitlines()
    declared = dict.fromkeys(line for line in lines if line.startswith("declare"))
    return "\n".join([*declared, *(line for line in lines if line not in declared), ""])

"""Grouped GEMMs whose weights are codes of 4 or 8 bits (codes.py): turned into bf16 in registers, for mma.sync.

Call: as gemm_mma.py, with w and w_scale as codes.pack gives them. Codes lie in memory as a warp wants them: a lane's
share of a unit is one vector, copied by cp.async through the ring and read from shared memory without conflicts. Codes
are whole numbers, exact in bf16, so the products of a group are exact up to their f32 sums; the scale multiplies the
group's sum. Every code is read once per block of rows.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.cuda.emit import Expr, Local, define, device, high_half, low_half, ptx, when
from moec.compiler.kernels.cuda.gemm_mma import COPY, KSTEPS, MMA, MmaGemm, emit
from moec.compiler.kernels.cuda.gemm_problem import UNIT_ROWS, GemmProblem, Tile

SCALES_PER_COPY = 8  # bf16 in 16 bytes

# 0x4300 is 128 in bf16, whose lowest bit counts 1: code + 128 is made by an OR, what is too much taken away by an FMA
_FMA = """
__device__ __forceinline__ unsigned moec_fma_bf16x2(unsigned a, unsigned b, unsigned c) {
  unsigned d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
"""
_CODES_4 = f"""{_FMA}
__device__ __forceinline__ unsigned moec_codes_4(unsigned word, int shift) {{
  return moec_fma_bf16x2(((word >> shift) & 0x000f000fu) | 0x43004300u, 0x3f803f80u, 0xc308c308u);
}}
"""
_CODES_8 = f"""{_FMA}
__device__ __forceinline__ unsigned moec_codes_8(unsigned word, int shift) {{
  unsigned low = ((word >> shift) & 0x007f007fu) | 0x43004300u, sign = ((word >> shift) & 0x00800080u) | 0x43004300u;
  return moec_fma_bf16x2(sign, 0xbf80bf80u, low);
}}
"""


def build(problem: GemmProblem, tile: Tile) -> Any:
    """The TIRx function; ask tile.refusal first."""
    return define(lambda: emit(problem, tile, CodesGemm))


class CodesGemm(MmaGemm):
    """The emitter of tiles from codes."""

    def __init__(self, problem: GemmProblem, tile: Tile, operands: Any, shared: Any) -> None:
        super().__init__(problem, tile, operands, shared)
        self.unit_bytes = problem.code_bits * 128
        self.scale_place = self.w_place + tile.weight_bytes(problem)

    def _weight_sources(self) -> None:
        """Where this thread's 16 bytes of each pass lie in the units of the tile's rows, as word offsets."""
        p, t, chunks = self.problem, self.tile, self.unit_bytes // 16
        self.w_passes = t.weight_bytes(p) // 16 // t.threads
        self.w_at = Local(self.w_passes, "int64", "w_at")
        units = self.out // UNIT_ROWS  # of a half
        for i in range(self.w_passes):
            chunk = T.Bind(self.thread + i * t.threads)
            unit = chunk // chunks
            row = unit // units * (p.columns // UNIT_ROWS) + self.column // UNIT_ROWS + unit % units
            place = T.Cast("int64", self.expert) * (p.weight_rows // UNIT_ROWS) + T.Cast("int64", row)
            self.w_at[i] = place * (p.steps * self.unit_bytes // 4) + T.Cast("int64", chunk % chunks * 4)

    def _copy_weights(self, base: Expr, step: Expr) -> None:
        t, operands = self.tile, self.operands
        offset = T.Bind(T.Cast("int64", step * (self.unit_bytes // 4)))
        for i in range(self.w_passes):
            to = self.shared.ptr_to([base + self.w_place + (self.thread + i * t.threads) * 16])
            ptx(COPY, to, operands.w.ptr_to([0, 0, 0, self.w_at[i] + offset]), 16)
        if self.problem.group:
            self._copy_scales(base, step)

    def _copy_scales(self, base: Expr, step: Expr) -> None:
        """The scales of the step's groups for the tile's weight rows: [scale rows, columns] of bf16."""
        p, t = self.problem, self.tile
        row_copies, half_copies = t.columns // SCALES_PER_COPY, self.out // SCALES_PER_COPY
        copies = p.scale_rows * row_copies
        for first in range(0, copies, t.threads):
            at = T.Bind(self.thread + first)
            local = at % row_copies
            row = T.Bind(step * 64 // p.group + at // row_copies)
            column = local // half_copies * p.columns + self.column + local % half_copies * SCALES_PER_COPY
            with when(at < copies):
                to = self.shared.ptr_to([base + self.scale_place + at * 16])
                ptx(COPY, to, self.operands.w_scale.ptr_to([self.expert, row, column]), 16)

    def _fragments(self) -> None:
        self.a = Local(KSTEPS * self.m_tiles * 4, "uint32", "a")
        self.b = Local(2, "uint32", "b")
        self.words = Local(4, "uint32", "words")
        self.sums = Local(self.m_tiles * 4, name="sums")

    def _step(self, base: Expr) -> None:
        for k in range(KSTEPS):
            self._load_x(base, k, k * self.m_tiles * 4)
        pairs = self.n_tiles // 2
        for h in range(self.halves):
            for pair in range(pairs):
                unit = h * (self.out // UNIT_ROWS) + self.warp % self.tile.warps_n * pairs + pair
                place = T.Bind(base + self.w_place + unit * self.unit_bytes + self.lane * 16)
                for row_half in range(2):
                    if row_half == 0 or self.problem.code_bits == 8:
                        self._load_words(place + row_half * 512)
                    self._columns(base, h, pair * 2 + row_half)

    def _load_words(self, place: Expr) -> None:
        ptx("ld.shared.v4.b32", *[self.words[i] for i in range(4)], self.shared.ptr_to([place]))

    def _columns(self, base: Expr, h: int, n: int) -> None:
        """The products of 8 weight rows with all rows of x, group by group."""
        p = self.problem
        if not p.group:
            for k in range(KSTEPS):
                self._make_b(n % 2, k)
                for m in range(self.m_tiles):
                    acc = [self.acc[self._at(h, m, n) + i] for i in range(4)]
                    self._product(m, k, acc, acc)
            return
        per_row = KSTEPS // p.scale_rows
        for row in range(p.scale_rows):
            for k in range(row * per_row, (row + 1) * per_row):
                self._make_b(n % 2, k)
                for m in range(self.m_tiles):
                    sums = [self.sums[m * 4 + i] for i in range(4)]
                    self._product(m, k, sums, [T.float32(0)] * 4 if k == row * per_row else sums)
            self._add_scaled(base, h, n, row)

    def _product(self, m: int, k: int, to: list[Expr], start: list[Expr]) -> None:
        a = [self.a[(k * self.m_tiles + m) * 4 + i] for i in range(4)]
        ptx(MMA["bfloat16"], *to, *a, self.b[0], self.b[1], *start)

    def _make_b(self, row_half: int, k: int) -> None:
        """The fragment of 8 weight rows and the k-th 16 of K."""
        four = self.problem.code_bits == 4
        word = self.words[row_half * 2 + k // 2] if four else self.words[k]
        for r in range(2):
            shift = 4 * (k % 2 * 2 + r) if four else 8 * r
            name, source = ("moec_codes_4", _CODES_4) if four else ("moec_codes_8", _CODES_8)
            self.b[r] = device(name, "uint32", source, word, T.int32(shift))

    def _add_scaled(self, base: Expr, h: int, n: int, row: int) -> None:
        """acc += sums * scale; a lane's sums belong to two neighbouring weight rows."""
        column = h * self.out + self.warp % self.tile.warps_n * (self.n_tiles * 8) + n * 8 + self.lane % 4 * 2
        pair = Local(1, "uint32", "scale_pair")
        place = base + self.scale_place + row * (self.tile.columns * 2) + column * 2
        ptx("ld.shared.b32", pair[0], self.shared.ptr_to([place]))
        scales = T.Bind(low_half(pair[0])), T.Bind(high_half(pair[0]))
        for m in range(self.m_tiles):
            for i in range(4):
                at = self._at(h, m, n) + i
                self.acc[at] = self.acc[at] + self.sums[m * 4 + i] * scales[i % 2]

"""The sizes that an experts kernel chooses for its instruction set; tuning may choose others (knobs.py)."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Blocking:
    """What a kernel chooses for its instruction set.

    block_rows   rows that lie together in packed rows ([k block][row][32])
    step_rows    rows that one tile call computes; a multiple of block_rows
    wide_rows    packed rows are f32 (else bf16)
    l2_bytes     how much of a core's second-level cache a block of rows may fill
    task_bytes   weights that one gate_up task streams
    chunk_bytes  how much of the cache four panels of a chunk of the down GEMM's k may fill
    down_panels  panels of a down task; 0: 16, fewer where threads would have less than two tasks each
    ahead_blocks k blocks between a weight's load and its prefetch, where a panel is read once (plain weights)
    ahead_few    the same at most, of steps of 1, 2, .. rows on vector registers
    ahead_level  cache that prefetches bring weights to: 2 or 1 (AMX, plain weights)
    locality_once  of prefetches of weights that one step on vector registers reads (intrinsics.prefetch): 0, past the
                 second-level cache, whose lines are still to be read; or 2
    locality_full  the same of a step of step_rows rows, which another may follow over the same weights
    even_rows    the parts that rows are cut into differ by less than block_rows, instead of a last one that is short
    even_blocks  on vector registers, where a step is a block: those of a segment differ by one row at most
    share_rows   rows from which such a step shares the next panel with the others over its own (ahead.py): of even
                 blocks, half a block; all of one where products take so long that it does not matter, as it doubles
                 the code; 0: none does
    threads      most threads; 0: all of the pool
    split_rows   tile unit: rows of an expert up to which activations are int16 where the format has planes; 0: always
    split_rows_short, split_rows_exponents  the same for formats whose groups are shorter than a k step of bytes, and
                 for those whose scales can be added to exponents of bf16

    The layout of packed weights depends on none of them.
    """

    block_rows: int
    step_rows: int
    wide_rows: bool
    l2_bytes: int
    chunk_bytes: int
    task_bytes: int = 1 << 20
    down_panels: int = 0
    ahead_blocks: int = 2
    ahead_few: tuple[int, ...] = ()
    ahead_level: int = 2
    locality_once: int = 2
    locality_full: int = 2
    even_rows: bool = False
    even_blocks: bool = False
    share_rows: int = 0
    threads: int = 0
    split_rows: int = 0
    split_rows_short: int = 0
    split_rows_exponents: int = 0

    def distance(self, rows: int) -> int:
        """Of the prefetches of a step of so many rows on vector registers: k blocks."""
        return min((self.ahead_blocks, *self.ahead_few[rows - 1 : rows]))

    def locality(self, rows: int) -> int:
        """Of the same prefetches: where to (intrinsics.prefetch)."""
        return self.locality_full if rows == self.step_rows else self.locality_once

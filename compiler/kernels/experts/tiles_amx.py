"""AMX bf16 tiles: up to 48 rows times a panel, as 1 to 3 x 2 tiles; exact row counts up to 32 (1 row: 1/16 of a tile).

Tiles 0..3 hold C (rows 0-15 and 16-31, column halves 0 and 1), 4 and 5 the rows, 6 and 7 the panel's halves; with more
rows 0..5 hold C. Loads come first and prefetches go between the products: measured 8 % faster at 512 tokens than loads
between products.
"""

from __future__ import annotations

from typing import Any, ClassVar

from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts.layout import PANEL, TILE_ROWS
from moec.compiler.kernels.experts.plan import Plan
from moec.compiler.kernels.experts.tiles import Result, Step
from moec.compiler.kernels.template import intrinsics as ins
from moec.compiler.kernels.template.flow import Scalar, switch, when

_LINE_ELEMENTS = 32  # bf16 in a cache line
_LINES_PER_BLOCK = 32  # of a panel's k block: two 1 KiB tiles
_UNIFORM = 64  # added to a row count that all tiles have
_SHORT = 128  # and to that of products of half as many k
_ALL, _HALF, _QUARTER, _NONE = 32, 16, 8, 0  # cache lines prefetched per k block
_BLOCK = PANEL * _LINE_ELEMENTS  # elements of a k block of a panel
_ALONE_AHEAD, _SECOND_LEVEL = 3 * _BLOCK // 2, 2  # of steps of one block of rows: 3 KiB, as the processor counts levels


class TileConfig:
    """A thread's tile configuration: palette 1, 64-byte rows, 16 rows for the weights, exact counts for the rows."""

    def __init__(self) -> None:
        self._config = T.alloc_buffer((64,), "uint8", align=64)
        self._rows = Scalar("int32", 0)
        with T.serial(64) as i:
            T.buffer_store(self._config, T.uint8(0), [i])
        T.buffer_store(self._config, T.uint8(1), [0])
        for tile in range(8):
            T.buffer_store(self._config, T.uint8(64), [16 + 2 * tile])
            T.buffer_store(self._config, T.uint8(TILE_ROWS), [48 + tile])

    def rows(self, rows: Any) -> None:
        """From here on a step has so many rows, 1 to 48."""
        when(self._rows.value != rows, lambda: self._load(rows))

    def all_rows(self, rows: Any, short: bool = False) -> None:
        """From here on every tile but the weights' has so many rows, 1 to 16.

        short: products have half the usual k: rows of tiles 4 and 5 are 32 bytes, the weights' tiles have 8 rows.
        """
        key = rows + (_SHORT if short else _UNIFORM)
        tiles = [(tile, T.Cast("uint8", rows)) for tile in range(6)]
        when(self._rows.value != key, lambda: self._load_tiles(tiles, key, short))

    def _load(self, rows: Any) -> None:
        # with three blocks one tile serves all: rows beyond the last are read and multiplied, and nobody looks at them
        full = rows > 2 * TILE_ROWS
        low = T.Bind(T.Cast("uint8", T.min(rows, TILE_ROWS)))
        high = T.Bind(T.Cast("uint8", T.Select(full, T.int32(TILE_ROWS), T.max(rows - TILE_ROWS, 1))))
        self._load_tiles([(0, low), (1, low), (2, high), (3, high), (4, low), (5, high)], rows)

    def _load_tiles(self, tiles: list[tuple[int, Any]], key: Any, short: bool = False) -> None:
        for tile, num in tiles:
            T.buffer_store(self._config, num, [48 + tile])
        for tile in (4, 5):
            T.buffer_store(self._config, T.uint8(32 if short else 64), [16 + 2 * tile])
        for tile in (6, 7):
            T.buffer_store(self._config, T.uint8(TILE_ROWS // 2 if short else TILE_ROWS), [48 + tile])
        ins.tile_config(T.address_of(self._config[0]))
        self._rows.set(key)


class RowBlocks:
    """Addresses of the packed rows of a step: up to three blocks of 16, [k step][row][depth elements]."""

    def __init__(self, step: Step, depth: int, blocks: int) -> None:
        self.blocks, self._a = blocks, step.a
        self._at, self._stride = [], []
        for n in range(blocks):
            left = step.rows - n * TILE_ROWS
            rows = ins.let(T.Cast("int64", T.min(left, TILE_ROWS) if n + 1 == blocks else TILE_ROWS))
            at = T.Cast("int64", step.a_row + n * TILE_ROWS) * step.a_depth + step.k_start * rows
            self._at.append(ins.let(at))
            self._stride.append(ins.let(rows * depth))

    def at(self, n: int, k: Any) -> Any:
        """Block n at the k-th step."""
        return T.address_of(self._a[self._at[n] + k * self._stride[n]])


def multiply(rows: RowBlocks, k: Any, weights: Any, stride: Any, dot: Any, fetch: Any) -> None:
    """C (tiles 0 to 2 * blocks - 1) += rows x the two weight tiles of one k step.

    weights: half -> address; stride: of the weight tiles' rows; fetch(part, parts) goes between the products. With
    three blocks one tile is left for rows and one for weights, but what is loaded again comes from the first-level
    cache, and the weights come from the second only once for 48 rows.
    """
    if rows.blocks < 3:
        ins.tile_load(4, rows.at(0, k), T.int64(64))
        ins.tile_load(6, weights(0), stride)
        ins.tile_load(7, weights(1), stride)
        if rows.blocks == 2:
            ins.tile_load(5, rows.at(1, k), T.int64(64))
        order = [(2 * n + half, 4 + n, 6 + half) for n in range(rows.blocks) for half in range(2)]
        for part, product in enumerate(order):
            dot(*product)
            fetch(part, len(order))
        return
    for half, order3 in enumerate(((0, 1, 2), (2, 1, 0))):
        ins.tile_load(7, weights(half), stride)
        for place, n in enumerate(order3):
            if half == 0 or place:
                ins.tile_load(6, rows.at(n, k), T.int64(64))
            dot(2 * n + half, 6, 7)
            fetch(3 * half + place, 6)


def store_tiles(target: Any, at: Any, blocks: int) -> None:
    """C -> target from element `at` on, rows of 32."""
    for tile in range(2 * blocks):
        place = (tile // 2) * TILE_ROWS * PANEL + (tile % 2) * 16
        ins.tile_store(tile, T.address_of(target[at + place]), T.int64(PANEL * 4))


class AmxTiles:
    """Tiles on the AMX unit; see moec.compiler.kernels.experts.tiles."""

    between: ClassVar[bool] = True

    def __init__(self, plan: Plan) -> None:
        self._ahead_blocks = plan.blocking.ahead_blocks
        self._locality = 4 - plan.blocking.ahead_level  # as the processor's intrinsic counts: 3 the first level

    def text(self, plan: Plan) -> str:
        """Nothing of its own."""
        return ""

    def begin(self) -> None:
        """Tile configuration."""
        self._config = TileConfig()

    def end(self) -> None:
        """Leaves the tile unit in its initial state."""
        ins.tile_release()

    def value(self, result: Result, row: Any, column: int, lanes: int) -> Any:
        """As it lies."""
        return result.out[result.place(row, column, lanes)]

    def step(self, step: Step) -> None:
        """One step of 1 to 48 rows."""
        self._config.rows(step.rows)
        lines = ins.let(T.Select(step.count == 1, _ALL, T.Select(step.count < 4, _HALF, _QUARTER)))
        lines = ins.let(T.Select(step.index * lines < _LINES_PER_BLOCK, lines, _NONE))
        usual = [_ALL, _HALF, _QUARTER, _NONE]
        several = [_HALF, _QUARTER, _ALL, _NONE]
        when(
            step.rows > 2 * TILE_ROWS,
            lambda: switch(lines, several, lambda q: self._block(step, 3, q)),
            lambda: when(
                step.rows > TILE_ROWS,
                lambda: switch(lines, several, lambda q: self._block(step, 2, q)),
                lambda: switch(lines, usual, lambda q: step.each_panel(lambda one: self._block(one, 1, q))),
            ),
        )

    def _block(self, step: Step, blocks: int, lines: int) -> None:
        """A step of 1 to 3 blocks of 16 rows; `lines` cache lines prefetched per k block."""
        rows = RowBlocks(step, PANEL, blocks)
        alone = blocks == 1 and lines == _ALL
        locality = _SECOND_LEVEL if alone else self._locality
        for tile in range(2 * blocks):
            ins.tile_zero(tile)
        ahead = self._ahead(step, lines, _ALONE_AHEAD if alone else self._ahead_blocks * _BLOCK)
        with T.serial(step.k_blocks) as kt:
            k = ins.let(T.Cast("int64", kt))
            base = ins.let(ahead(kt))

            def fetch(part: int, parts: int, base: Any = base) -> None:
                for i in range(part * lines // parts, (part + 1) * lines // parts):
                    ins.prefetch(T.address_of(step.w[0, 0, base + i * _LINE_ELEMENTS]), locality)

            def weights(half: int, k: Any = k) -> Any:
                return T.address_of(step.w[0, 0, step.w_at + k * _BLOCK + half * (_BLOCK // 2)])

            multiply(rows, k, weights, T.int64(64), ins.tile_dot_bf16, fetch)
            step.waiting.share(PANEL)
        store_tiles(step.out, step.out_at, blocks)

    def _ahead(self, step: Step, lines: int, elements: int) -> Any:
        """k block -> element offset of the first line to prefetch in it. elements: how far ahead.

        One step per panel: a few k blocks ahead, at the panel's end into the next panel. Several: each step fetches its
        share of the next panel.
        """
        if lines == _ALL:
            near = ins.let(step.w_at + elements)
            beyond = ins.let(step.next_at + elements - T.Cast("int64", step.k_blocks) * _BLOCK)
            bound = ins.let(T.Cast("int32", step.k_blocks) - elements // _BLOCK)
            return lambda kt: T.Select(kt < bound, near, beyond) + T.Cast("int64", kt) * _BLOCK
        size = lines * _LINE_ELEMENTS
        share = ins.let(step.next_at + T.Cast("int64", step.index * step.k_blocks) * size)
        return lambda kt: share + T.Cast("int64", kt) * size

"""One problem of a bundle on a GPU: its buffers, its candidates, the check of results and paired times.

gate_up gives h bf16[S,F]; down gives y bf16[T,H], the weighted sum of its rows included: more parts cost their sum.
"""

from __future__ import annotations

import array
import ctypes
import math
import random
import statistics as plain_statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moec.compiler.tune.runner.data import Block, Routing, dot, float_of, route
from moec.compiler.tune.runner.device import Device
from moec.compiler.tune.statistics import paired_ratio
from moec.runtime.launch.driver import CubinKernel, encode_map

SAMPLES = 48
RELATIVE, OF_RMS = 0.02, 0.02
"""A result may differ by 2 % of itself and 2 % of the results' root mean square: bfloat16 keeps 8 bits, h or partial
sums are rounded once more, and sums come in another order. A wrong tile is off by the rms itself."""
NAN_WORDS = 0xFFFFFFFF
PAIRS, WARM = 12, 2
ROUTE_WEIGHT = 0.5


class Task:
    """entry: a problem of the manifest (op sizes, mode, tokens, log_use). folder: where the cubins are."""

    def __init__(self, device: Device, folder: Path, files: Mapping[str, Any], entry: Mapping[str, Any]) -> None:
        self.device, self.folder, self.files, self.entry = device, folder, files, entry
        sizes = self.sizes = entry["sizes"]
        self.tokens, self.gate_up = entry["tokens"], entry["mode"] == "gate_up"
        self.routing: Routing = route(sizes, self.tokens, entry["log_use"], seed=0)
        self.slots, self.stacked = len(self.routing.slot_order), sizes["E"] + sizes["S"]
        self.depth, self.columns = (sizes["H"], sizes["F"]) if self.gate_up else (sizes["F"], sizes["H"])
        self.weight_rows = self.columns * (2 if self.gate_up else 1)
        self.x, self.w = Block(0.5, 1), Block(self.depth**-0.5, 2)
        self.buffers = self._allocate()
        self._tiles: dict[int, tuple[int, int, int]] = {}
        self._maps: list[Any] = []
        self.expected = self._expected()

    def _allocate(self) -> dict[str, tuple[int, int, int, str]]:
        """Name -> address, rows, width, dtype of what kernels may be bound to."""
        d, depth = self.device, self.depth
        x_rows = self.tokens if self.gate_up else self.slots
        parts = self.slots * 4 if not self.gate_up else 0  # as many splits as the space has
        made = {
            "x": (d.repeat(self.x.bits, x_rows * depth), x_rows, depth, "bfloat16"),
            "w": (
                d.repeat(self.w.bits, self.stacked * self.weight_rows * depth),
                self.stacked * self.weight_rows, depth, "bfloat16",
            ),
            "x_sorted": (d.allocate(2 * self.slots * depth if self.gate_up else 0), self.slots, depth, "bfloat16"),
            "h": (d.allocate(2 * self.slots * self.columns), self.slots, self.columns, "bfloat16"),
            "part": (d.allocate(4 * parts * self.columns), parts, self.columns, "float32"),
            "y": (d.allocate(2 * self.tokens * self.columns), self.tokens, self.columns, "bfloat16"),
            "slot_order": (d.integers(self.routing.slot_order), self.slots, 1, "int32"),
            "expert_start": (d.integers(self.routing.expert_start), self.stacked + 1, 1, "int32"),
            "experts": (d.integers([e for row in self.routing.experts for e in row]), self.tokens, 1, "int32"),
        }  # fmt: skip
        weights = array.array("f", [ROUTE_WEIGHT]) * (self.tokens * self.sizes["K"])
        return made | {"weights": (d.upload(weights), self.tokens, self.sizes["K"], "float32")}

    def _samples(self) -> list[tuple[int, int]]:
        """(row, column) of results to check: ends of experts, of rows, and random ones."""
        rng, rows = random.Random(3), self.slots if self.gate_up else self.tokens
        starts = [s for s in self.routing.expert_start if 0 < s < self.slots] if self.gate_up else []
        edges = [0, rows - 1, *starts[: SAMPLES // 4], *(s - 1 for s in starts[: SAMPLES // 4])]
        picked = [(row, rng.randrange(self.columns)) for row in edges]
        picked += [(rng.randrange(rows), column) for column in (0, self.columns - 1)]
        while len(picked) < SAMPLES:
            picked.append((rng.randrange(rows), rng.randrange(self.columns)))
        return picked

    def _expected(self) -> list[tuple[int, float]]:
        """(index of the result, value in float64) of the samples."""
        value = self._of_gate_up if self.gate_up else self._of_down
        return [(row * self.columns + column, value(row, column)) for row, column in self._samples()]

    def _expert_of(self, row: int) -> int:
        return next(e for e, end in enumerate(self.routing.expert_start[1:]) if row < end)

    def _w_row(self, expert: int, row: int) -> Sequence[float]:
        return self.w.row((expert * self.weight_rows + row) * self.depth, self.depth)

    def _of_gate_up(self, row: int, column: int) -> float:
        token = self.routing.slot_order[row] // (self.sizes["K"] + self.sizes["S"])
        x, expert = self.x.row(token * self.depth, self.depth), self._expert_of(row)
        gate, up = dot(x, self._w_row(expert, column)), dot(x, self._w_row(expert, self.columns + column))
        return gate / (1 + math.exp(-gate)) * up

    def _of_down(self, token: int, column: int) -> float:
        total, per_token = 0.0, self.sizes["K"] + self.sizes["S"]
        for k in range(per_token):
            row = self.routing.row_of_slot[token * per_token + k]
            sum_ = dot(self.x.row(row * self.depth, self.depth), self._w_row(self._expert_of(row), column))
            total += sum_ * (ROUTE_WEIGHT if k < self.sizes["K"] else 1.0)
        return total

    def load(self, candidate: Mapping[str, Any]) -> Callable[[], None]:
        """The candidate's launches, one after the other. Raises: CudaError."""
        steps = [self._launch(kernel, candidate["tile_rows"]) for kernel in candidate["kernels"]]

        def run() -> None:
            for kernel, arguments, grid in steps:
                kernel.start(arguments, grid, None)

        return run

    def _launch(self, entry: Mapping[str, Any], tile_rows: int) -> tuple[CubinKernel, list[Any], list[int]]:
        launch = self.files[entry["file"]]["launch"]
        kernel = CubinKernel.load(self.device.driver, (self.folder / entry["file"]).read_bytes(), launch)
        tile_expert, tile_row, tiles = self._tile_map(tile_rows)
        bound = {name: self.buffers[buffer] for name, buffer in entry["binds"].items()}
        bound |= {"tile_expert": (tile_expert, tiles, 1, "int32"), "tile_row": (tile_row, tiles, 1, "int32")}
        values = {"n": self.tokens, "slots": self.slots, "rows": self.slots, "tiles": tiles}
        values |= {"blocks": self.device.multiprocessors, "x_rows": bound["x"][1] if "x" in bound else 0}
        grid = kernel.grid(values)
        arguments = [self._argument(p, bound, values) for p in launch["parameters"]]
        return kernel, arguments, grid or [1, 1, 1]

    def _tile_map(self, tile_rows: int) -> tuple[int, int, int]:
        if tile_rows not in self._tiles:
            experts, rows = self.routing.tiles(tile_rows)
            self._tiles[tile_rows] = (self.device.integers(experts), self.device.integers(rows), len(experts))
        return self._tiles[tile_rows]

    def _argument(self, parameter: Mapping[str, Any], bound: Mapping[str, Any], values: Mapping[str, int]) -> Any:
        if parameter["kind"] == "int":
            return ctypes.c_int(values[parameter["name"]])
        if parameter["kind"] == "map":
            address, rows, width, dtype = bound[parameter["box"]["tensor"]]
            made = encode_map(self.device.driver, address, dtype, width, rows, 2, parameter["box"])
            self._maps.append(made)
            return made
        return ctypes.c_uint64(bound[parameter["name"]][0])

    def check(self, run: Callable[[], None]) -> str:
        """What is wrong with the candidate's results, or "". Raises: CudaError."""
        result, rows, _, _ = self.buffers["h" if self.gate_up else "y"]
        self.device.fill(result, 2 * rows * self.columns, NAN_WORDS)
        if not self.gate_up:
            part, part_rows, _, _ = self.buffers["part"]
            self.device.fill(part, 4 * part_rows * self.columns, NAN_WORDS)
        run()
        self.device.wait()
        rms = math.sqrt(sum(v * v for _, v in self.expected) / len(self.expected))
        for index, want in self.expected:
            got = float_of(self.device.read_bf16(result, index))
            if not abs(got - want) <= RELATIVE * abs(want) + OF_RMS * rms:
                place = f"row {index // self.columns}, column {index % self.columns}"
                return f"{place}: {got:.4g}, expected {want:.4g}"
        return ""

    def measure(self, run: Callable[[], None], incumbent: Callable[[], None] | None) -> dict[str, Any]:
        """Paired times: median_us, ratio with its bound, samples; without an incumbent it is its own."""
        for _ in range(WARM):
            self.device.time_us(run)
        if incumbent is None:
            times = [self.device.time_us(run) for _ in range(PAIRS)]
            return {"median_us": plain_statistics.median(times), "ratio": 1.0, "samples": PAIRS}
        pairs = []
        for i in range(PAIRS):
            if i % 2:
                own = self.device.time_us(run)
                pairs.append((own, self.device.time_us(incumbent)))
            else:
                other = self.device.time_us(incumbent)
                pairs.append((self.device.time_us(run), other))
        ratio = paired_ratio(pairs)
        told = {"median_us": plain_statistics.median(own for own, _ in pairs), "ratio": ratio.median}
        return told | {"ratio_low": ratio.low or None, "ratio_high": ratio.high, "samples": PAIRS}

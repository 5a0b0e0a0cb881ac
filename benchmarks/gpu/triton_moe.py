"""A fused MoE layer in Triton, what most serving stacks run: two grouped GEMMs over tiles of rows of one expert.

Written for this benchmark, after the scheme of vLLM's fused_moe (sorted slots, a map of tiles, weights by tile), with a
tuning of its own: tuned() times CONFIGS and keeps the fastest for a layer and a number of tokens. Gate and up are one
loop over x, so that it is read once. Without a GPU the kernels run in Triton's interpreter, which multiplies no bf16:
tests/benchmarks/test_triton_moe.py compares them in float32 with float64, where Triton is installed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from layer import Layer
from torch import Tensor
from triton.runtime.errors import OutOfResources


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile: rows x columns x depth. warps, stages: as Triton has them."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


FEW = (Config(16, 64, 128, 4, 4), Config(16, 128, 64, 4, 4), Config(16, 64, 64, 4, 5), Config(16, 32, 256, 4, 3))
MANY = (Config(64, 128, 64, 4, 4), Config(128, 128, 64, 8, 3), Config(128, 64, 64, 8, 4), Config(64, 64, 64, 4, 4))
CONFIGS = {True: FEW, False: MANY}
FEW_ROWS = 16  # of an expert, on the average: the tiles of FEW hold them


@triton.jit
def _rows(tile_row, ends, order, expert, ROWS: tl.constexpr):
    """Of this tile: its sorted rows, which of them are the expert's, and their slots."""
    row = tl.load(tile_row + tl.program_id(0)) + tl.arange(0, ROWS)
    held = row < tl.load(ends + expert)
    return row.to(tl.int64), held, tl.load(order + row, mask=held, other=0).to(tl.int64)


@triton.jit
def _products(
    x, w, x_row, w_row, second, held, depth,
    PAIR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Rows of x times rows of w; with PAIR also times the rows that lie `second` further on."""
    k = tl.arange(0, DEPTH)
    x_at = x + x_row[:, None] * depth + k[None, :]
    w_at = w + w_row[None, :] * depth + k[:, None]
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    others = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for at in range(0, depth, DEPTH):
        a = tl.load(x_at + at, mask=held[:, None], other=0.0)
        sums = tl.dot(a, tl.load(w_at + at), sums)
        if PAIR:
            others = tl.dot(a, tl.load(w_at + second * depth + at), others)
    return sums, others


@triton.jit
def _gemm(
    x, w, y, order, tile_expert, tile_row, ends, weights, slots_per_token, width, depth,
    GATE_UP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of h [S, width], sorted, from x of tokens; or of the weighted rows of slots [S, width] from h."""
    expert = tl.load(tile_expert + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    row, held, slot = _rows(tile_row, ends, order, expert, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if GATE_UP:
        w_row = expert * 2 * width + column
        gate, up = _products(x, w, slot // slots_per_token, w_row, width, held, depth, True, ROWS, COLUMNS, DEPTH)
        made, to = gate * tl.sigmoid(gate) * up, row
    else:
        sums, _ = _products(x, w, row, expert * width + column, 0, held, depth, False, ROWS, COLUMNS, DEPTH)
        made, to = sums * tl.load(weights + slot, mask=held, other=0.0)[:, None], slot
    tl.store(y + to[:, None] * width + column[None, :], made.to(y.dtype.element_ty), mask=held[:, None])


def tile_map(counts: Tensor, rows: int, slots: int) -> tuple[Tensor, Tensor]:
    """Slots per expert -> the expert and the first row of each tile, -1 for tiles with nothing to do; no waiting."""
    tiles = (counts + rows - 1) // rows
    ends = tiles.cumsum(0)
    number = torch.arange(slots // rows + len(counts), device=counts.device)
    expert = torch.searchsorted(ends, number, right=True)
    safe = expert.clamp(max=len(counts) - 1)
    first = counts.cumsum(0)[safe] - counts[safe] + (number - ends[safe] + tiles[safe]) * rows
    none = torch.full_like(expert, -1)
    return torch.where(expert < len(counts), expert, none).int(), first.int()


def step_of(layer: Layer, config: Config) -> Callable[[], Tensor]:
    """The layer's step with one configuration: routing in torch, both GEMMs, the sum over a token's slots."""
    shape, n, device = layer.shape, layer.num_tokens, layer.x.device
    h = torch.empty(layer.slots, shape["inner"], dtype=layer.x.dtype, device=device)
    part = torch.zeros(layer.slots, shape["hidden"], dtype=layer.x.dtype, device=device)
    tile = {"ROWS": config.rows, "COLUMNS": config.columns, "DEPTH": config.depth}
    tile |= {"num_warps": config.warps, "num_stages": config.stages}

    def step() -> Tensor:
        experts, weights = layer.slot_experts_and_weights()
        order = torch.sort(experts, stable=True).indices.int()
        counts = layer.slots_of_experts(experts)
        ends = counts.cumsum(0).int()
        tile_expert, tile_row = tile_map(counts, config.rows, layer.slots)
        routing = (order, tile_expert, tile_row, ends, weights, layer.slots_per_token)
        for x, name, y, width in ((layer.x, "gate_up", h, shape["inner"]), (h, "down", part, shape["hidden"])):
            grid, gate_up = (len(tile_expert), width // config.columns), name == "gate_up"
            _gemm[grid](x, layer.weights[name], y, *routing, width, x.shape[1], GATE_UP=gate_up, **tile)
        return part.view(n, layer.slots_per_token, -1).sum(1)

    return step


_CHOSEN: dict[tuple[Any, ...], Config] = {}


def tuned(layer: Layer, time_us: Callable[[Callable[[], Any]], float]) -> Callable[[], Tensor]:
    """The step with the fastest of the configurations that fit; found once for a shape and a number of tokens."""
    shape = layer.shape
    few = layer.slots <= FEW_ROWS * (shape["num_experts"] + shape["num_shared"])
    key = (shape["name"], layer.num_tokens)
    if key not in _CHOSEN:
        fitting = [
            c
            for c in CONFIGS[few]
            if not (shape["inner"] % c.columns or shape["hidden"] % c.columns)
            and not (shape["inner"] % c.depth or shape["hidden"] % c.depth)
        ]
        if not fitting:
            raise RuntimeError("no configuration divides the layer")
        _CHOSEN[key] = min(fitting, key=lambda c: _time_or_never(layer, c, time_us))
    return step_of(layer, _CHOSEN[key])


def _time_or_never(layer: Layer, config: Config, time_us: Callable[[Callable[[], Any]], float]) -> float:
    """Infinite where the device has too little shared memory for the tile."""
    try:
        return time_us(step_of(layer, config))
    except OutOfResources:
        return float("inf")

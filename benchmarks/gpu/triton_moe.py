"""A fused MoE layer in Triton, what most serving stacks run: two grouped GEMMs over tiles of rows of one expert.

Written for this benchmark, after the scheme of vLLM's fused_moe (sorted slots, a map of tiles, weights by tile), with a
tuning of its own: tuned() times CONFIGS and keeps the fastest for a layer and a number of tokens. Needs Triton, which
no machine without a GPU runs: of this file only tile_map and the choice of configurations are tested there.
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


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile: rows x columns x depth. warps, stages: as Triton has them."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


FEW = (Config(16, 64, 128, 4, 4), Config(16, 128, 64, 4, 4), Config(16, 64, 64, 4, 5), Config(16, 32, 256, 4, 3))
MANY = (Config(64, 128, 64, 4, 4), Config(128, 128, 64, 8, 3), Config(128, 64, 64, 4, 4), Config(64, 64, 64, 4, 4))
CONFIGS = {True: FEW, False: MANY}
FEW_ROWS = 16  # of an expert, on the average: the tiles of FEW hold them


@triton.jit
def _tile(x, w, x_at, w_at, inside, steps, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The product of gathered rows of x and rows of w."""
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for step in range(steps):
        a = tl.load(x + x_at + step * DEPTH, mask=inside, other=0.0)
        b = tl.load(w + w_at + step * DEPTH)
        sums = tl.dot(a, b, sums)
    return sums


@triton.jit
def _gate_up(
    x, w, y, order, tile_expert, tile_row, ends, slots_per_token, inner, hidden,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    expert = tl.load(tile_expert + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(tile_row + tl.program_id(0)) + tl.arange(0, ROWS)
    inside = (row < tl.load(ends + expert))[:, None]
    token = tl.load(order + row, mask=row < tl.load(ends + expert), other=0).to(tl.int64) // slots_per_token
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    x_at = token[:, None] * hidden + k[None, :]
    w_at = (expert * 2 * inner + column[None, :]) * hidden + k[:, None]
    steps = hidden // DEPTH
    gate = _tile(x, w, x_at, w_at, inside, steps, DEPTH, ROWS, COLUMNS)
    up_at = ((expert * 2 + 1) * inner + column[None, :]) * hidden + k[:, None]
    up = _tile(x, w, x_at, up_at, inside, steps, DEPTH, ROWS, COLUMNS)
    h = gate * tl.sigmoid(gate) * up
    tl.store(y + row[:, None].to(tl.int64) * inner + column[None, :], h.to(tl.bfloat16), mask=inside)


@triton.jit
def _down(
    h, w, y, order, tile_expert, tile_row, ends, weights, inner, hidden,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    expert = tl.load(tile_expert + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(tile_row + tl.program_id(0)) + tl.arange(0, ROWS)
    held = row < tl.load(ends + expert)
    inside = held[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    h_at = row[:, None].to(tl.int64) * inner + k[None, :]
    w_at = (expert * hidden + column[None, :]) * inner + k[:, None]
    sums = _tile(h, w, h_at, w_at, inside, inner // DEPTH, DEPTH, ROWS, COLUMNS)
    slot = tl.load(order + row, mask=held, other=0).to(tl.int64)
    sums = sums * tl.load(weights + slot, mask=held, other=0.0)[:, None]
    tl.store(y + slot[:, None] * hidden + column[None, :], sums.to(tl.bfloat16), mask=inside)


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
    h = torch.empty(layer.slots, shape["inner"], dtype=torch.bfloat16, device=device)
    part = torch.zeros(layer.slots, shape["hidden"], dtype=torch.bfloat16, device=device)
    tile = {"ROWS": config.rows, "DEPTH": config.depth, "num_warps": config.warps, "num_stages": config.stages}
    columns = config.columns

    def step() -> Tensor:
        experts, weights = layer.slot_experts_and_weights()
        order = torch.sort(experts, stable=True).indices.int()
        counts = layer.slots_of_experts(experts)
        ends = counts.cumsum(0).int()
        tile_expert, tile_row = tile_map(counts, config.rows, layer.slots)
        tiles = len(tile_expert)
        _gate_up[tiles, shape["inner"] // columns](
            layer.x, layer.weights["gate_up"], h, order, tile_expert, tile_row, ends, layer.slots_per_token,
            shape["inner"], shape["hidden"], COLUMNS=columns, **tile,
        )  # fmt: skip
        _down[tiles, shape["hidden"] // columns](
            h, layer.weights["down"], part, order, tile_expert, tile_row, ends, weights, shape["inner"],
            shape["hidden"], COLUMNS=columns, **tile,
        )  # fmt: skip
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
        _CHOSEN[key] = min(fitting, key=lambda c: time_us(step_of(layer, c)))
    return step_of(layer, _CHOSEN[key])

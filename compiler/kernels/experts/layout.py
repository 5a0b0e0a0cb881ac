"""How expert weights lie in memory: panels of 32 columns, contiguous over the whole of K, gate and up columns in turn.

    vnni32   bf16 [E, N/32, K/32, 2, 16, 16, 2]   panel, k block, column half, k pair, column, k parity
    row32    f32  [E, N/32, K, 32]                panel, k, column

A panel of the gate_up stack holds 16 gate columns (half 0) and the 16 up columns that belong to them (half 1), so an
activation needs nothing from another panel; without a gate it holds 32 up columns. K and N are padded to multiples of
32 with zeros (gate and up each to a multiple of 32). One layout serves AMX, AVX-512 and AVX2, one row and thousands.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PANEL = 32
HALF = 16
TILE_ROWS = 16  # of the tile unit


def padded(n: int) -> int:
    """n rounded up to a whole number of panels or k blocks."""
    return -(-n // PANEL) * PANEL


def interleave_gate_up(w: Tensor, gated: bool) -> Tensor:
    """One expert's [2F, H] (gate half first; [F, H] without gate) -> padded rows in panel order."""
    inner = w.shape[0] // 2 if gated else w.shape[0]
    rows = padded(inner)
    if not gated:
        return _pad_rows(w, rows)
    halves = torch.stack([_pad_rows(w[:inner], rows), _pad_rows(w[inner:], rows)])  # [2, F, H]
    return halves.view(2, rows // HALF, HALF, -1).transpose(0, 1).reshape(2 * rows, -1)


def _pad_rows(w: Tensor, rows: int) -> Tensor:
    return w if w.shape[0] == rows else torch.nn.functional.pad(w, (0, 0, 0, rows - w.shape[0]))


def _panels_vnni32(w: Tensor) -> Tensor:
    n, k = w.shape
    return w.view(n // PANEL, 2, HALF, k // PANEL, HALF, 2).permute(0, 3, 1, 4, 2, 5).reshape(n // PANEL, k * PANEL)


def _panels_row32(w: Tensor) -> Tensor:
    n, k = w.shape
    return w.view(n // PANEL, PANEL, k).transpose(1, 2).reshape(n // PANEL, k * PANEL)


_PANELS: dict[str, tuple[torch.dtype, Callable[[Tensor], Tensor]]] = {
    "vnni32": (torch.bfloat16, _panels_vnni32),
    "row32": (torch.float32, _panels_row32),
}
LAYOUTS = tuple(_PANELS)


def packed_shape(num_experts: int, num_columns: int, depth: int) -> tuple[int, int, int]:
    """[E, panels, elements of a panel] for weights of num_columns outputs and depth inputs per expert."""
    return num_experts, padded(num_columns) // PANEL, padded(depth) * PANEL


def pack_rows(w: Tensor, layout: str, out: Tensor) -> None:
    """One expert's [N, K] weight, its rows in panel order, into out [panels, elements]; copies one expert at most."""
    dtype, to_panels = _PANELS[layout]
    depth = padded(w.shape[1])
    w = w.to(dtype)
    if w.shape[1] != depth or w.shape[0] != padded(w.shape[0]):
        w = torch.nn.functional.pad(w, (0, depth - w.shape[1], 0, padded(w.shape[0]) - w.shape[0]))
    out.copy_(to_panels(w.contiguous()))


def pack_gate_up(w: Tensor, layout: str, gated: bool = True, out: Tensor | None = None) -> Tensor:
    """w_gate_up [E, 2F, H] ([E, F, H] without gate) -> packed [E, panels, elements] (into out, where given)."""
    inner = w.shape[1] // 2 if gated else w.shape[1]
    columns = padded(inner) * (2 if gated else 1)
    packed = _target(out, layout, packed_shape(w.shape[0], columns, w.shape[2]))
    for expert, target in zip(w, packed, strict=True):
        pack_rows(interleave_gate_up(expert, gated), layout, target)
    return packed


def pack_down(w: Tensor, layout: str, out: Tensor | None = None) -> Tensor:
    """w_down [E, H, F] -> packed [E, panels, elements] (into out, where given)."""
    packed = _target(out, layout, packed_shape(w.shape[0], w.shape[1], w.shape[2]))
    for expert, target in zip(w, packed, strict=True):
        pack_rows(expert, layout, target)
    return packed


def pack_bias_gate_up(b: Tensor, gated: bool = True) -> Tensor:
    """b_gate_up [E, 2F] -> f32 [E, columns] in panel order."""
    return torch.stack([interleave_gate_up(e.float()[:, None], gated)[:, 0] for e in b])


def pack_bias_down(b: Tensor) -> Tensor:
    """b_down [E, H] -> f32 [E, H padded]."""
    return torch.nn.functional.pad(b.float(), (0, padded(b.shape[1]) - b.shape[1]))


def _target(out: Tensor | None, layout: str, shape: tuple[int, int, int]) -> Tensor:
    dtype = _PANELS[layout][0]
    if out is None:
        return torch.empty(shape, dtype=dtype)
    if tuple(out.shape) != shape or out.dtype != dtype:
        raise ValueError(f"packed weights: expected {dtype} {shape}, got {out.dtype} {tuple(out.shape)}")
    return out

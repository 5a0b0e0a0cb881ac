"""The tensors and workspace views of one experts kernel, as TIR buffers."""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts.layout import PANEL
from moec.compiler.kernels.experts.plan import Plan
from moec.compiler.kernels.experts.tiles import Tiles
from moec.compiler.kernels.template.intrinsics import view


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The kernel's tensors, in call order; None where the problem has none.

    x [T,H], weights f32[T,K], experts i32[T,K], w_gate_up, w_down packed [E, panels, elements], b_gate_up
    f32[E, columns], b_down f32[E, H padded], shared_weight f32[T], workspace u8[bytes], y [T,H].
    """

    num_tokens: Any
    x: Any
    weights: Any
    experts: Any
    w_gate_up: Any
    w_down: Any
    b_gate_up: Any
    b_down: Any
    shared_weight: Any
    workspace: Any
    y: Any


def declare_arguments(plan: Plan) -> Arguments:
    """Emits the function's parameters with their checked shapes."""
    problem, size = plan.problem, plan.num_segments
    tokens, space = T.int64(), T.int64()

    def tensor(name: str, shape: tuple, dtype: str, align: int) -> Any:
        return T.match_buffer(T.arg(name, T.handle()), shape, dtype, align=align)

    align = plan.item_bytes
    x = tensor("x", (tokens, problem.hidden), problem.dtype, align)
    weights = tensor("weights", (tokens, problem.top_k), "float32", 4)
    experts = tensor("experts", (tokens, problem.top_k), "int32", 4)
    w_gate_up = tensor(
        "w_gate_up", (size, plan.up.panels, plan.up.panel_elements), plan.up.dtype, 1 if plan.up.codes else align
    )
    w_down = tensor(
        "w_down", (size, plan.down.panels, plan.down.panel_elements), plan.down.dtype, 1 if plan.down.codes else align
    )
    b_gate_up = b_down = None
    if problem.has_bias:
        b_gate_up = tensor("b_gate_up", (size, plan.panels_up * PANEL), "float32", 4)
        b_down = tensor("b_down", (size, plan.panels_down * PANEL), "float32", 4)
    shared = tensor("shared_weight", (tokens,), "float32", 4) if problem.has_shared_weight else None
    workspace = tensor("workspace", (space,), "uint8", 1)
    y = tensor("y", (tokens, problem.hidden), problem.dtype, align)
    return Arguments(tokens, x, weights, experts, w_gate_up, w_down, b_gate_up, b_down, shared, workspace, y)


class Workspace:
    """Typed views of the workspace regions for `tokens` tokens per pass: ws.row_token[i], ws.x_rows, ..."""

    def __init__(self, plan: Plan, buffer: Any, tokens: Any) -> None:
        offsets, _ = plan.offsets(tokens)
        self._views = {
            name: view(T.address_of(buffer[offsets[name]]), dtype, count) for name, dtype, count in plan.regions(tokens)
        }

    def __getattr__(self, name: str) -> Any:
        return self._views[name]


@dataclasses.dataclass(frozen=True)
class Pass:
    """What the phases share: the kernel's numbers, its tensors, and the tokens [first, first + tokens) of a pass."""

    plan: Plan
    tiles: Tiles
    args: Arguments
    ws: Workspace
    first: Any
    tokens: Any

"""Compares what two versions of a region give: numbers within a relative error, routings as maps, ties left open."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

aten = torch.ops.aten
CHOOSING = (aten.topk.default, aten.argmax.default, aten.max.dim, aten.sort.default, aten.argsort.default)
"""Ops whose result is open where their input ties: torch does not say which of two equal values comes first."""
GATHERING = (aten.gather.default, aten.take_along_dim.default)
NEAR = 8 * torch.finfo(torch.float32).eps
"""float32 values so near relative to each other count as tied; 16 bits tie only where they are equal."""


@dataclasses.dataclass(frozen=True)
class Compared:
    """error: the largest relative error, inf where something cannot agree. what: where it is. note: rows left out."""

    error: float
    what: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class OpenRows:
    """Rows [R] whose choice a tie leaves open. Their sorted weights must agree all the same, but for the rows `free`.

    free: bool [R], of these rows; None: none. There another choice means other weights: one of several choices ties
        (groups, then experts), which decides what the next one may choose among; or the tied values are not what the
        weights are made of (scores plus a bias choose, scores weigh: 0.54 + 0.05 ties with 0.50 + 0.09).
    scores: [R, E], what the one choice looked at: on open rows, experts of equal scores must be chosen. None: unknown.
    """

    rows: Tensor
    free: Tensor | None = None
    scores: Tensor | None = None

    @property
    def weighed(self) -> Tensor:
        """The rows [R] whose sorted weights count."""
        return torch.ones_like(self.rows) if self.free is None else ~self.free


def looked_at(nodes: Iterable[Node]) -> set[str]:
    """The names of the values that open_rows asks for."""
    return {n.all_input_nodes[0].name for n in nodes if n.target in (*CHOOSING, *GATHERING)}


def open_rows(nodes: Iterable[Node], values: Mapping[str, Any], rows: int) -> OpenRows:
    """What the ties of a region leave open. nodes: the region; values: at least those of looked_at(nodes)."""
    nodes = list(nodes)
    choosing = [n for n in nodes if n.target in CHOOSING]
    choices: list[tuple[Any, Tensor, tuple[Any, ...]]]
    choices = [(n.target, values[n.all_input_nodes[0].name], n.args[1:]) for n in choosing]
    tied = tied_rows(choices, rows)
    if len(choices) != 1:
        return OpenRows(tied, tied)
    ((op, scores, args),) = choices
    at_end = _axis(op, args) in (-1, scores.dim() - 1)
    if op is not aten.topk.default or not rows or not at_end or scores.numel() != rows * scores.shape[-1]:
        return OpenRows(tied)
    sources = [values[n.all_input_nodes[0].name] for n in nodes if n.target in GATHERING]
    free, flat = torch.zeros_like(tied), scores.reshape(rows, -1)
    for source in sources:
        if isinstance(source, Tensor) and source.shape == scores.shape and int(args[0]) <= flat.shape[1]:
            free |= _differ_where_tied(flat, source.reshape(rows, -1), int(args[0]))
    return OpenRows(tied, tied & free, flat)


def _differ_where_tied(scores: Tensor, source: Tensor, count: int) -> Tensor:
    """scores, source [R, E] -> bool [R]: experts that tie for the last of `count` places differ in the source."""
    last = scores.float().topk(count, -1).values[:, -1:]
    alike = _alike(scores.float(), last, scores.dtype)
    low = source.float().masked_fill(~alike, math.inf).amin(-1)
    high = source.float().masked_fill(~alike, -math.inf).amax(-1)
    return ~_alike(low, high, source.dtype)


def _alike(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Equal as values of `dtype` (a, b: float32 copies), or for float32 within a few roundings."""
    near = NEAR if dtype == torch.float32 else 0.0
    return (a == b) | ((a - b).abs() <= near * torch.minimum(a.abs(), b.abs()))


def tied_rows(choices: Iterable[tuple[Any, Tensor, tuple[Any, ...]]], rows: int) -> Tensor:
    """(op, its input, further arguments) of each choosing op -> bool[rows]: rows whose choice a rounding may turn.

    A row is open when the last chosen and the first rejected value lie within a few roundings of each other. Sorting
    alone leaves nothing open: what is taken of it is not known, so every pair of neighbours counts.
    """
    found = torch.zeros(rows, dtype=torch.bool)
    for op, scores, args in choices if rows else ():
        dim = _axis(op, args) % max(scores.dim(), 1)
        if not scores.dtype.is_floating_point or scores.dim() < 2:
            continue
        moved = scores.movedim(dim, -1)
        by_row = [i for i, size in enumerate(moved.shape[:-1]) if size == rows]
        if by_row:
            moved = moved.movedim(by_row[0], 0)
        elif moved.numel() != rows * moved.shape[-1]:  # neither an axis of rows nor [batch, sequence, ..]
            continue
        moved = moved.reshape(rows, -1, moved.shape[-1])
        found |= _close(moved, int(args[0]) if op is aten.topk.default else _taken(op)).any(-1)
    return found


def _axis(op: Any, args: tuple[Any, ...]) -> int:
    """The axis along which an op chooses, from its arguments after the input."""
    at = 1 if op is aten.topk.default else 0
    dim = args[at] if len(args) > at else -1
    return -1 if dim is None or isinstance(dim, bool) else int(dim)


def _taken(op: Any) -> int | None:
    return None if op in (aten.sort.default, aten.argsort.default) else 1


def _close(scores: Tensor, count: int | None) -> Tensor:
    """scores [R, M, n] -> bool[R, M]: the choice of the best `count` (None: the whole order) is open."""
    if count is not None and count >= scores.shape[-1]:
        return torch.zeros(scores.shape[:-1], dtype=torch.bool)
    width = scores.shape[-1] if count is None else count + 1
    best = scores.float().topk(width, -1).values
    tied = _alike(best[..., :-1], best[..., 1:], scores.dtype)
    return tied.any(-1) if count is None else tied[..., -1]


def compare(
    first: Mapping[str, Any], second: Mapping[str, Any], routings: list[tuple[str, str]], open_rows: OpenRows
) -> Compared:
    """The worst error over all values; `routings` names (weights, experts) pairs, compared expert by expert."""
    count = int(open_rows.rows.sum())
    left_out = int((~open_rows.weighed).sum()) if routings else count
    parts = [f"{count - left_out} tied rows compared by weight only"] * (left_out < count)
    parts += [f"{left_out} tied rows left out"] * (left_out > 0)
    worst = Compared(0.0, "", ", ".join(parts))
    paired = {n for pair in routings for n in pair}
    for weights, experts in routings:
        error = _routing_error(first[weights], first[experts], second[weights], second[experts], open_rows)
        worst = _worse(worst, error, f"routing ({weights}, {experts})")
    for name in sorted(first.keys() - paired):
        worst = _worse(worst, _error(first[name], second[name], open_rows.rows), name)
    return worst


def _worse(worst: Compared, error: float, what: str) -> Compared:
    return dataclasses.replace(worst, error=error, what=what) if not error <= worst.error else worst


def _error(a: Any, b: Any, open_rows: Tensor) -> float:
    if isinstance(a, (tuple, list)):
        return max((_error(x, y, open_rows) for x, y in zip(a, b, strict=True)), default=0.0)
    if not isinstance(a, Tensor):
        return 0.0 if a == b else math.inf
    if a.shape != b.shape:
        return math.inf
    if a.dim() and a.shape[0] == open_rows.shape[0]:
        a, b = a[~open_rows], b[~open_rows]
    return relative_error(a, b)


def relative_error(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |a| over finite places; inf where NaN or infinities do not agree. Integers: 0 or inf."""
    if not a.numel():
        return 0.0
    if not a.dtype.is_floating_point:
        return 0.0 if torch.equal(a.long(), b.long()) else math.inf
    a, b = a.double(), b.double()
    if not torch.equal(a.isnan(), b.isnan()):
        return math.inf
    finite = a.isfinite() & b.isfinite()
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return math.inf
    a, b = a[finite], b[finite]
    largest = float(a.abs().max()) if a.numel() else 0.0
    difference = float((a - b).abs().max()) if a.numel() else 0.0
    return difference / max(largest, torch.finfo(torch.float32).tiny) if difference else 0.0


def in_effect(experts: Tensor, weights: Tensor) -> Tensor:
    """The experts as i64, -1 where the weight is 0 (an underflow below 1e-30 included): it adds nothing."""
    return experts.long().masked_fill(weights.abs() < 1e-30, -1)


def _routing_error(wa: Tensor, ea: Tensor, wb: Tensor, eb: Tensor, open_rows: OpenRows) -> float:
    """Weights [T, K] and experts [T, K] twice, expert by expert; on open rows the sorted weights and scores count."""
    if wa.shape != wb.shape or ea.shape != eb.shape:
        return math.inf
    wa, wb = wa.float(), wb.float()
    matched = len(open_rows.rows) == len(wa)
    settled = ~open_rows.rows if matched else torch.ones(len(wa), dtype=torch.bool)
    sized = open_rows.weighed if matched else settled
    if matched and not _as_good(wa, ea.long(), wb, eb.long(), open_rows):
        return math.inf
    error = relative_error(wa[sized].sort(-1).values, wb[sized].sort(-1).values)
    settled = settled & ~wa.isnan().all(-1)
    wa, wb = wa[settled], wb[settled]
    ea, eb = in_effect(ea[settled], wa), in_effect(eb[settled], wb)
    oa, ob = ea.argsort(-1), eb.argsort(-1)
    if not torch.equal(ea.gather(-1, oa), eb.gather(-1, ob)):
        return math.inf
    return max(error, relative_error(wa.gather(-1, oa), wb.gather(-1, ob)))


def _as_good(wa: Tensor, ea: Tensor, wb: Tensor, eb: Tensor, open_rows: OpenRows) -> bool:
    """On open rows, whether both versions chose different experts, all of scores as good as the other's.

    Rows with a weight in no effect or NaN are left out, and all rows where the experts are not what the choice gave.
    """
    scores = open_rows.scores
    if scores is None or not ea.numel() or min(int(ea.min()), int(eb.min())) < 0:
        return True
    if max(int(ea.max()), int(eb.max())) >= scores.shape[1]:
        return True
    best = scores.float().topk(ea.shape[1], -1).values
    dtype = scores.dtype
    first, second = (scores.float().gather(-1, e).sort(-1, descending=True).values for e in (ea, eb))
    counted = open_rows.rows & _alike(first, best, dtype).all(-1)
    counted &= ((wa.abs() >= 1e-30) & (wb.abs() >= 1e-30)).all(-1)
    distinct = (eb.sort(-1).values.diff(dim=-1) != 0).all(-1)
    return bool((_alike(second, best, dtype).all(-1) & distinct)[counted].all())

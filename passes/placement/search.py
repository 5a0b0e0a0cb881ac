"""Searches all strategies for the plan with the most tokens per second, and bounds what any plan could reach."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from moec.passes.hardware.errors import PlacementError
from moec.passes.hardware.mesh import Mesh
from moec.passes.placement.balance import load_bound
from moec.passes.placement.bound import BoundModel, expert_slots, kv_token_bound
from moec.passes.placement.build import build_layout
from moec.passes.placement.cost import CostParameters, StepLoad, StepModel
from moec.passes.placement.layout import Layout, Problem
from moec.passes.placement.model_shape import ModelShape
from moec.passes.placement.place_experts import ExpertPlacement, place_experts
from moec.passes.placement.routing import RoutingTrace
from moec.passes.placement.serving import MAX_SEQUENCES, Workload, engine_limits, steady_load, tokens_per_second
from moec.passes.placement.strategy import Strategy, enumerate_strategies
from moec.passes.placement.weight_format import WeightFormat


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is asked for.

    Args:
        batch: sequences in flight over the whole mesh; 0 for as many as fit.
        strategy: the only strategy to consider, or None for all.
        trace: expert use of each MoE layer.
    """

    shape: ModelShape
    mesh: Mesh
    weights: WeightFormat
    workload: Workload
    trace: RoutingTrace
    params: CostParameters
    batch: int = 0
    kv_bytes: float = 2.0
    strategy: Strategy | None = None

    def problem(self, strategy: Strategy) -> Problem:
        """The problem of the first replica.

        Raises:
            PlacementError: the strategy does not use the mesh's devices exactly, or replicas would differ.
        """
        if strategy.num_ranks != self.mesh.num_devices:
            raise PlacementError(
                f"strategy {strategy.name}: needs {strategy.num_ranks} devices, mesh {self.mesh.name} has "
                f"{self.mesh.num_devices}"
            )
        size = strategy.num_ranks // strategy.replicas
        slices = [self.mesh.slice(i * size, size) for i in range(strategy.replicas)]
        if any(s.devices != slices[0].devices or s.between != slices[0].between for s in slices):
            raise PlacementError("replicas would sit on different devices")
        return replace(self.any_problem(), mesh=slices[0] if strategy.replicas > 1 else self.mesh)

    def any_problem(self) -> Problem:
        """The problem with the whole mesh as one replica."""
        return Problem(self.shape, self.mesh, self.weights, self.kv_bytes, max(256, self.batch) if self.batch else 8192)


@dataclass(frozen=True)
class Candidate:
    """One strategy, evaluated.

    Args:
        tokens_per_s, tokens_per_s_bound: of the whole mesh; 0 where it does not fit.
        reason: why it is not the plan; empty while undecided.
        steps: cached tokens, rising, at which the bound on tokens per second is stated beside kv_tokens_bound.
    """

    strategy: Strategy
    reason: str = ""
    layout: Layout | None = None
    tokens_per_s: float = 0.0
    tokens_per_s_bound: float = 0.0
    kv_tokens: int = 0
    kv_tokens_bound: float = 0.0
    load_bounds: np.ndarray = field(default_factory=lambda: np.zeros(0))
    placement: ExpertPlacement | None = None
    steps: tuple[float, ...] = ()


@dataclass(frozen=True)
class SearchResult:
    """best is None where nothing fits; candidates holds every strategy in order of speed."""

    request: PlanRequest
    best: Candidate | None
    candidates: tuple[Candidate, ...]

    @property
    def tokens_per_s_bound(self) -> float:
        """What no plan of any strategy exceeds; 0 where there is no strategy."""
        return max((c.tokens_per_s_bound for c in self.candidates), default=0.0)


def search(request: PlanRequest, on_strategy: Callable[[Strategy], None] = lambda _: None) -> SearchResult:
    """Evaluates every strategy and returns the fastest that fits.

    Raises:
        PlacementError: request.strategy was given and cannot be used.
    """
    strategies = [request.strategy] if request.strategy else enumerate_strategies(request.shape, request.mesh)
    placer = _Placer(request)
    candidates = []
    for strategy in strategies:
        on_strategy(strategy)
        try:
            candidates.append(_evaluate(request, strategy, placer))
        except PlacementError as error:
            if request.strategy:
                raise
            candidates.append(Candidate(strategy, str(error)))
    candidates.sort(key=lambda c: -c.tokens_per_s)
    best = candidates[0] if candidates and candidates[0].tokens_per_s > 0 else None
    if best is not None and best.strategy.spare_slots:
        finer = _evaluate(request, best.strategy, _Placer(request, use_milp=True))
        best = finer if finer.tokens_per_s >= best.tokens_per_s else best
        candidates[0] = best
    if best is not None and not request.workload.num_requests:
        candidates = _tightened(request, candidates, placer.popularity)
        best = candidates[0]
    decided = tuple(c if c is best or c.reason else replace(c, reason=_slower(c, best)) for c in candidates)
    return SearchResult(request, best, decided)


CLOSE = 2e-3
"""A strategy whose bound is above the best plan by less than this is left as it is."""
MAX_STEPS = 40


def _tightened(request: PlanRequest, candidates: list[Candidate], popularity: np.ndarray) -> list[Candidate]:
    """The candidates, best first, with bounds and layouts that take memory and speed together.

    The first bound takes the fewest seconds of any cut at the most tokens of any cut. Here cuts must have both; the
    strategies whose bounds are above the best plan are taken in turn, as long as that brings them closer.
    """
    found = {c.strategy: c for c in candidates}
    todo = sorted(candidates, key=lambda c: -c.tokens_per_s_bound)
    for c in todo:
        best = max(x.tokens_per_s for x in found.values())
        if c.tokens_per_s_bound > best * (1 + CLOSE):
            found[c.strategy] = _tighten(request, c, popularity, best)
    return sorted(found.values(), key=lambda c: -c.tokens_per_s)


def _tighten(request: PlanRequest, c: Candidate, popularity: np.ndarray, target: float) -> Candidate:
    """Cuts the range of cached tokens in steps until no step's bound is above what is reached, or `target`."""
    problem, length = request.problem(c.strategy), request.workload.total_len
    bound = BoundModel(problem, c.strategy, request.params, popularity, c.load_bounds)
    low = float(max(_sequences(request, c.strategy), 1) * length)
    full = float(MAX_SEQUENCES * length)
    ends = [full, c.kv_tokens_bound] if low < full < c.kv_tokens_bound else [c.kv_tokens_bound]

    def rate(below: float, tokens: float) -> float:
        return _rate(request, c.strategy, lambda load: bound.seconds(load, tokens=below), tokens)

    rates = [rate(below, end) for below, end in itertools.pairwise([low, *ends])]
    for _ in range(MAX_STEPS):
        worst = int(np.argmax(rates))
        below, end = ([low, *ends])[worst], ends[worst]
        middle = (below * end) ** 0.5
        c = _with_cuts(request, c, bound, popularity, middle, end)
        if request.batch or rates[worst] <= max(target, c.tokens_per_s) * (1 + CLOSE) or end - below < length:
            break
        ends.insert(worst, middle)
        rates[worst : worst + 1] = [rate(below, middle), rate(middle, end)]
    return replace(
        c, steps=tuple(ends[:-1]), tokens_per_s_bound=max(c.tokens_per_s, min(max(rates), c.tokens_per_s_bound))
    )


def _with_cuts(
    request: PlanRequest, c: Candidate, bound: BoundModel, popularity: np.ndarray, tokens: float, end: float
) -> Candidate:
    """The candidate with the layout whose cuts are fastest among those with room for `tokens`, where that is better."""
    most = engine_limits(end / request.workload.total_len, request.workload)[0]
    cuts = bound.best_cuts(steady_load(_sequences(request, c.strategy) or most, request.workload), tokens)
    if cuts is None or c.placement is None:
        return c
    needed = max(_sequences(request, c.strategy), 1) * request.workload.total_len
    for follow in ("speed",) if bound.problem.mesh.is_uniform else ("speed", "memory"):
        try:
            layout = build_layout(bound.problem, c.strategy, cuts, c.placement.resident, c.placement.share, follow)
        except PlacementError:
            continue
        held = layout.kv_tokens()
        made = (
            _rate(request, c.strategy, StepModel(layout, request.params, popularity).seconds, held)
            if held >= needed
            else 0
        )
        if made > c.tokens_per_s:
            c = replace(c, layout=layout, tokens_per_s=made, kv_tokens=held, reason="")
    return c


def fits(request: PlanRequest) -> bool:
    """Whether some strategy has shares that hold the model and one request; the roomiest strategies are tried first."""
    room = []
    for strategy in enumerate_strategies(request.shape, request.mesh, spare_slots=(0,)):
        try:
            room.append((kv_token_bound(request.problem(strategy), strategy)[0], strategy))
        except PlacementError:
            continue
    placer = _Placer(request)
    needed = request.workload.total_len
    likely = sorted((r for r in room if r[0] >= needed), key=lambda r: -r[0])
    return any(_evaluate(request, strategy, placer).layout is not None for _, strategy in likely)


def popularity_by_layer(request: PlanRequest) -> np.ndarray:
    """f64[L, E]: rows of dense layers are even and unused."""
    moe = np.array([request.shape.layer_class(i).moe is not None for i in range(request.shape.num_layers)])
    num_experts = request.trace.counts.shape[1]
    out = np.full((len(moe), num_experts), 1.0 / num_experts)
    out[moe] = request.trace.popularity()
    return out


class _Placer:
    """Expert placements of a request, made once per number of groups and spare slots."""

    def __init__(self, request: PlanRequest, use_milp: bool = False) -> None:
        self.popularity, self.use_milp = popularity_by_layer(request), use_milp
        self._made: dict[tuple[int, int], ExpertPlacement] = {}

    def __call__(self, strategy: Strategy) -> ExpertPlacement:
        key = (strategy.expert_groups, strategy.spare_slots)
        if key not in self._made:
            self._made[key] = place_experts(self.popularity, *key, use_milp=self.use_milp)
        return self._made[key]


def _evaluate(request: PlanRequest, strategy: Strategy, placer: _Placer) -> Candidate:
    problem = request.problem(strategy)
    num_experts = request.trace.counts.shape[1]
    if strategy.spare_slots and expert_slots(num_experts, strategy) == expert_slots(
        num_experts, replace(strategy, spare_slots=0)
    ):
        return Candidate(strategy, "no expert is left to copy: every group already holds all of them")
    kv_bound, cache_cuts = kv_token_bound(problem, strategy)
    sequences = _sequences(request, strategy)
    if kv_bound < max(sequences, 1) * request.workload.total_len:
        return Candidate(strategy, _memory_reason(request, kv_bound, sequences), kv_tokens_bound=kv_bound)
    placement = placer(strategy)
    load_bounds = _load_bounds(placer.popularity, strategy, placement)
    bound = BoundModel(problem, strategy, request.params, placer.popularity, load_bounds)
    quick = bool(request.workload.num_requests) and problem.mesh.is_uniform
    limit = _rate(request, strategy, lambda load: bound.seconds(load, quick), kv_bound)
    best = Candidate(strategy, "", None, 0.0, limit, 0, kv_bound, load_bounds, placement)
    full = steady_load(
        max(sequences, engine_limits(kv_bound / request.workload.total_len, request.workload)[0]), request.workload
    )
    time_cuts = bound.best_cuts(full)
    follows = ("speed",) if problem.mesh.is_uniform else ("speed", "memory")
    for cuts, follow in itertools.product([time_cuts] if cache_cuts == time_cuts else [time_cuts, cache_cuts], follows):
        layout = build_layout(problem, strategy, cuts, placement.resident, placement.share, follow)
        tokens = layout.kv_tokens()
        if tokens < max(sequences, 1) * request.workload.total_len:
            continue
        rate = _rate(request, strategy, StepModel(layout, request.params, placer.popularity).seconds, tokens)
        if rate > best.tokens_per_s:
            best = replace(best, layout=layout, tokens_per_s=rate, kv_tokens=tokens)
    if best.layout is None:
        return replace(best, reason="no integer shares found that fit every device, although the total memory would do")
    return best


def _load_bounds(popularity: np.ndarray, strategy: Strategy, placement: ExpertPlacement) -> np.ndarray:
    """The proven bound where the placement has one (MILP), which never exceeds what was reached; else the
    combinatorial one."""
    slots = expert_slots(popularity.shape[1], strategy)
    if strategy.expert_groups == 1:
        return placement.bound
    simple = [load_bound(row, strategy.expert_groups, strategy.spare_slots > 0, slots) for row in popularity]
    return np.maximum(np.array(simple), np.minimum(placement.bound, np.inf))


def _sequences(request: PlanRequest, strategy: Strategy) -> int:
    """Sequences in flight in one replica where a batch was asked for, else 0."""
    return -(-request.batch // strategy.replicas)


def _rate(request: PlanRequest, strategy: Strategy, seconds: Callable[[StepLoad], float], kv_tokens: float) -> float:
    """Tokens per second of the whole mesh."""
    if request.batch:
        each = request.batch / strategy.replicas
        return request.batch / seconds(steady_load(each, request.workload))
    workload = request.workload
    if workload.num_requests:
        workload = replace(workload, num_requests=-(-workload.num_requests // strategy.replicas))
    return strategy.replicas * tokens_per_second(seconds, kv_tokens / workload.total_len, workload)


def sequences_in_flight(request: PlanRequest, candidate: Candidate) -> float:
    """Sequences in flight over the whole mesh when the candidate is full."""
    if request.batch:
        return request.batch
    most, _ = engine_limits(candidate.kv_tokens / request.workload.total_len, request.workload)
    return most * candidate.strategy.replicas


def _memory_reason(request: PlanRequest, kv_bound: float, sequences: int) -> str:
    need = max(sequences, 1) * request.workload.total_len
    if kv_bound < 0:
        return "weights do not fit in the devices' memory, whatever the shares"
    return (
        f"room for at most {int(kv_bound)} cached tokens in a replica; {max(sequences, 1)} sequences of "
        f"{request.workload.total_len} need {need}"
    )


def _slower(candidate: Candidate, best: Candidate | None) -> str:
    if best is None or candidate.tokens_per_s <= 0:
        return "does not fit"
    return f"{100 * (1 - candidate.tokens_per_s / best.tokens_per_s):.1f} % slower than {best.strategy.name}"

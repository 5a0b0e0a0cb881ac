"""The routing: rules on top of logits, and independently a graph that gives the measured weights. Either suffices."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from moec.compiler.capture.lifting.experts import same_rows
from moec.compiler.capture.lifting.gate_rules import Rule, fit
from moec.compiler.capture.lifting.partition import TRACED, Partition
from moec.compiler.capture.lifting.program import NotGeneral
from moec.compiler.capture.lifting.refused import Refused
from moec.compiler.capture.lifting.slices import Slices
from moec.compiler.capture.lifting.study import TOLERANCE, Form, Found, Match, Study

MAX_FACTORS = 12  # values of the trace that are tried as a factor of each row


@dataclasses.dataclass(frozen=True)
class LinearLogits:
    """Logits = rows @ weight^T + bias, by leaf names. transposed: the weight is stored [H, E]."""

    weight: str
    transposed: bool
    bias: str | None


@dataclasses.dataclass(frozen=True)
class WeightGraph:
    """Weights as a program: [T, K] beside `indices`, or [T, E] where that is None; times `scale`."""

    weights: Found
    indices: Found | None
    scale: float


@dataclasses.dataclass(frozen=True)
class Router:
    """How rows become weights [T, K] and experts [T, K].

    rules: specs that fit, all on the same logits; empty: only `graph` gives the routing. factor: one number per expert
    that multiplies the weights. row_factor: one number per row that does. num_logits: E, more with zero experts.
    note: why there is no graph.
    """

    rules: tuple[Rule, ...]
    logits: LinearLogits | Found | None
    graph: WeightGraph | None
    factor: Slices | None
    num_logits: int
    note: str
    row_factor: Found | None = None

    def logits_of(self, study: Study, rows: Tensor) -> Tensor:
        """Float64 logits of rows."""
        if isinstance(self.logits, LinearLogits):
            return linear_logits(study, self.logits, rows)
        assert self.logits is not None
        return study.replay(self.logits, rows)


def linear_logits(study: Study, router: LinearLogits, rows: Tensor) -> Tensor:
    """rows [T, H] -> the router's logits [T, E]."""
    weight = study.leaves[router.weight]
    bias = None if router.bias is None else study.leaves[router.bias]
    return F.linear(rows, weight.T if router.transposed else weight, bias)


def find_router(study: Study, partition: Partition, weights: Tensor) -> Router:
    """weights: f64[P, E] as measured. Raises: Refused("gate"): neither a rule nor a graph gives them."""
    try:
        return _router(study, partition, weights)
    except Refused:
        found = []
        for factor, values in _row_factors(study):
            with contextlib.suppress(Refused):
                found.append(dataclasses.replace(_router(study, partition, weights / values), row_factor=factor))
        if not found:
            raise
        return next((r for r in found if r.rules), found[0])


def _row_factors(study: Study) -> Iterator[tuple[Found, Tensor]]:
    """Values [P, 1] of the trace that may multiply all weights of a row."""
    count = len(study.probe)
    for value in study.values(study.span(0, count), count)[:MAX_FACTORS]:
        values = value.reshape(count, 1)
        if values.ne(0).all() and not torch.equal(values, values[:1].expand_as(values)):
            with contextlib.suppress(NotGeneral):
                yield study.general(same_rows(values, 1), "factor of a row"), values


def _router(study: Study, partition: Partition, weights: Tensor) -> Router:
    graph, note = _graph(study, partition, weights)
    factors: list[Slices | None] = [None, *partition.factors]
    for logits, values in _logits(study, partition):
        for factor in factors:
            plain = weights if factor is None else weights / _factor(study, factor, partition.num_experts)
            rules = _rules(study, partition, values, plain)
            if not rules:
                continue
            found = logits if isinstance(logits, LinearLogits) else _program(study, values)
            if isinstance(found, str):
                note += f"; {found}"
                continue
            return Router(tuple(rules), found, graph, factor, values.shape[1], note)
    if graph is None:
        raise Refused("gate", f"no known rule gives the measured weights, and {note}")
    return Router((), _steering(study, partition), graph, None, partition.num_experts, note)


def _factor(study: Study, slices: Slices, count: int) -> Tensor:
    return torch.stack([slices.view(study.leaves, e) for e in range(count)])


def _rules(study: Study, partition: Partition, logits: Tensor, weights: Tensor) -> list[Rule]:
    biases = {
        n: t
        for n, t in study.leaves.items()
        if tuple(t.shape) == (logits.shape[1],) and t.is_floating_point() and n not in study.expert_leaves
    }
    return fit(logits, weights, partition.top_k, biases, study.span(0, TRACED).literals)


def _logits(study: Study, partition: Partition) -> Iterator[tuple[LinearLogits | None, Tensor]]:
    """Values [P, E'] that may be logits: linear in the rows with the block's own matrices, then values of the trace."""
    num_experts, hidden = partition.num_experts, study.hidden
    for name, tensor in study.leaves.items():
        if name in study.expert_leaves or tensor.dim() != 2 or not tensor.is_floating_point():
            continue
        for transposed in (False, True):
            shape = tuple(tensor.shape)[::-1] if transposed else tuple(tensor.shape)
            if shape[1] != hidden or not num_experts <= shape[0] <= 2 * num_experts:
                continue
            biases = [n for n, t in study.leaves.items() if tuple(t.shape) == shape[:1] and t.is_floating_point()]
            for bias in (None, *(b for b in biases if b not in study.expert_leaves)):
                logits = LinearLogits(name, transposed, bias)
                yield logits, linear_logits(study, logits, study.probe)
    count = len(study.probe)
    whole = study.span(0, count)
    for width in range(num_experts, 2 * num_experts + 1):
        for value in study.values(whole, count * width, width):
            yield None, value.reshape(count, width)


def _program(study: Study, values: Tensor) -> Found | str:
    try:
        return study.general(same_rows(values, values.shape[1]), "router's logits")
    except NotGeneral as error:
        return f"logits: {error}"


def _steering(study: Study, partition: Partition) -> LinearLogits | Found | None:
    """Any logits will do to build rows for each expert."""
    for logits, values in _logits(study, partition):
        found = logits or _program(study, values)
        if not isinstance(found, str):
            return found
    return None


def _graph(study: Study, partition: Partition, weights: Tensor) -> tuple[WeightGraph | None, str]:
    num_experts, top_k = partition.num_experts, partition.top_k
    try:
        found = study.general(_weights_match(weights, num_experts, top_k), "combine weight")
        values = study.replay(found, study.probe)
        live = weights != 0
        if values.shape[-1] == num_experts and torch.equal(values != 0, live):
            return WeightGraph(found, None, float((weights[live] / values[live]).median())), "a graph of dense weights"
        indices = study.general(_index_match(weights, values, num_experts, top_k), "chosen expert")
        chosen = study.replay(indices, study.probe).long()
        taken = _taken(weights, chosen)
        scale = float((taken[taken != 0] / values[taken != 0]).median())
        return WeightGraph(found, indices, scale), "a graph of weights and indices"
    except NotGeneral as error:
        return None, f"no graph: {error}"


def _taken(weights: Tensor, chosen: Tensor) -> Tensor:
    """Weights [n, E] at chosen [n, K]; an index past E takes 0."""
    return weights.gather(1, chosen.clamp(max=weights.shape[1] - 1)) * (chosen < weights.shape[1])


def _forms(width: int) -> tuple[Form, Form]:
    """[n, width] and its transpose."""
    return Form(width), Form(width, turned=True)


def _weights_match(weights: Tensor, num_experts: int, top_k: int) -> Callable[[int, int], Match]:
    dense, listed = _forms(num_experts), _forms(top_k)

    def match_for(low: int, high: int) -> Match:
        want = weights[low:high]
        ordered = _by_size(want)[:, :top_k]

        def match(v: Tensor) -> Form | None:
            if not v.is_floating_point():
                return None
            for form in listed:
                found = form(v, high - low)
                if found is not None and _proportional(_by_size(found), ordered):
                    return form
            for form in dense:
                found = form(v, high - low)
                if found is not None and _proportional(found, want):
                    return form
            return None

        return match

    return match_for


def _by_size(weights: Tensor) -> Tensor:
    """Each row's values, the largest magnitudes first."""
    return weights.gather(1, weights.abs().argsort(-1, descending=True))


def _index_match(weights: Tensor, values: Tensor, num_experts: int, top_k: int) -> Callable[[int, int], Match]:
    def match_for(low: int, high: int) -> Match:
        def match(v: Tensor) -> Form | None:
            if v.is_floating_point() or v.dtype == torch.bool:
                return None
            for form in _forms(top_k):
                found = form(v, high - low)
                if found is None or not found.numel() or int(found.min()) < 0 or int(found.max()) >= 2 * num_experts:
                    continue
                taken = _taken(weights[low:high], found.long())
                if int((taken != 0).sum()) == int((weights[low:high] != 0).sum()) and _proportional(
                    values[low:high], taken
                ):
                    return form
            return None

        return match

    return match_for


def _proportional(found: Tensor, want: Tensor) -> bool:
    """found = constant * want, with zeros at the same places."""
    live = want != 0
    if not live.any() or not torch.equal(found != 0, live):
        return False
    quotient = found[live] / want[live]
    middle = quotient.median()
    return bool((quotient - middle).abs().max() <= TOLERANCE * middle.abs())

"""What one expert computes, and with which weight: D[t, e] = w * expert_e(x_t), found by trying layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from moec.compiler.capture.lifting.layouts import (
    Layout,
    Stacks,
    apply_expert,
    fitting,
    layouts,
    matrix_shape,
    ratio,
    tensors_of,
)
from moec.compiler.capture.lifting.partition import TRACED, Partition, without
from moec.compiler.capture.lifting.program import NotGeneral
from moec.compiler.capture.lifting.study import TOLERANCE, Form, Found, Match, Study
from moec.passes.ir.weights import Weight

LARGE = (10.0, 100.0)  # factors of the probe rows at which limits of activations show
MAX_INPUTS = 40  # values of the trace that are tried as the experts' input


@dataclasses.dataclass(frozen=True)
class KnownExperts:
    """Experts that moec::experts can run.

    layout, act, on_input: how.  entry: what they read instead of the block's rows, None: those.
    weights: f64[P, E], the measured weight of each expert for each probe row.
    """

    layout: Layout
    act: str
    on_input: bool
    entry: Found | None
    weights: Tensor

    def stacks(self, parts: list[Weight]) -> Stacks:
        """From the stack [E, ..] of each of the expert's tensors, in their order."""
        return self.layout.stacks(parts)


class _Search:
    """The layouts that fit the expert with the most rows, with its weights made once."""

    def __init__(self, study: Study, partition: Partition, each: Tensor) -> None:
        self.study, self.partition, self.each = study, partition, each
        self.width = each.shape[-1]
        self.expert = int(partition.chosen.sum(0).argmax())
        shapes = [matrix_shape(g.view(study.leaves, 0).shape) for g in partition.groups]
        self.candidates = [(y, self.weights(y, self.expert)) for y in layouts(shapes, self.width)]
        self.literals = study.span(0, TRACED).literals

    def weights(self, layout: Layout, expert: int) -> list[Tensor | None]:
        leaves = self.study.leaves
        return tensors_of(layout.stacks([g.stacked(leaves, (expert,)) for g in self.partition.groups]), leaves)

    def on(self, inputs: Tensor) -> list[tuple[Layout, str]]:
        """Layouts with the inputs as they are."""
        rows = self.partition.chosen[: len(inputs), self.expert].nonzero()[:, 0]
        delta = self.each[rows, self.expert]
        found = fitting(inputs[rows], delta, self.candidates, self.literals, TOLERANCE)
        return self._told_apart(found) if len(found) > 1 and inputs is self.study.probe else found

    def _told_apart(self, found: list[tuple[Layout, str]]) -> list[tuple[Layout, str]]:
        """Limits of activations show on large rows only: the forms that fit there as well, the plain ones first."""
        for scale in LARGE:
            x = self.study.probe * scale
            delta = self.study.run(x) - without(self.study, self.partition, [self.expert], x)
            if self.each.shape[-1] != self.study.hidden or not torch.isfinite(delta).all():
                break
            rows = delta.abs().amax(1) > 1e-6 * delta.abs().max()
            kept = [f for f in found if self._fits(f, x[rows], delta[rows])]
            found = kept or found
        return found

    def _fits(self, form: tuple[Layout, str], x: Tensor, delta: Tensor) -> bool:
        unit = apply_expert(x, self.weights(form[0], self.expert), form[1])
        return not len(x) or ratio(delta, unit)[1] < TOLERANCE

    def everywhere(self, layout: Layout, act: str, inputs: Tensor) -> Tensor | None:
        """The weights [P, E] if all experts fit, else None."""
        chosen = self.partition.chosen
        weights = torch.zeros(len(chosen), self.partition.num_experts, dtype=torch.float64)
        for e in range(self.partition.num_experts):
            rows = chosen[:, e].nonzero()[:, 0]
            if len(rows):
                unit = apply_expert(inputs[rows], self.weights(layout, e), act)
                weights[rows, e], rest = ratio(self.each[rows, e], unit)
                if not rest < TOLERANCE:
                    return None
        return weights


def find_experts(study: Study, partition: Partition, each: Tensor) -> KnownExperts | None:
    """Experts of a known layout, on the rows, on a value made from them, or with the weight on their input; or None.

    each: f64[P, E, L], what each expert adds; experts of another width than the block's read a value of that width.
    """
    search = _Search(study, partition, each)
    if not search.candidates:
        return None
    if search.width != study.hidden:
        return _behind_a_graph(search)
    for layout, act in search.on(study.probe):
        weights = search.everywhere(layout, act, study.probe)
        if weights is not None:
            return KnownExperts(layout, act, False, None, weights)
    return _behind_a_graph(search) or _weight_on_input(search)


def _behind_a_graph(search: _Search) -> KnownExperts | None:
    """Experts that read a value made from the rows (a norm inside the block)."""
    study, width = search.study, search.width
    count = len(study.probe)
    for value in study.values(study.span(0, count), count * width, width)[:MAX_INPUTS]:
        inputs = value.reshape(count, width)
        for layout, act in search.on(inputs):
            weights = search.everywhere(layout, act, inputs)
            if weights is None:
                continue
            try:
                entry = study.general(same_rows(inputs, width), "experts' input")
            except NotGeneral:
                continue
            return KnownExperts(layout, act, False, entry, weights)
    return None


def same_rows(expected: Tensor, width: int) -> Callable[[int, int], Match]:
    """Matches values that hold rows of `expected` [P, width]."""

    def match_for(low: int, high: int) -> Match:
        def match(v: Tensor) -> Form | None:
            if not v.is_floating_point() or v.numel() != (high - low) * width:
                return None
            if width > 1 and v.shape[-1:] != (width,):
                return None
            if not torch.allclose(v.reshape(-1, width), expected[low:high], rtol=1e-12, atol=1e-13):
                return None
            return Form(width)

        return match

    return match_for


def _weight_on_input(search: _Search) -> KnownExperts | None:
    """The weight multiplies the expert's input: weights are values of the trace whose support is the routing."""
    study, partition = search.study, search.partition
    chosen = partition.chosen
    every = study.span(0, len(study.probe))
    scale = search.each.abs().max()
    for value in every.values:
        if not value.tensor.is_floating_point() or value.taint & study.expert_leaves:
            continue
        for weights in _dense(value.tensor, chosen, partition.top_k):
            rows = chosen[:, search.expert].nonzero()[:, 0]
            inputs = study.probe[rows] * weights[rows, search.expert, None]
            for layout, tensors in search.candidates:
                for act in (
                    ("silu", "gelu", "gelu_tanh", "relu") if layout.gated else ("!silu", "!gelu", "!relu", "!relu2")
                ):
                    y = apply_expert(inputs, tensors, act)
                    if not (y - search.each[rows, search.expert]).abs().max() < TOLERANCE * scale:
                        continue
                    if _input_fits(search, layout, act, weights):
                        return KnownExperts(layout, act, True, None, weights)
    return None


def _input_fits(search: _Search, layout: Layout, act: str, weights: Tensor) -> bool:
    scale = search.each.abs().max()
    for e in range(search.partition.num_experts):
        rows = search.partition.chosen[:, e].nonzero()[:, 0]
        y = apply_expert(search.study.probe[rows] * weights[rows, e, None], search.weights(layout, e), act)
        if len(rows) and not (y - search.each[rows, e]).abs().max() < TOLERANCE * scale:
            return False
    return True


def _dense(v: Tensor, chosen: Tensor, top_k: int) -> list[Tensor]:
    """A value as weights [P, E] that are zero exactly where no expert was chosen."""
    num_rows, num_experts = chosen.shape
    forms = []
    if v.numel() == num_rows * num_experts:
        forms = [v.reshape(num_rows, num_experts), v.reshape(num_experts, num_rows).T]
    if v.numel() == num_rows and top_k == 1:
        forms.append(torch.zeros(chosen.shape, dtype=v.dtype).masked_scatter_(chosen, v.reshape(-1)))
    return [f for f in forms if torch.equal(f != 0, chosen)]

"""Dividing bytes among experts: never over the size, nearly as good as can be; sensitivity follows heat and error."""

from __future__ import annotations

import itertools

import pytest
import torch
from moe_block import experts_op, softmax_route
from passing import Case, function_case

from moec.passes.group_expert_gemms import GroupExpertGemms
from moec.passes.infra.base import PassContext
from moec.passes.infra.errors import PassError
from moec.passes.infra.runner import run_passes
from moec.passes.ir.formats import FormatError, parse_format
from moec.passes.ir.quantised import formats_of
from moec.passes.ir.weights import weights_of
from moec.passes.quantise_weights import QuantiseWeights, WeightPlan
from moec.passes.quantising.budget import choose, together
from moec.passes.quantising.plan import SizeBudget
from moec.passes.quantising.sensitivity import ExpertCost, measure

pytestmark = pytest.mark.null
FORMATS = [parse_format(n) for n in ("int2-g16", "int4-g32", "int8")]


def costs(seed: int, experts: int = 4) -> list[ExpertCost]:
    """Convex costs: each exchange takes off less error per byte than the one before."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for e in range(experts):
        a, b, c = (torch.rand(3, generator=g) * 10).sort(descending=True).values.tolist()
        made.append(ExpertCost(e // 2, e, 100, ((30, a + b + c), (45, b + c), (82, c))))
    return made


def total(some: list[ExpertCost], chosen: list[int]) -> tuple[float, float]:
    picked = [c.options[i] for c, i in zip(some, chosen, strict=True)]
    return sum(p[0] for p in picked if p), sum(p[1] for p in picked if p)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [172, 200, 260, 328])
def test_no_choice_within_the_size_is_much_better(seed: int, size: int) -> None:
    """All choices tried: the greedy one's error is at most that of the best within the size less its last exchange."""
    some = costs(seed)
    found = [FORMATS.index(f) for f in choose(some, FORMATS, size)]
    num_bytes, error = total(some, found)
    assert num_bytes <= size
    every = [total(some, list(c)) for c in itertools.product(range(3), repeat=len(some))]
    assert error <= min(e for b, e in every if b <= size - 52)


def test_too_small_a_size_says_what_is_needed() -> None:
    with pytest.raises(FormatError, match=r"need at least 0.0 MB in the smallest formats that fit them"):
        choose(costs(0), FORMATS, 119)
    with pytest.raises(FormatError, match="layer 0, expert 0: no format divides its widths"):
        choose([ExpertCost(0, 0, 100, (None, None, None))], FORMATS, 1e9)


def test_layers_are_sums_of_their_experts() -> None:
    some = [ExpertCost(0, 0, 10, ((1, 4.0), None)), ExpertCost(0, 1, 10, ((2, 5.0), (3, 1.0)))]
    assert together(some) == [ExpertCost(0, -1, 20, ((3, 9.0), None))]


def block() -> Case:
    """A gate that never chooses expert 5, and likes expert 2."""
    g = torch.Generator().manual_seed(0)
    shapes = {"router": (8, 32), "w_in": (8, 128, 32), "w_out": (8, 32, 64)}
    made = {n: torch.randn(shape, generator=g) / shape[-1] ** 0.5 for n, shape in shapes.items()}
    x = torch.randn(64, 32, generator=g)
    x[:, 0] = 3.0
    made["router"][2, 0], made["router"][5, 0] = 2.0, -9.0
    return function_case(lambda m, x: experts_op(m, x, *softmax_route(m, x)), x, **made)


@pytest.mark.parametrize("grouped", [False, True])
def test_sensitivity_follows_heat_and_bits(grouped: bool) -> None:
    case = block()
    if grouped:
        case.prepare(GroupExpertGemms())
    layers, found = measure(case.gm, case.inputs, case.read, FORMATS)
    assert len(layers) == 1 and len(found) == 8
    errors = torch.tensor([[o[1] for o in c.options if o] for c in found])
    assert bool((errors[:, 0] > errors[:, 1]).all() and (errors[:, 1] > errors[:, 2]).all())
    assert int(errors[:, 0].argmax()) == 2
    assert 0 < float(errors[5, 0]) < float(errors[:, 0].median())  # never chosen, and measured all the same


def test_a_budget_is_kept_and_spent_on_the_busy_expert() -> None:
    case = block()
    plan = WeightPlan(budget=SizeBudget(case.inputs, bits=4.5))
    context = PassContext(read=case.read, options={"quantise-weights": plan})
    ledger = run_passes(case.gm, (QuantiseWeights(),), context, evidence="sampled").ledgers["quantise-weights"]
    assert len(ledger.matched) == 2
    stacks = [w for w in weights_of(case.gm).values() if formats_of(w)]
    used = sum(f.matrix_bytes(*w.shape[1:]) for w in stacks for f in formats_of(w))
    values = sum(torch.Size(w.shape).numel() for w in stacks)
    assert 0.8 * 4.5 <= 8 * used / values <= 4.5
    by_expert = formats_of(stacks[0])
    assert by_expert[2].bits >= max(f.bits for f in by_expert) > by_expert[5].bits


def test_one_format_for_a_layer() -> None:
    case = block()
    plan = WeightPlan(budget=SizeBudget(case.inputs, num_bytes=60e3, by_layer=True))
    run_passes(case.gm, (QuantiseWeights(),), PassContext(read=case.read, options={"quantise-weights": plan}))
    formats = [formats_of(w) for w in weights_of(case.gm).values() if formats_of(w)]
    assert len(formats) == 2 and formats[0] == formats[1] and len(formats[0]) == 1


def test_a_budget_below_everything_else_is_refused() -> None:
    plan = WeightPlan(budget=SizeBudget(block().inputs, num_bytes=500.0))
    context = PassContext(read=block().read, options={"quantise-weights": plan})
    with pytest.raises(PassError, match="give more bytes"):
        run_passes(block().gm, (QuantiseWeights(),), context)

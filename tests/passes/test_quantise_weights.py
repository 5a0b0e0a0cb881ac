"""quantise-weights: formats by kind of weight, checkpoints kept as they are, and what does not fit refused."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from moe_block import experts_op, softmax_route
from passing import Case, experts_apart, family_case, function_case

from moec.passes import quantise_weights
from moec.passes.group_expert_gemms import GroupExpertGemms
from moec.passes.infra.base import Ledger, PassContext
from moec.passes.infra.errors import PassError
from moec.passes.infra.runner import PipelineResult, run_passes
from moec.passes.ir import weights as recipes
from moec.passes.ir.formats import WeightFormat, parse_format
from moec.passes.ir.quantise import Parts, dequantise_parts, quantise
from moec.passes.ir.quantised import by_expert, formats_of, plainly_grouped, quantised, stored_format
from moec.passes.ir.text import graph_text
from moec.passes.ir.weights import Weight, dequantised, gathered, source, stack, transpose, unpacked, weights_of
from moec.passes.lift_experts import LiftExperts
from moec.passes.quantise_weights import QuantiseWeights, WeightPlan

pytestmark = pytest.mark.null
PASS = QuantiseWeights()


def block(rounded_to: str = "") -> Case:
    """A softmax gate and 8 experts of 32 -> 64 -> 32, their stacks rounded to a format where one is named."""
    g = torch.Generator().manual_seed(0)
    shapes = {"router": (8, 32), "w_in": (8, 128, 32), "w_out": (8, 32, 64)}
    parameters = {n: torch.randn(shape, generator=g) / shape[-1] ** 0.5 for n, shape in shapes.items()}
    if rounded_to:
        for n in ("w_in", "w_out"):
            format = parse_format(rounded_to).fitted(parameters[n].shape[-1])
            parameters[n] = torch.stack([dequantise_parts(quantise(w, format, n)) for w in parameters[n]])
    return function_case(
        lambda m, x: experts_op(m, x, *softmax_route(m, x)), torch.randn(9, 32, generator=g), **parameters
    )


def run(case: Case, evidence: str = "sampled", **plan: object) -> PipelineResult:
    context = PassContext(read=case.read, options={PASS.name: WeightPlan(**plan)})  # type: ignore[arg-type]
    return run_passes(case.gm, (PASS,), context, evidence=evidence)


def ledger(case: Case, **plan: object) -> Ledger:
    return run(case, **plan).ledgers[PASS.name]


def formats_in(case: Case) -> dict[str, list[str]]:
    """Format names by the weight's attribute, of weights that the graph reads and that are quantised."""
    read = {str(n.target) for n in case.gm.graph.find_nodes(op="get_attr")}
    found = {name: [f.name for f in formats_of(w)] for name, w in weights_of(case.gm).items() if name in read}
    return {name: formats for name, formats in found.items() if formats}


def by_role(**formats: str) -> dict[str, object]:
    return {"by_role": {role: parse_format(name) for role, name in formats.items()}}


def test_fires(golden) -> None:
    case = block()
    run(case, **by_role(experts="int4-g32"))
    golden("experts", graph_text(case.gm))


def test_nothing_is_asked_for_nothing_changes() -> None:
    case = block()
    before = graph_text(case.gm)
    assert ledger(case) == Ledger() and graph_text(case.gm) == before


FORMATS = ["int8", "int4-g32", "fp8-block128", "mxfp4", "ternary"]
TOLERANCE = 2e-5  # of the largest result: float32 sums in another order


@pytest.mark.parametrize("name", FORMATS)
def test_means_the_numbers_of_its_codes(name: str) -> None:
    """The graph gives what the same function gives on the dequantised stacks."""
    case, rounded = block(), block(name)
    assert float((case.value() - rounded.value()).abs().max()) > 100 * TOLERANCE
    result = run(case, **by_role(experts=name))
    case.prepare(GroupExpertGemms())
    wanted = rounded.value()
    assert float((case.value() - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max())
    errors = [e.max_rel_err for e in result.evidence if e.max_rel_err is not None]
    assert errors and max(errors) <= TOLERANCE and {e.tolerance for e in result.evidence} == {TOLERANCE}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("stored", ["stacks", "experts"])
def test_evidence_sees_experts_in_another_order(name: str, stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However coarse the format: rounding hides nothing. stored: what the checkpoint has a tensor for."""

    def swapped(weight: Weight, format: WeightFormat, what: str) -> Weight:
        first, *rest = by_expert(weight)
        return stack([quantised(one, format, what) for one in (*rest, first)])

    monkeypatch.setattr(quantise_weights, "quantised", swapped)
    with pytest.raises(PassError, match="changed the meaning"):
        run(block() if stored == "stacks" else experts_apart(block()), **by_role(experts=name))


def test_evidence_rounds_each_expert_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both versions and all probes share it: rounding takes most of the time of a compilation."""
    count = Counter[str]()

    def quantise_and_count(numbers: torch.Tensor, format: WeightFormat, what: str) -> Parts:
        count[what] += 1
        return quantise(numbers, format, what)

    monkeypatch.setattr(recipes, "quantise", quantise_and_count)
    result = run(experts_apart(block()), **by_role(experts="int4-g32"))
    assert result.evidence and len(count) == 16 and set(count.values()) == {1}


def test_each_kind_of_weight_has_its_format() -> None:
    case = family_case("qwen2_moe")
    case.prepare(LiftExperts())
    found = ledger(case, **by_role(experts="int8", lm_head="fp8", embedding="int4-g32"))
    kinds = {m.detail.split(":")[0] for m in found.matched}
    assert kinds == {"experts", "lm_head", "embedding"} and not found.refused
    names = formats_in(case)
    assert sorted({f for formats in names.values() for f in formats}) == ["fp8", "int4-g32", "int8"]


def test_experts_may_differ() -> None:
    case = block()
    stacks = {str(n.target): weights_of(case.gm)[str(n.target)] for n in case.gm.graph.find_nodes(op="get_attr")}
    names = [name for name, w in stacks.items() if len(w.shape) == 3]
    mixed = [parse_format(n) for n in ("int8", "int4-g32", "int2-g16", "f32")] * 2
    found = ledger(case, by_expert=dict.fromkeys(names, mixed))
    assert all("2 x int8, 2 x int4-g32, 2 x int2-g16, 2 x f32" in m.detail for m in found.matched)
    assert len(found.matched) == 2


def test_runs_twice_as_once() -> None:
    case = block()
    context = PassContext(read=case.read, options={PASS.name: WeightPlan(**by_role(experts="int8"))})  # type: ignore[arg-type]
    assert PASS.run(case.gm, context).changed
    assert not PASS.run(case.gm, context).changed


def test_a_format_that_does_not_divide_names_the_weight() -> None:
    with pytest.raises(PassError, match=r"pass quantise-weights: FormatError: .*w_in.*of 32 values .* groups of 128"):
        run(block(), **by_role(experts="int4-g128"))


def test_infinities_are_refused() -> None:
    case = block()
    good = case.read

    def read(name: str) -> torch.Tensor:
        return torch.full_like(good(name), float("inf")) if name == "w_in" else good(name)

    case = dataclasses.replace(case, read=read)
    with pytest.raises(PassError, match="holds NaN or infinity, which int8 cannot"):
        run(case, **by_role(experts="int8"))


def stored(order: torch.Tensor) -> tuple[Weight, dict[str, torch.Tensor]]:
    """GPTQ's form with a table of groups: 64 columns in two groups."""
    g = torch.Generator().manual_seed(0)
    tensors = {
        "q": torch.randint(-(2**31), 2**31, (8, 32), generator=g, dtype=torch.int64).to(torch.int32),
        "s": (torch.rand(2, 32, generator=g) + 0.5).half(),
        "z": torch.randint(-(2**31), 2**31, (2, 4), generator=g, dtype=torch.int64).to(torch.int32),
        "g": order.to(torch.int32),
    }
    codes, scales, zeros, table = (source(n, tuple(t.shape), t.dtype) for n, t in tensors.items())
    grids = [gathered(scales, table), gathered(unpacked(zeros, 4, 1), table)]
    return transpose(dequantised(unpacked(codes, 4, 0), grids[0], grids[1], (1, 1), 1), 0, 1), tensors


def test_a_plain_table_of_groups_is_taken_out() -> None:
    weight, tensors = stored(torch.arange(64) // 32)
    plain = plainly_grouped(stack([weight, weight]), tensors.__getitem__)
    format = stored_format(plain)
    assert format is not None and format.name == "int4-g32-asym-f16"
    numbers = plain.materialise(tensors.__getitem__)
    assert torch.equal(numbers, stack([weight, weight]).materialise(tensors.__getitem__))


def test_columns_in_an_order_of_their_own_stay() -> None:
    weight, tensors = stored(torch.arange(64).flip(0) // 32)
    assert plainly_grouped(weight, tensors.__getitem__) == weight and stored_format(weight) is None


def test_what_a_checkpoint_stores_is_in_the_ledger() -> None:
    """Kept where it is a known format, and said to be kept as numbers where it is not."""
    case = block()
    weights = weights_of(case.gm)
    for name, weight in list(weights.items()):
        if len(weight.shape) == 3:
            block_shape = (1, weight.shape[2]) if name == "w_in" else (2, 2)
            e, n, k = weight.shape
            grid = (e, n // block_shape[0], k // block_shape[1])
            codes, scales = source("q", weight.shape, torch.int8), source("s", grid, torch.float32)
            weights[name] = dequantised(codes, scales, None, block_shape)
    found = run(case, evidence="off").ledgers[PASS.name]
    assert [m.detail for m in found.matched] == ["experts: int8, as in the checkpoint"]
    (refused,) = found.refused
    assert (
        "kept as numbers of torch.float32: integers with scales of torch.float32 for blocks of 2 x 2" in refused.reason
    )


def test_experts_that_do_not_pack_stay_in_both_stacks() -> None:
    """An expert with many zeros in one stack keeps its layer bf16, with the reason; the others are packed."""
    packs = block("bf16")
    found = ledger(packs, by_role={"experts": parse_format("bf16-packed")})
    assert not found.refused and len(found.matched) == 2
    assert set(formats_in(packs)) == {"w_in_quantised", "w_out_quantised"}
    g = torch.Generator().manual_seed(0)
    pruned = torch.randn(8, 32, 64, generator=g) * (torch.rand(8, 32, 64, generator=g) < 0.5)
    case = function_case(
        lambda m, x: experts_op(m, x, *softmax_route(m, x)),
        torch.randn(9, 32, generator=g),
        router=torch.randn(8, 32, generator=g),
        w_in=torch.randn(8, 128, 32, generator=g),
        w_out=pruned,
    )
    found = ledger(case, by_role={"experts": parse_format("bf16-packed")})
    assert not formats_in(case) and not found.matched
    assert [r.node for r in found.refused] == ["w_in", "w_out"]
    for refused in found.refused:
        assert "kept as torch.float32: w_out, expert 0: " in refused.reason
        assert "bf16-packed has room for 7" in refused.reason
    again = ledger(case, by_role={"experts": parse_format("bf16-packed")})
    assert again == found


def test_codes_of_a_checkpoint_that_do_not_pack_stay_codes() -> None:
    """Codes of 4 bits have many zeros; nothing is expanded because of it."""
    weight, tensors = stored(torch.arange(64) // 32)
    case = block()
    weights_of(case.gm)["w_in"] = stack([weight] * 8)
    tensors |= {n: case.read(n) for n in ("router", "w_out")}
    context = PassContext(
        read=tensors.__getitem__, options={PASS.name: WeightPlan({"experts": parse_format("bf16-packed")})}
    )
    found = run_passes(case.gm, (PASS,), context, evidence="off").ledgers[PASS.name]
    assert formats_in(case)["w_in_quantised"] == ["int4-g32-asym-f16"]
    assert "kept as int4-g32-asym-f16: w_in, expert 0: " in found.refused[0].reason

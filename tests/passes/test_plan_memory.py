"""plan-memory: values that are alive together never overlap, whatever the symbols are."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from passing import family_case

from moec.passes.infra.base import PassContext
from moec.passes.infra.errors import PassError
from moec.passes.infra.polynomial import Polynomial
from moec.passes.plan_memory import ALIGN_BYTES, Lifetime, MemoryPlan, PlanMemory, find_overlap, lifetimes, plan_memory

SIZES = st.one_of(
    st.integers(0, 5000),
    st.tuples(st.integers(1, 300), st.integers(0, 300)).map(lambda ab: f"{ab[0]}*T + {ab[1]}"),
    st.tuples(st.integers(1, 9), st.integers(1, 9)).map(lambda ab: f"{ab[0]}*N*T + {ab[1]}*(T//2)"),
    st.integers(1, 64).map(lambda a: f"max(T, {a})*4"),
)
SPANS = st.tuples(st.integers(0, 30), st.integers(0, 12)).map(lambda s: (s[0], s[0] + s[1]))
VALUES = st.lists(st.tuples(SIZES, SPANS), max_size=40).map(
    lambda items: [Lifetime(f"v{i}", size, *span) for i, (size, span) in enumerate(items)]
)


@pytest.mark.null
@settings(max_examples=150, deadline=None)
@given(VALUES, st.dictionaries(st.sampled_from("TN"), st.integers(0, 4096), min_size=2))
def test_no_two_living_values_overlap(values: list[Lifetime], symbols: dict[str, int]) -> None:
    plan = plan_memory(values)
    assert find_overlap(values, plan, symbols) is None
    assert set(plan.offsets) == {v.name for v in values}


@pytest.mark.null
@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_the_arena_is_no_larger_than_all_values_together(values: list[Lifetime]) -> None:
    """And never smaller than what one step needs."""
    symbols = {"T": 256, "N": 256}
    end = Polynomial.of(plan_memory(values).num_bytes).value(symbols)
    padded = [Polynomial.of(v.num_bytes).rounded_up(ALIGN_BYTES).value(symbols) for v in values]
    assert end <= sum(padded)
    for step in range(45):
        alive = [v for v in values if v.first <= step <= v.last]
        assert end >= sum(Polynomial.of(v.num_bytes).value(symbols) for v in alive)


@pytest.mark.null
def test_a_chain_needs_two_places() -> None:
    values = [Lifetime(f"v{i}", "64*T", i, i + 1) for i in range(9)]
    plan = plan_memory(values)
    assert plan.num_bytes == "128*T"
    assert {plan.offsets[v.name] for v in values} == {0, "64*T"}


@pytest.mark.null
def test_the_checker_sees_overlaps_misalignment_and_overruns() -> None:
    a, b = Lifetime("a", "64*T", 0, 2), Lifetime("b", 64, 2, 3)
    assert find_overlap([a, b], MemoryPlan({"a": 0, "b": 64}, "64*T + 64"), {"T": 2}) == "a and b"
    assert find_overlap([a, b], MemoryPlan({"a": 0, "b": 64}, "64*T + 64"), {"T": 1}) is None
    assert "of 64" in str(find_overlap([a], MemoryPlan({"a": 0}, 64), {"T": 2}))
    assert "at bytes 8" in str(find_overlap([b], MemoryPlan({"b": 8}, 128), {}))


@pytest.mark.null
def test_two_values_of_one_name_are_an_error() -> None:
    with pytest.raises(ValueError, match="the same name"):
        plan_memory([Lifetime("a", 1, 0, 1), Lifetime("a", 1, 2, 3)])


@pytest.mark.null
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_plans_a_model(family: str) -> None:
    case = family_case(family)
    ledger = case.apply(PlanMemory())["plan-memory"]
    plan, values = case.gm.meta["memory_plan"], lifetimes(case.gm)
    assert len(ledger.matched) == len(values) > 50
    for tokens in (1, 2, 33, 4096):
        assert find_overlap(values, plan, {"T": tokens, "N": 3, "L": 32}) is None
    end = Polynomial.of(plan.num_bytes).value({"T": 64, "N": 1, "L": 1})
    total = sum(Polynomial.of(v.num_bytes).value({"T": 64, "N": 1, "L": 1}) for v in values)
    assert end < total / 4, "a model's layers use the same memory one after the other"


@pytest.mark.null
def test_views_keep_their_owner_alive_and_outputs_are_not_placed() -> None:
    case = family_case("mixtral")
    values = {v.name: v for v in lifetimes(case.gm)}
    order = {n.name: i for i, n in enumerate(case.gm.graph.nodes)}
    views = [n for n in case.gm.graph.nodes if n.name.startswith("view") and n.args[0].name in values]
    assert views
    for view in views:
        assert view.name not in values
        assert values[view.args[0].name].last >= max(order[u.name] for u in view.users)
    (output,) = case.gm.graph.output_node().all_input_nodes
    assert output.name not in values and output.args[0].name not in values


@pytest.mark.null
def test_changes_nothing_and_says_so() -> None:
    case = family_case("mixtral")
    assert not PlanMemory().run(case.gm, PassContext()).changed


@pytest.mark.null
def test_a_plan_that_overlaps_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "moec.passes.plan_memory.plan_memory", lambda values: MemoryPlan({v.name: 0 for v in values}, 1 << 30)
    )
    with pytest.raises(PassError, match="pass plan-memory: the memory plan overlaps"):
        family_case("mixtral").apply(PlanMemory())

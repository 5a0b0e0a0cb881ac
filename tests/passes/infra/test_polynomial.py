"""Sizes as polynomials."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.passes.infra.polynomial import Polynomial

ATOMS = st.sampled_from(["T", "N", "3", "64", "(T//2)", "max(T, 7)", "(N - 1)%5"])
TEXTS = st.recursive(
    ATOMS, lambda t: st.tuples(t, st.sampled_from("+*"), t).map(lambda x: f"({x[0]} {x[1]} {x[2]})"), max_leaves=6
)


@pytest.mark.null
@given(TEXTS, st.integers(0, 100), st.integers(1, 100))
def test_value_is_that_of_the_text(text: str, t: int, n: int) -> None:
    symbols = {"T": t, "N": n}
    expected = eval(text, {"max": max}, dict(symbols))
    polynomial = Polynomial.of(text)
    assert polynomial.value(symbols) == expected
    assert Polynomial.of(polynomial.size).value(symbols) == expected


@pytest.mark.null
@given(TEXTS, TEXTS, st.integers(0, 100), st.integers(1, 100))
def test_join_bounds_both_and_rounding_rounds_up(a: str, b: str, t: int, n: int) -> None:
    symbols = {"T": t, "N": n}
    p, q = Polynomial.of(a), Polynomial.of(b)
    assert p.join(q).value(symbols) >= max(p.value(symbols), q.value(symbols))
    rounded = p.rounded_up(64).value(symbols)
    assert rounded >= p.value(symbols) and rounded % 64 == 0


@pytest.mark.null
def test_reads_as_a_person_writes() -> None:
    assert Polynomial.of("2*T*(3 + N) + 5 + 1").size == "2*N*T + 6*T + 6"
    assert Polynomial.of(0).size == 0 and Polynomial.of("T").size == "T" and Polynomial.of("7").size == 7


@pytest.mark.null
def test_bad_input() -> None:
    with pytest.raises(SyntaxError):
        Polynomial.of("2*")
    with pytest.raises(KeyError):
        Polynomial.of("T").value({})
    with pytest.raises(ValueError, match="uses more than"):
        Polynomial.of("f(T)").value({"T": 1})

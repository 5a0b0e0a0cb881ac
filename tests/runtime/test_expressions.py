from __future__ import annotations

import pytest

from moec.runtime.errors import FormatError
from moec.runtime.expressions import evaluate, to_source


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2*T", 14), ("(T + 1)*3", 24), ("T//2 + T%2", 4), ("max(T, 9) - min(T, 3)", 6), ("-T", -7), (5, 5)],
)
def test_evaluates(text: str | int, expected: int) -> None:
    assert evaluate(text, {"T": 7}) == expected


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "T.real",
        "T if T else 1",
        "(lambda: 1)()",
        "X",
        "T/2",
        "T**2",
        "1.5",
        "'a'",
        "max(T, key=T)",
        "T;T",
    ],
)
def test_refuses_all_else(text: str) -> None:
    with pytest.raises(FormatError):
        to_source(text, {"T"})


def test_bool_is_no_size() -> None:
    with pytest.raises(FormatError):
        to_source(True, {"T"})

"""The sweep over transformers' families: two of them, what it calls wrong, and that the committed table is whole."""

from __future__ import annotations

import re
from pathlib import Path

import family_sweep
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.cpu
def test_a_family_that_compiles_and_what_counts_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    values = family_sweep.families()["mixtral"] | {"num_hidden_layers": 1}
    engines, compiled = [], family_sweep.compiled
    monkeypatch.setattr(family_sweep, "compiled", lambda *given: engines.append(compiled(*given)) or engines[-1])
    row = family_sweep.study("mixtral", values)
    assert (row.status, row.gate) == ("ok", "softmax, top 2, renormalised")
    assert row.sites == {"gates": "1/1", "norms": "3/3", "ropes": "2/2", "experts": "1/1"}
    assert 0 < row.error <= family_sweep.REL_TOLERANCE
    expected = family_sweep.expected
    monkeypatch.setattr(family_sweep, "compiled", lambda *given: engines[0])
    monkeypatch.setattr(family_sweep, "expected", lambda model, prompt: -expected(model, prompt))
    row = family_sweep.study("mixtral", values)
    assert (row.status, row.reason) == ("wrong", "greedy tokens differ")
    assert "**wrong: greedy tokens differ**" in family_sweep.document([row])


@pytest.mark.null
def test_a_family_that_is_refused() -> None:
    without_a_name = family_sweep.families()["mixtral"] | {"hidden_act": "mish"}
    row = family_sweep.study("mixtral", without_a_name)
    assert (row.status, row.error) == ("refused", None)
    assert "MixtralExperts" in row.reason
    assert f"| `mixtral` | refused | {row.reason} |" in family_sweep.document([row])


@pytest.mark.null
def test_the_committed_table_lists_every_family() -> None:
    text = (ROOT / "docs" / "models.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert len(family_sweep.families()) == 61
    assert sorted(listed) == sorted(family_sweep.families())
    assert "wrong:" not in text

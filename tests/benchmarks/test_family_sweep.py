"""The sweep over transformers' families: two of them, what it calls wrong, and that the committed table is whole."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    spec = importlib.util.spec_from_file_location("family_sweep", ROOT / "benchmarks" / "family_sweep.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.cpu
def test_a_family_that_compiles_and_what_counts_as_wrong(sweep: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    values = sweep.families()["mixtral"] | {"num_hidden_layers": 1}
    engines, compiled = [], sweep.compiled
    monkeypatch.setattr(sweep, "compiled", lambda *given: engines.append(compiled(*given)) or engines[-1])
    row = sweep.study("mixtral", values)
    assert (row.status, row.gate) == ("ok", "softmax, top 2, renormalised")
    assert row.sites == {"gates": "1/1", "norms": "3/3", "ropes": "2/2", "experts": "1/1"}
    assert 0 < row.error <= sweep.REL_TOLERANCE
    expected = sweep.expected
    monkeypatch.setattr(sweep, "compiled", lambda *given: engines[0])
    monkeypatch.setattr(sweep, "expected", lambda model, prompt: -expected(model, prompt))
    row = sweep.study("mixtral", values)
    assert (row.status, row.reason) == ("wrong", "greedy tokens differ")
    assert "**wrong: greedy tokens differ**" in sweep.document([row])


@pytest.mark.null
def test_a_family_that_is_refused(sweep: ModuleType) -> None:
    row = sweep.study("mixtral", {**sweep.families()["mixtral"], "hidden_act": "mish"})  # an activation without a name
    assert (row.status, row.error) == ("refused", None)
    assert "MixtralExperts" in row.reason
    assert f"| `mixtral` | refused | {row.reason} |" in sweep.document([row])


@pytest.mark.null
def test_the_committed_table_lists_every_family(sweep: ModuleType) -> None:
    text = (ROOT / "docs" / "models.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert len(sweep.families()) == 61
    assert sorted(listed) == sorted(sweep.families())
    assert "wrong:" not in text

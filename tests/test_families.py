"""Every family through the whole path: tiny engines give transformers' greedy tokens, batched and one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from zoo import TINY, build, tiny

import moec

PROMPT_LENGTHS = (5, 13, 1, 9)
NEW_TOKENS = 32


def prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(1, vocab_size, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def greedy(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    with torch.no_grad():
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
    return whole[0, len(prompt) :].tolist()


@pytest.mark.cpu
@pytest.mark.parametrize("family", TINY)
def test_greedy_tokens_equal_transformers(family: str, tmp_path: Path) -> None:
    model = build(tiny(family))
    engine = moec.compile(model, verify="off", output=tmp_path / family)
    asked = prompts(engine.vocab_size)
    expected = [greedy(model, p) for p in asked]
    assert engine.generate(asked, NEW_TOKENS) == expected
    assert [engine.generate(p, NEW_TOKENS)[0] for p in asked] == expected
    refused = {name: row["refused"] for name, row in engine.inspect()["ledger"].items() if row["refused"]}
    assert all(r["reason"] for rows in refused.values() for r in rows)

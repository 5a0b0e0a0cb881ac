"""What engine.py says of an engine that is right, of one that is not, and of the peer's model; engines are played."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.null
FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "engine", raising=False)
    return importlib.import_module("engine")


class Cache:
    """Counts slots, keeps how many tokens each has."""

    def __init__(self):
        self.lengths = []

    def allocate(self):
        self.lengths.append(0)
        return len(self.lengths) - 1


class Played:
    """An engine whose logits are a function of token and position; off: what it adds to those of decode steps."""

    vocab_size, graph_refusal = 64, None

    def __init__(self, off=0.0):
        self.off, self.prefills = off, []

    def __call__(self, tokens):
        self.prefills.append(tuple(tokens.shape))
        return self.logits(tokens, torch.arange(tokens.shape[1]))

    def logits(self, tokens, positions):
        return torch.cos(tokens[..., None] * 0.3 + positions[:, None] + torch.arange(64) * 0.7)

    def new_cache(self, count, length):
        return Cache()

    def step(self, cache, slots, rows):
        out = []
        for slot, tokens in zip(slots, rows, strict=True):
            cache.lengths[slot] += len(tokens)
            out.append(self.logits(torch.tensor(tokens[-1:]), torch.tensor([cache.lengths[slot] - 1]))[0])
        return torch.stack(out) + self.off * torch.linspace(-1, 1, 64)

    def generate(self, tokens, count, stop_tokens):
        return [[(i + j) % 64 for j in range(count)] for i in range(len(tokens))]


def test_logits_are_compared_with_the_cpus(bench, tmp_path):
    from safetensors.torch import load_file

    bench.expect(Played(), tmp_path / "expected.safetensors")
    expected = load_file(tmp_path / "expected.safetensors")
    assert expected["prefill"].shape == (bench.PROMPTS, bench.PROMPT_LENGTH, 64 // bench.COLUMNS)
    engine = Played()
    right, wrong = bench.check(engine, expected), bench.check(Played(off=0.2), expected)
    assert right["right"] and right["decode"] == {"relative_error": 0.0, "same_best_token": 1.0}
    assert engine.prefills == [(bench.PROMPTS, bench.PROMPT_LENGTH), (1, bench.BETWEEN)]  # one between decode steps
    assert not wrong["right"] and wrong["prefill"]["relative_error"] == 0 and wrong["decode"]["relative_error"] > 0.1
    assert bench.waits(Played()) is None


def test_the_model_is_one_that_transformers_has(bench, tmp_path, monkeypatch):
    from transformers import AutoConfig

    monkeypatch.setattr(sys, "argv", ["engine.py", "model", str(tmp_path / "m")])
    assert bench.main() == 0
    config = AutoConfig.from_pretrained(tmp_path / "m")
    shape = (config.hidden_size, config.moe_intermediate_size, config.num_experts, config.num_experts_per_tok)
    assert shape == (2048, 1408, 64, 6) and config.num_hidden_layers == 4
    assert json.loads((tmp_path / "m" / "config.json").read_text())["shared_expert_intermediate_size"] == 2 * 1408


def test_what_is_not_there_is_one_line(bench, tmp_path, monkeypatch, capsys):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "e.safetensors")
    for arguments in (["check", "absent.engine", str(tmp_path / "e.safetensors")], ["expect", "absent.engine"]):
        monkeypatch.setattr(sys, "argv", ["engine.py", *arguments, "--out", str(tmp_path / "o")])
        assert bench.main() == 1
        told = capsys.readouterr().err
        assert told.startswith("error: absent.engine: no such engine directory") and told.count("\n") == 1

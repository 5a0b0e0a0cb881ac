"""Lowering of plain modules: the program computes what the module computes, for every size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moec
from moec.compiler.capture import capture
from moec.compiler.lowering.emit import UnsupportedOperator, lower
from moec.runtime.executor import Executor
from moec.runtime.program import Program


class Mixer(nn.Module):
    """Several results of one node, sizes in arguments, constants of every kind, and a result that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 12)
        self.tied = nn.Linear(8, 12)
        self.tied.weight = self.linear.weight

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        a, _, b = self.linear(x).split([4, 4, 4], -1)
        best, place = torch.topk(a, 2)
        steps = torch.arange(x.shape[0], dtype=torch.float32)
        masked = self.tied(x).masked_fill(self.tied(x) < 0, -torch.inf).softmax(-1)
        doubled = torch.cat([b, b]).reshape(2 * x.shape[0], 4)
        return (best.sum(-1) + steps + place.sum(-1) * scale), torch.nan_to_num(doubled, 0.0).sum(0) + masked.sum(0)[:4]


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[: x.shape[0] // 2 + 1] * 2


def test_a_module_for_every_size(tmp_path: Path) -> None:
    module = Mixer()
    engine = moec.compile(module, (torch.randn(5, 8), torch.tensor(0.5)), output=tmp_path / "e")
    for rows in (1, 5, 9):
        x = torch.randn(rows, 8)
        for found, expected in zip(engine(x, torch.tensor(0.25)), module(x, torch.tensor(0.25)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # float32 sums in the same order


def test_values_die_at_their_last_use_and_results_stay() -> None:
    lowered = lower(capture(Mixer(), (torch.randn(5, 8), torch.tensor(0.5))))
    program = lowered.program
    dead = [b for s in program.steps for b in s.dies]
    values = {i for i, b in enumerate(program.buffers) if b.kind == "value"}
    assert len(dead) == len(set(dead)) and set(dead) == values - set(program.outputs)
    assert Program.from_json(json.loads(json.dumps(program.to_json()))) == program


def test_equal_weights_are_stored_once() -> None:
    lowered = lower(capture(Mixer(), (torch.randn(5, 8), torch.tensor(0.5))))
    shapes = sorted(w.shape for w in lowered.weights.values())
    assert shapes == [(12,), (12,), (12, 8)]


def test_sizes_are_expressions() -> None:
    program = lower(capture(Half(), (torch.randn(6, 3),))).program
    assert any("T // 2" in str(d) for b in program.buffers for d in b.shape)
    run = Executor(program, {}, {})
    for rows in (1, 6, 7):
        x = torch.randn(rows, 3)
        assert torch.equal(run([x])[0], Half()(x))


def test_an_operator_that_is_not_on_the_list_is_named() -> None:
    class LogGamma(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.lgamma(x)

    with pytest.raises(UnsupportedOperator, match=r"lgamma.* is not on the runtime's list"):
        lower(capture(LogGamma(), (torch.randn(5, 8),)))

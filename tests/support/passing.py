"""What every test of a pass needs: graphs of small modules and of the tiny families, a run, and the common checks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from zoo import TINY, build, tiny

from moec.compiler.capture.captured import Captured
from moec.compiler.capture.entry import capture
from moec.passes.infra.base import Ledger, Pass, PassContext
from moec.passes.infra.errors import PassError
from moec.passes.infra.rewrite import is_call
from moec.passes.infra.runner import run_passes
from moec.passes.ir.copies import copy_of
from moec.passes.ir.evaluate import evaluate
from moec.passes.ir.weights import Read, Weight, source, stack, weights_of

FAMILIES = tuple(TINY)
CASES = [(f, torch.bfloat16) for f in FAMILIES] + [
    (f, torch.float32) for f in ("mixtral", "deepseek_v3", "llama4_text")
]
"""Families and dtypes to run a pass over. In float32 casts vanish and with them most differences of spelling."""

SOME_CASES = [(f, torch.bfloat16) for f in ("mixtral", "deepseek_v3", "llama4_text", "hunyuan_v1_moe", "gpt_oss")]
"""Families that differ most in the shapes between their operations."""


class Function(nn.Module):
    """A module of named parameters around forward(module, *inputs)."""

    def __init__(self, forward: Callable[..., Any], **parameters: torch.Tensor) -> None:
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self._forward = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self._forward(self, x)


@dataclasses.dataclass
class Case:
    """A graph under test, with where its weights come from and inputs to run it with."""

    gm: GraphModule
    read: Read
    inputs: tuple[Any, ...] = ()

    def apply(self, *passes: Pass) -> dict[str, Ledger]:
        """Runs passes with evidence for every kind of changed region; a change of meaning raises."""
        return run_passes(self.gm, passes, PassContext(read=self.read), evidence="sampled").ledgers

    def prepare(self, *passes: Pass) -> None:
        """Runs the passes that the one under test needs before it; their own tests gather the evidence."""
        run_passes(self.gm, passes, PassContext(read=self.read), evidence="off")

    def value(self) -> Any:
        return evaluate(self.gm, [x.clone() for x in self.inputs], self.read)

    def count(self, target: Any) -> int:
        return sum(is_call(n, target) for n in self.gm.graph.nodes)


def function_case(forward: Callable[..., Any], x: torch.Tensor, **parameters: torch.Tensor) -> Case:
    """The graph of forward(module, x), with all dimensions of x but the last symbolic."""
    captured = capture(Function(forward, **parameters), (x,))
    return Case(captured.graph_module, captured.read, (x,))


@functools.cache
def _captured(family: str, dtype: torch.dtype) -> Captured:
    return capture(build(tiny(family), dtype=dtype))


def family_case(family: str, dtype: torch.dtype = torch.float32) -> Case:
    """A fresh copy of a tiny family's captured graph; the capture itself is made once per process."""
    captured = _captured(family, dtype)
    return Case(copy_of(captured.graph_module), captured.read, language_model_inputs(captured))


def experts_apart(case: Case) -> Case:
    """The case with a checkpoint that holds a tensor for each expert, as most published ones do, instead of stacks."""
    weights = weights_of(case.gm)

    def apart(w: Weight) -> Weight:
        if w.op == "source" and len(w.shape) == 3:
            return stack([source(f"{w.args[0]}@{e}", w.shape[1:], w.dtype) for e in range(w.shape[0])])
        return dataclasses.replace(w, inputs=tuple(map(apart, w.inputs)))

    def read(name: str) -> torch.Tensor:
        whole, _, expert = name.partition("@")
        return case.read(whole)[int(expert)].clone() if expert else case.read(whole)

    case.gm.meta["weights"] = {name: apart(w) for name, w in weights.items()}
    return dataclasses.replace(case, read=read)


def language_model_inputs(captured: Captured, tokens: int = 6) -> tuple[Any, ...]:
    """One sequence of `tokens` tokens and one of 2, in empty caches for three sequences of 32."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 100, (tokens + 2,), generator=generator)
    positions = torch.cat([torch.arange(tokens), torch.arange(2)])
    slots = torch.tensor([0] * tokens + [2] * 2)
    caches = [torch.zeros(c.input_shape(3, 32), dtype=c.dtype) for c in captured.info.caches]
    return ids, positions, slots, *caches


def check_runs_once(one: Pass, case: Case) -> None:
    """A second run finds nothing more to change."""
    context = PassContext(read=case.read)
    one.run(case.gm, context)
    assert not one.run(case.gm, context).changed


def check_bad_input(one: Pass, case: Case) -> None:
    """A graph without shapes is refused with the pass's name."""
    for node in case.gm.graph.nodes:
        if node.op == "call_function":
            node.meta.pop("val", None)
    with pytest.raises(PassError, match=f"pass {one.name}"):
        case.apply(one)


def check_same(before: Any, after: Any, tolerance: float = 0.0) -> None:
    """Equal up to `tolerance` relative to the greatest value; 0: bit for bit."""
    assert before.dtype == after.dtype and before.shape == after.shape
    gap = (before.double() - after.double()).abs().max().item()
    assert gap <= tolerance * before.double().abs().max().item()


def reasons(ledger: Ledger) -> Sequence[str]:
    return [r.reason for r in ledger.refused]

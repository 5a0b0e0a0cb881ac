"""Every binding against the op's plain meaning: what the chosen kernels compute through a whole program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moec.compiler.api import build_kernels
from moec.compiler.capture import capture
from moec.compiler.lowering import emit
from moec.compiler.lowering.bind_experts import workspace_size
from moec.compiler.lowering.candidates import Site
from moec.compiler.lowering.packing import make
from moec.compiler.lowering.select import Choice
from moec.compiler.lowering.tuned import Tuning
from moec.compiler.options import CompileOptions
from moec.passes.ir import ops
from moec.passes.ir.gate import GateSpec
from moec.runtime.executor import Executor
from moec.runtime.expressions import evaluate
from moec.runtime.launch.cpu import load_library
from moec.runtime.launch.cpu_features import best_level

LEVEL = best_level()
pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(LEVEL is None, reason="no instruction set that kernels are built for"),
]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / 2


def experts(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None = None, b2: Tensor | None = None, shared: int = 0):
    scores = x[:, : w1.shape[0] - shared].softmax(-1)
    weights, index = torch.topk(scores, 2)
    return ops.experts(x, weights, index.to(torch.int32), w1, w2, b1, b2, None, "silu", shared)


SPEC = GateSpec(2, renormalise=True).encode()
W1, W2 = randn(6, 24, 32), randn(6, 32, 12)
CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, 1e-6), (randn(32),)),
    "rms_norm, heads first": (lambda x, w: ops.rms_norm(x.view(-1, 4, 8).transpose(0, 1), w, 1e-6), (randn(8),)),
    "add_rms_norm": (lambda x, w: torch.cat(ops.add_rms_norm(x, x * 2, w, 1e-6)), (randn(32),)),
    "add_rms_norm, sum unread": (lambda x, w: ops.add_rms_norm(x, x * 2, w, 1e-6)[0], (randn(32),)),
    "rope": (lambda x, c: ops.rope(x.view(-1, 4, 8), x[:, :4] + c, x[:, 4:8], "half", 8), (randn(1),)),
    "gate_linear": (lambda x, w: ops.gate_linear(x, w, None, None, SPEC, "float32")[0], (randn(6, 32),)),
    "gate": (lambda x: ops.gate(x, None, SPEC)[0], ()),
    "linear": (nn.functional.linear, (randn(10, 32), randn(10))),
    "linear of columns": (lambda x, w: nn.functional.linear(x[:, ::2], w), (randn(10, 16),)),
    "gated_mlp": (lambda x, w, v: ops.gated_mlp(x, w, v, None, None, "silu"), (W1[0], W2[0])),
    "experts": (experts, (W1, W2)),
    "experts with biases": (experts, (W1, W2, randn(6, 24), randn(6, 32))),
    "shared experts": (lambda x, a, b: experts(x, a, b, shared=2), (W1, W2)),
}


class All(nn.Module):
    """Every case on one input, so that their kernels are built together."""

    def __init__(self) -> None:
        super().__init__()
        flat = [nn.Parameter(p, requires_grad=False) for _, parameters in CASES.values() for p in parameters]
        self.weights = nn.ParameterList(flat)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rest = list(self.weights)
        return tuple(fn(x, *[rest.pop(0) for _ in parameters]) for fn, parameters in CASES.values())


def nth(number: int, taken: set[str]) -> Callable[..., Choice]:
    """Takes each site's candidate of that number (its last, where it has fewer), lower levels of a kernel left out."""

    def pick(site: Site, tuning: Tuning | None = None) -> Choice:
        lower = tuple(f"-{level}" for level in ("avx2", "avx512f", "avx512-bf16") if level != LEVEL)
        usable = [c for c in site.candidates if c.refused is None]
        best = [c for c in usable if not c.name.endswith(lower[:-1])] or usable
        candidate = best[min(number, len(best) - 1)]
        taken.add(candidate.name.removesuffix(f"-{LEVEL}"))
        return Choice(site, ((None, candidate),))

    return pick


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_candidate_computes_its_op(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = All().eval(), randn(9, 32)
    captured = capture(module, (x,))
    taken: set[str] = set()
    monkeypatch.setattr(emit, "choose", nth(number, taken))
    lowered = emit.lower(captured, LEVEL)
    assert {"library" in n or n in ("aten-linear",) for n in taken} == ({True} if number == 0 else {True, False})
    target = build_kernels(lowered, CompileOptions.of("cpu", None, "off", None), lambda *_: None)
    library = load_library(target.library, target.level) if target.library else {}
    weights = {n: make(w, captured.read) for n, w in lowered.weights.items()}
    run = Executor(lowered.program, weights, {s: library[s] for s in target.symbols})
    for rows in (9, 1, 0):
        with torch.no_grad():
            expected = module(x[:rows])
        for name, found, wanted in zip(CASES, run([x[:rows]]), expected, strict=True):
            # float32 sums of at most 64 products in another order, and a vector exp of 2e-7
            torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_workspace_bound_is_above_every_size() -> None:
    def needed(tokens: int) -> int:
        tokens = min(tokens, 4096)
        return sum(-(-(c * tokens + d) // 64) * 64 for c, d in ((37, 5), (1, 0), (130, 1), (3, 63), (8, 7)))

    size = workspace_size(needed, "T")
    for tokens in [*range(1, 300), 4095, 4096, 4097, 100000]:
        found = evaluate(size, {"T": tokens})
        assert needed(tokens) <= found <= needed(tokens) * 1.1 + 2048

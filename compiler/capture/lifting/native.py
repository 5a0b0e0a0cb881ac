"""The lifted block in the original's own dtype: which dtypes the router uses, found by the smallest difference."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moec.compiler.capture.lifting.calls import leaves, main_index
from moec.compiler.capture.lifting.gates import LinearLogits
from moec.compiler.capture.lifting.held import NARROW, tensors
from moec.compiler.capture.lifting.partition import TRACED
from moec.compiler.capture.lifting.refused import Refused
from moec.compiler.capture.lifting.replacement import Parts, Replacement
from moec.compiler.capture.lifting.study import Study
from moec.compiler.capture.lifting.trace import KEEP

LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Largest median relative error of a row: a few roundings of the dtype, sums in another order."""
FLIPPED = 0.1  # share of rows that may differ more: near ties that rounding decides
NUM_ROWS = 64


def fitted_dtypes(study: Study, parts: Parts) -> tuple[Parts, float]:
    """The parts with the dtypes that agree best, and the median error of a row.

    Raises: Refused("native"): the replacement fails in the block's dtype, or differs in more than its rounding.
    """
    dtype = study.call.dtype
    own = str(dtype).removeprefix("torch.")
    x = study.rows(NUM_ROWS).to(dtype)
    with _Floats() as seen:
        expected = study.native(x).double()
    held = tensors(study.module)
    options = [dataclasses.replace(parts, dtypes=d) for d in _choices(parts, own, _asked(study))]
    tried = [_errors(p, held, x, expected) for p in options]
    scores = [_score(error, dtype) for error, _ in tried]
    exact = [seen.equal(dense) for _, dense in tried]
    best = min(range(len(options)), key=lambda i: (round(scores[i][0], 1), -exact[i], scores[i]))
    return options[best], _accepted(scores[best], dtype)


class _Floats(TorchDispatchMode):
    """Keeps what the block itself makes of floats in its own dtypes; its last weights tell how they are rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and t.is_floating_point() and t.numel() <= KEEP:
                self.values.append(t.detach().clone())
        return out

    def equal(self, dense: Tensor) -> float:
        """Share of the weights [T, E] that the block's last value with about these weights has bit for bit."""
        live = dense != 0
        width = int(live.sum(1).max())
        listed = dense.sort(-1, descending=True).values[:, :width]
        for value in reversed(self.values):
            for want in (listed, dense):
                if value.numel() == want.numel():
                    found = value.reshape(want.shape).float()
                    found = found.sort(-1, descending=True).values if want is listed else found
                    if torch.allclose(found, want, rtol=0.03, atol=0):
                        return float((found == want).double().mean())
        return 0.0


def check_native(parts: Parts, block: nn.Module) -> float:
    """Compares a block with the parts of another of its kind, in its own dtype; gives the median error of a row.

    Raises: Refused("native"): they differ in more than rounding.
    """
    call = parts.call
    generator = torch.Generator().manual_seed(NUM_ROWS)
    x = torch.randn(NUM_ROWS, call.hidden, generator=generator, dtype=torch.float64).to(call.dtype)
    args, kwargs = call.split(call.bind(x))
    with torch.no_grad():
        out = block(*args, **kwargs)
    expected = leaves(out)[main_index(out, NUM_ROWS, call.hidden)].reshape(NUM_ROWS, call.hidden).double()
    return _accepted(_score(_errors(parts, tensors(block), x, expected)[0], call.dtype), call.dtype)


def _score(error: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """The share of rows that differ, and the median error."""
    return float((error > LIMITS[dtype]).double().mean()), float(error.median())


def _accepted(score: tuple[float, float], dtype: torch.dtype) -> float:
    if not (score[0] <= FLIPPED and score[1] <= LIMITS[dtype]):
        raise Refused(
            "native", f"in {dtype} rows differ by {score[1]:.1e} (median), {score[0]:.0%} of them by too much"
        )
    return score[1]


def _choices(parts: Parts, own: str, asked: set[str]) -> list[tuple[str, str, str]]:
    """Dtypes of router product, scores and rounded weights to try. asked: dtypes that the block's code names."""
    wide = "float64" if own == "float64" else "float32"
    if parts.rule is None:
        return [(wide, wide, wide)]
    dtypes = sorted({wide, own, *asked}, key=lambda d: (d != wide, d))
    linear = isinstance(parts.router.logits, LinearLogits)
    found = list(itertools.product(dtypes if linear else dtypes[:1], dtypes, dtypes))
    return sorted(found, key=lambda d: d[1] != wide)  # of equal ones, the scores that are not rounded


def _asked(study: Study) -> set[str]:
    """Narrow dtypes among the arguments of the trace's calls."""
    steps = study.span(0, TRACED).steps
    found = {a for s in steps for a in s.flat if isinstance(a, torch.dtype) and a in NARROW}
    return {str(d).removeprefix("torch.") for d in found}


@torch.no_grad()
def _errors(parts: Parts, held: dict[str, Tensor], x: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """The relative error of each row, and the weights f32[T, E] that it was made with."""
    try:
        lifted = Replacement(parts, held, x.dtype).materialise(held)
        weights, experts = lifted.route(x)
        found = lifted.lifted(x).double()
    except RuntimeError as error:
        raise Refused("native", f"the replacement fails in {x.dtype}: {str(error).splitlines()[0][:120]}") from error
    width = max(parts.partition.num_experts, parts.router.num_logits)
    dense = torch.zeros(len(x), width).scatter_add(1, experts.long(), weights.float())
    return (found - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-30), dense

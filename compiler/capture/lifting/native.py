"""The lifted block in the original's own dtype: which dtypes the router uses, found by the smallest difference."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor, nn

from moec.compiler.capture.lifting.calls import leaves, main_index
from moec.compiler.capture.lifting.gates import LinearLogits
from moec.compiler.capture.lifting.held import NARROW, tensors
from moec.compiler.capture.lifting.partition import TRACED
from moec.compiler.capture.lifting.refused import Refused
from moec.compiler.capture.lifting.replacement import Parts, Replacement
from moec.compiler.capture.lifting.study import Study

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
    expected = study.native(x).double()
    held = tensors(study.module)
    options = [dataclasses.replace(parts, dtypes=d) for d in _choices(parts, own, _asked(study))]
    scores = [_score(_errors(p, held, x, expected), dtype) for p in options]
    best = min(range(len(options)), key=lambda i: scores[i])
    return options[best], _accepted(scores[best], dtype)


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
    return _accepted(_score(_errors(parts, tensors(block), x, expected), call.dtype), call.dtype)


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
    return list(itertools.product(dtypes if linear else dtypes[:1], dtypes, dtypes))


def _asked(study: Study) -> set[str]:
    """Narrow dtypes among the arguments of the trace's calls."""
    steps = study.span(0, TRACED).steps
    found = {a for s in steps for a in s.flat if isinstance(a, torch.dtype) and a in NARROW}
    return {str(d).removeprefix("torch.") for d in found}


@torch.no_grad()
def _errors(parts: Parts, held: dict[str, Tensor], x: Tensor, expected: Tensor) -> Tensor:
    try:
        found = Replacement(parts, held, x.dtype).materialise(held).lifted(x).double()
    except RuntimeError as error:
        raise Refused("native", f"the replacement fails in {x.dtype}: {str(error).splitlines()[0][:120]}") from error
    return (found - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-30)

"""The lifted block in the original's own dtype: which dtypes the router uses, found by the smallest difference."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from moec.compiler.capture.lifting.gates import LinearLogits
from moec.compiler.capture.lifting.held import tensors
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
    best: tuple[float, float, Parts] | None = None
    for dtypes in _choices(parts, own):
        candidate = dataclasses.replace(parts, dtypes=dtypes)
        error = _errors(candidate, held, x, expected)
        score = (float((error > LIMITS[dtype]).double().mean()), float(error.median()))
        if best is None or score < best[:2]:
            best = (*score, candidate)
    assert best is not None
    if not (best[1] <= LIMITS[dtype] and best[0] <= FLIPPED):
        raise Refused("native", f"in {own} rows differ by {best[1]:.1e} (median), {best[0]:.0%} of them by too much")
    return best[2], best[1]


def _choices(parts: Parts, own: str) -> list[tuple[str, str, str]]:
    wide = "float64" if own == "float64" else "float32"
    if own in ("float32", "float64") or parts.rule is None:
        return [(wide, wide, wide)]
    linear = isinstance(parts.router.logits, LinearLogits)
    return list(itertools.product((wide, own) if linear else (wide,), (wide, own), (wide, own)))


@torch.no_grad()
def _errors(parts: Parts, held: dict[str, Tensor], x: Tensor, expected: Tensor) -> Tensor:
    try:
        found = Replacement(parts, held, x.dtype).materialise(held).lifted(x).double()
    except RuntimeError as error:
        raise Refused("native", f"the replacement fails in {x.dtype}: {str(error).splitlines()[0][:120]}") from error
    return (found - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-30)

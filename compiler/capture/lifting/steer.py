"""Rows with given logits: how probes reach every expert, and the places where two rules differ."""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.capture.lifting.gates import Router
from moec.compiler.capture.lifting.program import NotGeneral
from moec.compiler.capture.lifting.study import Study

STEPS = 4  # of Gauss-Newton, where the router is not affine


def steer(study: Study, router: Router, targets: Tensor) -> Tensor:
    """Rows [n, H] whose logits are `targets` [n, E] as nearly as the router allows; without those that got nowhere.

    Empty where the block has no logits to steer by.
    """
    if router.logits is None:
        return study.rows(0)
    x = study.rows(len(targets))
    try:
        x = _steered(study, router, targets, x)
    except (RuntimeError, NotGeneral):  # no gradient, or a singular system: the caller has random rows as well
        return study.rows(0)
    return x[torch.isfinite(x).all(1)].detach()


def _steered(study: Study, router: Router, targets: Tensor, x: Tensor) -> Tensor:
    zero, a, b = torch.zeros_like(x[:1]), x[:1], x[1:2]
    at = lambda rows: router.logits_of(study, rows)  # noqa: E731
    affine = bool((at(a) + at(b) - at(a + b) - at(zero)).abs().max() < 1e-9 * at(a).abs().max())
    for _ in range(1 if affine else STEPS):
        jacobian, logits = _jacobian(study, router, x[:1] if affine else x)
        logits = at(x) if affine else logits
        x = x + (torch.linalg.pinv(jacobian) @ (targets - logits)[..., None])[..., 0]
    return x


def _jacobian(study: Study, router: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    """d logits / d row of each row: [n, E, H], and the logits."""
    with torch.enable_grad():
        rows = x.detach().requires_grad_(True)
        logits = router.logits_of(study, rows)
        parts = [torch.autograd.grad(logits[:, e].sum(), rows, retain_graph=True)[0] for e in range(logits.shape[1])]
    return torch.stack(parts, 1), logits.detach()

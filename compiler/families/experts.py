"""Experts as checkpoints of these families store them, a module each, and as a graph wants them, stacked.

ExpertList is the reference: a loop over experts, parameters under their published names. For a capture stack_experts
puts StackedExperts in its place, whose tensors are made from the list's: the graph does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moec.passes.ir.activation import FUNCTIONS
from moec.passes.ir.weights import Weight, concat, stack

Names = tuple[str, str, str]  # what a checkpoint calls the gate, up and down projections of an expert


class Expert(nn.Module):
    """x [.., H] -> down(act(gate(x)) * up(x)) [.., H]; the projections have the given names."""

    def __init__(self, hidden: int, inner: int, names: Names, act: str) -> None:
        super().__init__()
        self.names, self.act = names, act
        gate, up, down = names
        self.add_module(gate, nn.Linear(hidden, inner, bias=False))
        self.add_module(down, nn.Linear(inner, hidden, bias=False))
        self.add_module(up, nn.Linear(hidden, inner, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(n) for n in self.names)
        return down(FUNCTIONS[self.act](gate(x)) * up(x))


class ExpertList(nn.ModuleList):
    """The routed experts of one layer: x [T,H], weights [T,K], index i64[T,K] -> [T,H], summed in x.dtype."""

    def __init__(self, num_experts: int, hidden: int, inner: int, names: Names, act: str) -> None:
        super().__init__([Expert(hidden, inner, names, act) for _ in range(num_experts)])
        self.names, self.act = names, act

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """Each expert on its own rows, in the order of their numbers."""
        y = torch.zeros_like(x)
        for e, expert in enumerate(self):
            rows, k = (index == e).nonzero(as_tuple=True)
            if len(rows):
                y.index_add_(0, rows, (expert(x[rows]) * weights[rows, k, None]).to(x.dtype))
        return y


class StackedExperts(nn.Module):
    """The same as moec::experts: gate_up_proj [E,2F,H] with the gate half first, down_proj [E,H,F], both on meta."""

    def __init__(self, experts: ExpertList) -> None:
        super().__init__()
        gate, _, down = (experts[0].get_parameter(f"{n}.weight") for n in experts.names)  # [F, H], [F, H], [H, F]
        self.act = experts.act
        self.gate_up_proj = _on_meta((len(experts), 2 * gate.shape[0], gate.shape[1]), gate.dtype)
        self.down_proj = _on_meta((len(experts), *down.shape), down.dtype)

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        return torch.ops.moec.experts(x, weights, index, self.gate_up_proj, self.down_proj, None, None, None, self.act)


def _on_meta(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def stack_experts(model: nn.Module, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Replaces every ExpertList of a model on meta by StackedExperts; returns the weights and the stacks' recipes.

    weights: those of the model as it is, by parameter name.
    """
    found = dict(weights)
    for path, experts in [(n, m) for n, m in model.named_modules() if isinstance(m, ExpertList)]:
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent).add_module(name, StackedExperts(experts))
        gates, ups, downs = (
            [weights[f"{path}.{e}.{projection}.weight"] for e in range(len(experts))] for projection in experts.names
        )
        found[f"{path}.gate_up_proj"] = stack([concat([g, u], 0) for g, u in zip(gates, ups, strict=True)])
        found[f"{path}.down_proj"] = stack(downs)
    return found

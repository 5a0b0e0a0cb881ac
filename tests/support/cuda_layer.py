"""One expert layer for the CUDA GEMMs: routing, its dispatch and tile map, and float64 references."""

import dataclasses

import pytest
import torch
from torch import Tensor

from moec.compiler.codegen.emulator.emulator import EmulationError
from moec.compiler.kernels.cuda.gemm_problem import GemmProblem
from moec.passes.ir import ops
from moec.passes.ir.activation import Activation


@dataclasses.dataclass
class Routed:
    """What dispatch makes of experts i32[T,K], as arguments of a GEMM whose blocks have tile_rows rows."""

    experts: Tensor
    num_experts: int
    num_shared: int
    tile_rows: int
    spare_tiles: int = 1  # tiles with nothing to do

    def __post_init__(self):
        self.slots_per_token = self.experts.shape[1] + self.num_shared
        self.slot_order, self.expert_start = ops.dispatch(self.experts, self.num_experts, self.num_shared)
        bounds = self.expert_start.tolist()
        tiles = [(e, row) for e in range(len(bounds) - 1) for row in range(bounds[e], bounds[e + 1], self.tile_rows)]
        tiles += [(-1, -1)] * self.spare_tiles
        self.tile_expert = torch.tensor([e for e, _ in tiles], dtype=torch.int32)
        self.tile_row = torch.tensor([row for _, row in tiles], dtype=torch.int32)

    def values(self):
        names = ("slot_order", "expert_start", "tile_expert", "tile_row")
        sizes = {"slots": len(self.slot_order), "tiles": len(self.tile_expert)}
        return {name: getattr(self, name) for name in names} | sizes

    def slot_expert(self):
        """Expert of each row in slot_order: i64[S]."""
        counts = self.expert_start.diff().long()
        return torch.repeat_interleave(torch.arange(len(counts)), counts)


def skewed(num_tokens, num_experts, top_k, empty=()):
    """experts i32[T,K]: some experts get most tokens, those in `empty` none."""
    score = torch.rand(num_tokens, num_experts) + torch.linspace(0.5, 0, num_experts)
    score[:, list(empty)] = -1
    return score.argsort(-1, descending=True)[:, :top_k].to(torch.int32)


def gate_up_reference(problem: GemmProblem, routed: Routed, x, w, bias=None):
    """f64[S,F] in slot_order, from any dtypes."""
    rows = x.double()[routed.slot_order.long() // routed.slots_per_token]
    h = torch.stack([w[e].double() @ row for e, row in zip(routed.slot_expert().tolist(), rows, strict=True)])
    if bias is not None:
        h = h + bias.double()[routed.slot_expert()]
    activation = dataclasses.replace(Activation.parse(problem.act), in_float32=False)
    return activation(h)


def down_reference(routed: Routed, h, w, bias=None):
    """f64[S,H] by slot id."""
    out = torch.stack([w[e].double() @ row for e, row in zip(routed.slot_expert().tolist(), h.double(), strict=True)])
    if bias is not None:
        out = out + bias.double()[routed.slot_expert()]
    return torch.empty_like(out).index_copy_(0, routed.slot_order.long(), out)


def excess_error(got, want, dtype):
    """How far got is from want beyond one rounding to dtype, over the root mean square of want; NaN counts as inf."""
    rounding = {torch.bfloat16: 2**-8, torch.float32: 2**-24}[dtype]
    excess = (got.double() - want).abs() - rounding * want.abs()
    return float((excess / want.square().mean().sqrt()).nan_to_num(float("inf")).max())


def some_slow(cases, quick):
    """Parameters for pytest: those whose place is not in `quick` are marked slow (`make test-cuda` runs them)."""
    return [c if i in quick else pytest.param(*_tuple(c), marks=pytest.mark.slow) for i, c in enumerate(cases)]


def _tuple(case):
    return case if isinstance(case, tuple) else (case,)


def finds(kernel, values, is_wrong, wave=1):
    """Whether running a kernel, copies early and late, shows a fault: the emulator's message, or is_wrong(values)."""
    for lazy, seed in ((False, 1), (True, 2)):
        mine = {k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()}
        try:
            kernel.run(mine, kernel.source.grid_of(mine), lazy, seed, wave)
        except EmulationError:
            return True
        if is_wrong(mine):
            return True
    return False


def weights(*shape, dtype=torch.bfloat16):
    return (torch.randn(*shape) / shape[-1] ** 0.5).to(dtype)

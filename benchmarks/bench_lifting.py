"""Time and peak memory of lifting one hand-written block: `python benchmarks/bench_lifting.py [H F E K DTYPE]`.

Prints one line: the sizes, seconds, GiB at the peak, and the certificate's errors or the refusal.
"""

from __future__ import annotations

import resource
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

from moec.compiler.capture.lifting import LiftedBlock, lift_block


class LoopBlock(nn.Module):
    """A loop over a ModuleList with where and index_add, as Mixtral's first published code."""

    def __init__(self, hidden: int, inner: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(hidden, num_experts, bias=False)
        self.w1, self.w3 = (self._matrices(num_experts, hidden, inner) for _ in range(2))
        self.w2 = self._matrices(num_experts, inner, hidden)

    @staticmethod
    def _matrices(count: int, width: int, out: int) -> nn.ModuleList:
        return nn.ModuleList(nn.Linear(width, out, bias=False) for _ in range(count))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden.view(-1, hidden.shape[-1])
        weights, chosen = self.gate(x).softmax(-1, dtype=torch.float32).topk(self.top_k)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(x)
        for e in range(len(self.w1)):
            rows, k = torch.where(chosen == e)
            if len(rows):
                y = self.w2[e](F.silu(self.w1[e](x[rows])) * self.w3[e](x[rows]))
                out.index_add_(0, rows, y * weights[rows, k, None])
        return out.view_as(hidden)


def main() -> None:
    hidden, inner, num_experts, top_k = map(int, sys.argv[1:5] or (1024, 1408, 8, 2))
    dtype = getattr(torch, sys.argv[5] if len(sys.argv) > 5 else "float32")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    block = LoopBlock(hidden, inner, num_experts, top_k).to(dtype).eval()
    start = time.monotonic()
    found = lift_block(block, (torch.randn(2, 3, hidden, dtype=dtype),))
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if isinstance(found, LiftedBlock):
        record = found.certificate
        said = (
            f"gate {record['gate']}, error {record['worst_relative_error_f64']:.1e} in float64, "
            f"{record['median_relative_error_own_dtype']:.1e} in {dtype}, {record['runs']} runs"
        )
    else:
        said = f"refused: {found}"
    print(f"H={hidden} F={inner} E={num_experts} K={top_k}: {seconds:.1f} s, {peak:.1f} GiB, {said}")


if __name__ == "__main__":
    main()

"""What the experts kernels' tests share: built kernels, random layers, and a float64 reference."""

import dataclasses

import torch

import moec.passes.ir.ops  # noqa: F401  (registers moec::experts, the reference)
from moec.compiler.kernels.experts import call
from moec.compiler.kernels.experts.kernel import ExpertsKernel
from moec.compiler.kernels.spec import ExpertsProblem

# bf16: the kernels round h to bf16 and y once, 2**-9 each; observed 1.5e-3 to 2.7e-3 over whole outputs.
# f32: sums of up to a few hundred products; observed up to 3.5e-7.
TOLERANCE = {"bfloat16": 4e-3, "float32": 2e-6}

SMALL = ExpertsProblem(hidden=64, inner=48, num_experts=8, top_k=2)
# nothing is a multiple of a vector, a panel or a tile
ODD = ExpertsProblem(
    hidden=50, inner=70, num_experts=5, top_k=2, num_shared=2, act="swigluoai@7.0@1.702",
    has_bias=True, has_shared_weight=True,
)  # fmt: skip
# long enough that the down GEMM goes through k in chunks and gate_up through rows in units
LONG = ExpertsProblem(hidden=32, inner=8224, num_experts=3, top_k=1, act="!relu2", weight_on_input=True)


@dataclasses.dataclass
class Layer:
    """A problem with random weights of about unit output, packed, and its kernel."""

    level: str
    problem: ExpertsProblem
    kernel: ExpertsKernel
    library: object
    tensors: dict
    packed: call.PackedExperts

    def inputs(self, num_tokens: int, seed: int = 0):
        """x [T,H], weights [T,K], experts [T,K] without repeats in a row, shared_weight [T] or None."""
        g, p = torch.Generator().manual_seed(seed), self.problem
        x = torch.randn(num_tokens, p.hidden, generator=g).to(getattr(torch, p.dtype))
        weights, experts = torch.rand(num_tokens, p.num_experts, generator=g).topk(p.top_k)
        shared = torch.rand(num_tokens, generator=g) if p.has_shared_weight else None
        return x, weights, experts, shared

    def run(self, x, weights, experts, shared=None):
        """The kernel through its checked wrapper."""
        return self.kernel(self.library, self.problem, self.packed, x, weights, experts, shared)

    def reference(self, x, weights, experts, shared=None):
        """moec::experts in float64 on the same weights."""
        wide = {n: None if t is None else t.double() for n, t in self.tensors.items()}
        p = self.problem
        return torch.ops.moec.experts(
            x.double(), weights.double(), experts, wide["w_gate_up"], wide["w_down"], wide["b_gate_up"],
            wide["b_down"], None if shared is None else shared.double(), p.act, p.num_shared, p.weight_on_input,
        )  # fmt: skip

    def error(self, y, reference):
        """Distance relative to the reference's size."""
        return ((y.double() - reference).norm() / reference.norm().clamp_min(1e-30)).item()

    def check(self, x, weights, experts, shared=None):
        """Runs the kernel and compares with the reference."""
        y = self.run(x, weights, experts, shared)
        assert y.shape == x.shape and y.dtype == x.dtype
        error = self.error(y, self.reference(x, weights, experts, shared))
        assert error < TOLERANCE[self.problem.dtype], f"{self.level} {self.problem}: error {error}"


def random_weights(problem: ExpertsProblem) -> dict:
    """Stacks as moec::experts takes them."""
    p, g = problem, torch.Generator().manual_seed(1)
    total, width = p.num_experts + p.num_shared, p.inner * (1 if p.act.startswith("!") else 2)

    def random(*shape, scale):
        return (torch.randn(shape, generator=g) * scale).to(getattr(torch, p.dtype))

    return {
        "w_gate_up": random(total, width, p.hidden, scale=p.hidden**-0.5),
        "w_down": random(total, p.hidden, p.inner, scale=p.inner**-0.5),
        "b_gate_up": random(total, width, scale=0.5) if p.has_bias else None,
        "b_down": random(total, p.hidden, scale=0.5) if p.has_bias else None,
    }

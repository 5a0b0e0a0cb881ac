"""What evidence takes above the process's own memory, in layers: prints it. A process of its own, run by a test.

A layer's experts in bfloat16, 8 x [2 * 2048, 1024] and [1024, 2048], are grouped and stored in int4.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from graphs import Builder

from moec.passes.group_expert_gemms import GroupExpertGemms
from moec.passes.infra.base import PassContext
from moec.passes.infra.runner import run_passes
from moec.passes.ir.formats import parse_format
from moec.passes.ir.weights import source, stack, weight_node
from moec.passes.quantise_weights import QuantiseWeights, WeightPlan

EXPERTS, HIDDEN, INNER = 8, 1024, 2048


def evidence(hidden: int, inner: int) -> int:
    """Groups and quantises one layer with evidence -> how many regions were evaluated."""
    b = Builder()
    shapes = {"w_in": (2 * inner, hidden), "w_out": (hidden, inner)}
    known = {f"{n}.{e}": shape for n, shape in shapes.items() for e in range(EXPERTS)}

    def read(name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.empty(known[name], dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    x = b.input("x", hidden, dtype=torch.bfloat16)
    scores = b.input("scores", EXPERTS)
    weights, experts = (b(torch.ops.aten.slice.Tensor, t, 1, 0, 2) for t in (scores, b(torch.ops.aten.argsort, scores)))
    stacks = []
    for name, shape in shapes.items():
        parts = [source(f"{name}.{e}", shape, torch.bfloat16) for e in range(EXPERTS)]
        stacks.append(weight_node(b.gm, name, stack(parts)))
    gm = b.done(b(torch.ops.moec.experts.default, x, weights, experts, *stacks, None, None, None, "silu"))
    plan = WeightPlan({"experts": parse_format("int4")})
    context = PassContext(read=read, options={QuantiseWeights.name: plan})
    found = run_passes(gm, (GroupExpertGemms(), QuantiseWeights()), context, evidence="full").evidence
    return sum(one.max_rel_err is not None for one in found)


def memory(field: str) -> int:
    """A figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def main() -> None:
    torch.set_num_threads(1)
    evidence(64, 128)  # so that what is loaded once is there
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = memory("VmRSS")
    evaluated = evidence(HIDDEN, INNER)
    layer = EXPERTS * 3 * HIDDEN * INNER * torch.bfloat16.itemsize
    print(evaluated, (memory("VmHWM") - before) / layer)


if __name__ == "__main__":
    main()

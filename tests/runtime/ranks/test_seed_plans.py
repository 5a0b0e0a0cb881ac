"""Seed models, narrow and of few layers, under the plans that their full sizes get.

python tests/runtime/ranks/test_seed_plans.py [MODEL ..]     on as many gloo processes as the plan has ranks (8)
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import torch
from rank_plans import write_engine
from rank_pool import RankPool
from run_ranks import run_engine
from seed_plans import SeedPlan, seed_plan

from moec.compiler.capture import capture
from moec.compiler.zoo import ZOO
from moec.passes.infra.base import PassContext
from moec.passes.infra.runner import run_passes
from moec.passes.placing.choose_strategy import ChooseStrategy

TOLERANCE = 1e-5  # of the greatest logit, against the unsharded model: f32 sums in another order


def write(seed: SeedPlan, folder: Path) -> tuple[dict, torch.nn.Module, list[str]]:
    """Writes the engine -> the manifest's "placement", the unsharded model, and what placement refused."""
    from moec.compiler.ranks import BEFORE

    whole = seed.model()
    captured = capture(whole)
    run_passes(captured.graph_module, BEFORE, PassContext(read=captured.read), evidence="off")
    record, ledgers = write_engine(folder, captured, seed.document, 2)
    refused = [
        r.reason for one in ledgers for name in (ChooseStrategy.name, "shard-weights") for r in one[name].refused
    ]
    return record, whole, refused


def check(seed: SeedPlan, folder: Path, pool: RankPool | None) -> float:
    """-> the largest error against the unsharded model, a share of the greatest logit."""
    record, whole, refused = write(seed, folder)
    assert not refused, refused[:3]
    draw, count = random.Random(0), record["lanes"] * record["replicas"]
    lanes = [[[draw.randrange(seed.config.vocab_size) for _ in range(n)] for n in (5, 1)] for _ in range(count)]
    if count > 1:
        lanes[-1] = []
    alone, worst = run_engine(folder, lanes), 0.0
    together = pool.run(folder, lanes) if pool else alone
    for entry, one, other in zip(record["ranks"], alone, together, strict=True):
        if one is None:
            continue
        assert torch.equal(one, other), f"rank {entry['rank']}: the bits differ"
        prompts = lanes[entry["replica"] * record["lanes"] + entry["lane"]]
        for got, prompt in zip(one.split([len(p) for p in prompts]), prompts, strict=True):
            with torch.no_grad():
                want = whole(torch.tensor([prompt])).logits[0]
            worst = max(worst, float((got - want).abs().max() / want.abs().max()))
    assert worst <= TOLERANCE
    return worst


def test_skywork_under_its_plan(tmp_path):
    """36 heads and 65,532 words over eight ranks, one thread each."""
    seed = seed_plan("skywork-moe")
    assert seed.config.num_attention_heads == 36 and seed.config.vocab_size == 65532
    assert "rtx4090x8" in seed.real
    check(seed, tmp_path / "engine", None)


def main(names: list[str]) -> None:
    pool = RankPool(8)
    for name in names or list(ZOO):
        seed = seed_plan(name)
        with tempfile.TemporaryDirectory() as work:
            error = check(seed, Path(work) / "engine", pool)
        c = seed.config
        sizes = f"{c.num_attention_heads} | {c.num_hidden_layers} | {c.vocab_size}"
        print(f"| {name} | {seed.real} | {sizes} | {error:.0e} |", flush=True)
    pool.close()


if __name__ == "__main__":
    main(sys.argv[1:])

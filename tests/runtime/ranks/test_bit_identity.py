"""Processes give the bits that one process gives which runs the same shards, for random uneven plans.

python tests/runtime/ranks/test_bit_identity.py [PLANS] [RANKS] [SEED]     more plans, on more processes
"""

from __future__ import annotations

import copy
import random
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from rank_plans import model, random_lanes, random_plan, strategies, write_plan
from rank_pool import RankPool
from run_ranks import run_engine

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}
"""Of the greatest logit, against the unsharded model: sums in another order (f32), and partial sums rounded to 8 bits
before they are added (bf16)."""
UNDECIDED = {torch.float32: 0.0, torch.bfloat16: 5e-4}
"""Rows are compared whose chosen experts lead the next by more than this probability in every layer in float32. Logits
are up to 0.2 here, so that one rounding to 8 bits moves a probability by up to 1e-4."""


def decided(dtype: torch.dtype, prompt: list[int]) -> torch.Tensor:
    """bool[T]: the rows of the unsharded model whose experts no rounding of `dtype` can change."""
    whole = copy.deepcopy(model(dtype, False)[2]).float()
    keep = torch.ones(len(prompt), dtype=torch.bool)

    def note(gate: torch.nn.Module, given: tuple[torch.Tensor, ...], _: object) -> None:
        scores = (given[0].view(len(prompt), -1) @ gate.weight.t()).softmax(-1).sort(-1, descending=True).values
        top_k = whole.config.num_experts_per_tok
        keep.logical_and_(scores[:, top_k - 1] - scores[:, top_k] > UNDECIDED[dtype])

    for layer in whole.model.layers:
        layer.mlp.gate.register_forward_hook(note)
    with torch.no_grad():
        whole(torch.tensor([prompt]))
    return keep


def check(pool: RankPool, folder: Path, draw: random.Random, strategy: str, dtype: torch.dtype, one_expert: bool):
    """One random plan -> its largest error against the unsharded model, a share of the greatest logit."""
    record = write_plan(folder, random_plan(draw, strategy, dtype), dtype, one_expert, draw.randint(1, 3))
    lanes = random_lanes(draw, record["lanes"] * record["replicas"])
    alone, together = run_engine(folder, lanes), pool.run(folder, lanes)
    worst = 0.0
    for entry, one, other in zip(record["ranks"], alone, together, strict=True):
        assert (one is None) == (other is None) == (not entry["gives_logits"])
        if one is None:
            continue
        assert one.dtype == other.dtype == dtype
        assert torch.equal(one, other), f"{strategy}, rank {entry['rank']}: the bits differ"
        if one_expert:
            continue  # equal scores: the unsharded model's own library breaks ties otherwise than by index
        prompts = lanes[entry["replica"] * record["lanes"] + entry["lane"]]
        for got, prompt in zip(one.split([len(p) for p in prompts]), prompts, strict=True):
            want = model(dtype, one_expert)[2](torch.tensor([prompt])).logits[0].float()
            error = (got - want).abs().amax(-1) / want.abs().max()
            worst = max([worst, *error[decided(dtype, prompt)].tolist()])
    assert worst <= TOLERANCE[dtype], f"{strategy}: {worst:.1e} from the unsharded model"
    return worst


@pytest.fixture(scope="module")
def pool():
    made = RankPool(4)
    yield made
    made.close()


CASES = [
    ("TP4", torch.float32, False),
    ("EP4", torch.bfloat16, False),
    ("DP4-EP4+1", torch.float32, True),
    ("DP2TP2-EP2TP2", torch.bfloat16, True),
    ("DP2-EP2xPP2", torch.float32, False),
    ("EP2xR2", torch.bfloat16, False),
]


@pytest.mark.parametrize(("strategy", "dtype", "one_expert"), CASES)
def test_processes_give_the_bits_of_one(pool, tmp_path, strategy, dtype, one_expert):
    check(pool, tmp_path / "engine", random.Random(strategy), strategy, dtype, one_expert)


def main(plans: int = 200, ranks: int = 8, seed: int = 0) -> None:
    pool, draw, counts = RankPool(ranks), random.Random(seed), dict[str, int]()
    worst = dict.fromkeys(TOLERANCE, 0.0)
    with tempfile.TemporaryDirectory() as work:
        for number in range(plans):
            strategy = draw.choice(strategies(ranks))
            dtype, one_expert = draw.choice(list(TOLERANCE)), draw.random() < 0.3
            error = check(pool, Path(work) / f"plan-{number}", draw, strategy, dtype, one_expert)
            worst[dtype] = max(worst[dtype], error)
            counts[strategy] = counts.get(strategy, 0) + 1
            print(
                f"plan {number}: {strategy}, {dtype}, {'one expert' if one_expert else 'routed'}: same bits", flush=True
            )
    pool.close()
    print(f"{plans} plans of {len(counts)} strategies on {ranks} processes: same bits in all; from the unsharded model")
    print(
        ", ".join(f"{str(d).removeprefix('torch.')} {e:.1e}" for d, e in worst.items()), "of the greatest logit at most"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

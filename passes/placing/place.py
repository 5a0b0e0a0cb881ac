"""One graph into one graph per rank, with evidence that the ranks together compute what the one did.

These passes stand apart from passes/pipeline.py because their evidence is of another kind: a rank's graph alone means
something else than the graph before; only all of them, run in lockstep with their collectives, must give the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from moec.passes.infra.base import Ledger, Pass, PassContext
from moec.passes.infra.errors import PassError
from moec.passes.ir.evaluate import evaluate
from moec.passes.ir.weights import Read
from moec.passes.placement.rank_shares import RankShares
from moec.passes.placing.choose_strategy import ChooseStrategy
from moec.passes.placing.insert_collectives import InsertCollectives, collective_order
from moec.passes.placing.lockstep import run_ranks
from moec.passes.placing.overlap_collectives import OverlapCollectives
from moec.passes.placing.shard_weights import ShardWeights

PLACE: tuple[Pass, ...] = (ChooseStrategy(), ShardWeights(), InsertCollectives(), OverlapCollectives())


@dataclass(frozen=True)
class Placed:
    """graphs: one a rank; ledgers: of each rank, by pass name."""

    graphs: tuple[GraphModule, ...]
    ledgers: tuple[dict[str, Ledger], ...]


def place(gm: GraphModule, shares: Sequence[RankShares], copy: Callable[[GraphModule], GraphModule]) -> Placed:
    """A graph per rank; `gm` is left alone.

    Args:
        shares: one entry a rank, in rank order. copy: makes an independent copy of a graph with its metadata.

    Raises:
        PassError: ranks would run their collectives in different orders.
    """
    graphs, ledgers = [], []
    for one in shares:
        graph, mine = copy(gm), {}
        context = PassContext(options={"choose-strategy": one})
        for step in PLACE:
            result = step.run(graph, context)
            graph, mine[step.name] = result.graph, result.ledger
        graph.graph.lint()
        graphs.append(graph)
        ledgers.append(mine)
    orders = {collective_order(g) for g in graphs}
    if len(orders) > 1:
        raise PassError(f"pass insert-collectives: ranks disagree on the order of collectives ({len(orders)} orders)")
    return Placed(tuple(graphs), tuple(ledgers))


def check_ranks(
    gm: GraphModule, placed: Placed, inputs: Callable[[GraphModule], Sequence[Any]], read: Read | None, tolerance: float
) -> float:
    """Evidence: the greatest error of any rank's result, relative to the greatest value of the unplaced graph's.

    Args:
        inputs: fresh inputs for a graph, caches of the graph's own sizes among them.

    Raises:
        PassError: the error is above `tolerance`; the message names the rank.
    """
    expected = evaluate(gm, inputs(gm), read)
    results = run_ranks(placed.graphs, [inputs(g) for g in placed.graphs], read)
    worst = 0.0
    for rank, result in enumerate(results):
        error = _relative(expected, result)
        if not error <= tolerance:
            raise PassError(
                f"place: rank {rank} of {len(results)} differs by {error:.1e} from the graph before, tolerance "
                f"{tolerance:.1e}"
            )
        worst = max(worst, error)
    return worst


def _relative(expected: Any, result: Any) -> float:
    if isinstance(expected, Tensor):
        scale = expected.double().abs().max().clamp(min=1e-30)
        return float(((expected.double() - result.double()).abs().max() / scale).item()) if expected.numel() else 0.0
    return max((_relative(e, r) for e, r in zip(expected, result, strict=True)), default=0.0)

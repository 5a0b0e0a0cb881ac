"""One graph into one graph per rank, with evidence that the ranks together compute what the one did.

These passes stand apart from passes/pipeline.py because their evidence is of another kind: a rank's graph alone means
something else than the graph before; only all of them, run in lockstep with their collectives, must give the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.fx import GraphModule

from moec.passes.infra.base import Ledger, Pass, PassContext
from moec.passes.infra.runner import run_passes
from moec.passes.ir.copies import copy_of
from moec.passes.placement.rank_shares import RankPlace, RankShares
from moec.passes.placing.choose_strategy import ChooseStrategy
from moec.passes.placing.collectives import check_order
from moec.passes.placing.cut_stages import CutStages
from moec.passes.placing.insert_collectives import InsertCollectives
from moec.passes.placing.limit_experts import Capacity, LimitExperts
from moec.passes.placing.overlap_collectives import OverlapCollectives
from moec.passes.placing.shard_weights import ShardWeights

PLACE: tuple[Pass, ...] = (
    ChooseStrategy(),
    CutStages(),
    LimitExperts(),
    ShardWeights(),
    InsertCollectives(),
    OverlapCollectives(),
)


@dataclass(frozen=True)
class Placed:
    """graphs, places: one a rank of a replica; ledgers: of each rank, by pass name."""

    graphs: tuple[GraphModule, ...]
    places: tuple[RankPlace, ...]
    ledgers: tuple[dict[str, Ledger], ...]


def place(gm: GraphModule, shares: Sequence[RankShares], chunks: int = 1, capacity: Capacity | None = None) -> Placed:
    """A graph per rank; `gm` is left alone.

    Args:
        shares: one entry a rank, in rank order.
        chunks: in how many an all-to-all of tokens is cut.
        capacity: None: no slot is ever dropped.

    Raises:
        PassError: ranks would run their collectives in different orders.
    """
    graphs, ledgers = [], []
    for one in shares:
        graph, mine = copy_of(gm), {}
        options = {"choose-strategy": one, "limit-experts": capacity, "overlap-collectives": chunks}
        context = PassContext(options=options)
        for step in PLACE:
            result = step.run(graph, context)
            graph, mine[step.name] = result.graph, result.ledger
        graph.graph.lint()
        graphs.append(graph)
        ledgers.append(mine)
    check_order(graphs)
    return Placed(tuple(graphs), tuple(s.place for s in shares), tuple(ledgers))


def finish(placed: Placed, passes: Sequence[Pass], contexts: Sequence[PassContext]) -> Placed:
    """Runs the passes that come after placement on every rank's graph, each with its own context; check_ranks is their
    evidence too."""
    results = [run_passes(g, passes, c) for g, c in zip(placed.graphs, contexts, strict=True)]
    ledgers = [before | r.ledgers for before, r in zip(placed.ledgers, results, strict=True)]
    graphs = tuple(r.graph for r in results)
    check_order(graphs)
    return replace(placed, graphs=graphs, ledgers=tuple(ledgers))

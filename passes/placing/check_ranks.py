"""Evidence for placed graphs: all ranks in lockstep give what the one graph gave, on probes chosen to break exchanges.

Both sides run in float32, whatever the model's dtype: the question is whether every part is cut and put together right.
In bf16 sums of parts round elsewhere, and a router that chooses another expert for it would hide that question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from moec.passes.infra.errors import PassError
from moec.passes.ir.copies import copy_of
from moec.passes.ir.evaluate import evaluate
from moec.passes.ir.weights import Read, cast, weights_of
from moec.passes.placing.lockstep import run_ranks
from moec.passes.placing.place import Placed

TOLERANCE = 1e-4
"""Float32 sums in another order give 1e-7 to 1e-6 on models of a few layers; a missing or doubled part gives 1e-2."""
SEQUENCES, LENGTH = 6, 16
NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Probe:
    """tokens, positions, slots of each lane, i64[T] with a T of its own."""

    name: str
    lanes: tuple[tuple[Tensor, Tensor, Tensor], ...]


@dataclass(frozen=True)
class RankEvidence:
    """probe: its name. max_rel_err: of any rank's logits, relative to the greatest logit."""

    probe: str
    max_rel_err: float
    tolerance: float


def probes(lanes: int, vocabulary: int) -> tuple[Probe, ...]:
    """Prompts and decodes; one token everywhere, so that all choose the same experts; one token; lanes without any."""
    generator = torch.Generator().manual_seed(0)

    def batch(lengths: Sequence[int], same: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        count = sum(lengths)
        tokens = torch.randint(0, vocabulary, (count,), generator=generator)
        positions = [torch.arange(n) for n in lengths]
        slots = [torch.full((n,), i) for i, n in enumerate(lengths)]
        nothing = [torch.zeros(0, dtype=torch.int64)]
        return (
            torch.full_like(tokens, 1) if same else tokens,
            torch.cat(nothing + positions),
            torch.cat(nothing + slots),
        )

    def each(lengths: Callable[[int], Sequence[int]], same: bool = False) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
        return tuple(batch(lengths(i), same) for i in range(lanes))

    return (
        Probe("random tokens", each(lambda i: [5, 1, 2 + i % 3])),
        Probe("one token everywhere", each(lambda i: [1] * SEQUENCES, same=True)),
        Probe("one token in the last lane", each(lambda i: [1] if i == lanes - 1 else [])),
        *([Probe("no tokens in the first lane", each(lambda i: [3, 1] if i else []))] if lanes > 1 else []),
    )


def check_ranks(
    gm: GraphModule,
    placed: Placed,
    read: Read | None,
    vocabulary: int,
    tolerance: float = TOLERANCE,
) -> list[RankEvidence]:
    """Runs every probe through `gm`, lane by lane, and through all ranks' graphs.

    Args:
        vocabulary: tokens are below it.

    Raises:
        PassError: a rank's logits are further off than `tolerance`; the message names the rank and the probe.
    """
    whole, ranks = widened(gm), [widened(g) for g in placed.graphs]
    found = []
    for probe in probes(placed.places[0].lanes, vocabulary):
        expected = [evaluate(whole, _inputs(whole, lane), read) for lane in probe.lanes]
        given = [_inputs(g, probe.lanes[p.lane]) for g, p in zip(ranks, placed.places, strict=True)]
        results = run_ranks(ranks, given, read)
        worst = 0.0
        for place, result in zip(placed.places, results, strict=True):
            if not place.is_last:
                continue
            error = _relative(expected[place.lane], result)
            if not error <= tolerance:
                raise PassError(
                    f"place: rank {place.rank} of {len(ranks)} differs by {error:.1e} from the graph before on the "
                    f"probe '{probe.name}', tolerance {tolerance:.1e}"
                )
            worst = max(worst, error)
        found.append(RankEvidence(probe.name, worst, tolerance))
    return found


def widened(gm: GraphModule) -> GraphModule:
    """A copy that computes in float32 what the graph computes in bf16 or fp16. Fake values keep their old dtype."""
    wide = copy_of(gm)
    weights = {n: cast(w, torch.float32) if w.dtype in NARROW else w for n, w in weights_of(wide).items()}
    wide.meta["weights"] = weights
    for node in wide.graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = map_aggregate((node.args, node.kwargs), _widen)  # type: ignore[assignment]
    return wide


def _widen(argument: Any) -> Any:
    narrow = argument in NARROW if isinstance(argument, torch.dtype) else argument in ("bfloat16", "float16")
    if not narrow or isinstance(argument, Node):
        return argument
    return torch.float32 if isinstance(argument, torch.dtype) else "float32"


def _inputs(gm: GraphModule, batch: tuple[Tensor, ...]) -> list[Tensor]:
    """A batch and empty caches of the graph's own sizes."""
    caches = list(gm.graph.find_nodes(op="placeholder"))[3:]
    made = []
    for cache in caches:
        val: FakeTensor = cache.meta["val"]
        dtype = torch.float32 if val.dtype in NARROW else val.dtype
        sizes = [n if isinstance(n, int) else LENGTH if i else SEQUENCES for i, n in enumerate(val.shape)]
        made.append(torch.zeros(sizes, dtype=dtype))
    return [*batch, *made]


def _relative(expected: Any, result: Any) -> float:
    if isinstance(expected, Tensor):
        if expected.shape != result.shape:
            return float("inf")
        scale = expected.double().abs().max().clamp(min=1e-30) if expected.numel() else 1.0
        return float(((expected.double() - result.double()).abs().max() / scale).item()) if expected.numel() else 0.0
    return max((_relative(e, r) for e, r in zip(expected, result, strict=True)), default=0.0)

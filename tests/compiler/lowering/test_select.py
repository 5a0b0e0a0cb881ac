from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, fx, nn

from moec.compiler.lowering.candidates import Candidate, Site
from moec.compiler.lowering.select import Choice, choose, settled, site_of
from moec.passes.ir import ops


def candidate(name: str, fixed: float, per_token: float, **more: object) -> Candidate:
    return Candidate(name, lambda t: fixed + per_token * t, lambda writer, results: None, **more)


def site(*candidates: Candidate) -> Site:
    return Site(fx.Graph().placeholder("x"), candidates)


def test_ranges_follow_the_predictions() -> None:
    choice = choose(site(candidate("library", 100, 0.1), candidate("few", 1, 10)))
    assert [(limit, c.name) for limit, c in choice.variants] == [(8, "few"), (None, "library")]


def test_one_winner_needs_no_choice() -> None:
    choice = choose(site(candidate("library", 100, 5), candidate("kernel", 1, 1)))
    assert [(limit, c.name) for limit, c in choice.variants] == [(None, "kernel")]


def test_losers_are_recorded_with_reasons() -> None:
    refused = candidate("absent", 0, 0, refused="needs amx_bf16, the target is avx2")
    record = choose(site(candidate("library", 100, 5), candidate("kernel", 1, 1), refused)).record()
    assert record["kernel"] == "kernel" and record["predicted_us"] == 2.0
    reasons = {r["kernel"]: r["reason"] for r in record["rejected"]}
    assert reasons["absent"] == "needs amx_bf16, the target is avx2"
    assert reasons["library"].startswith("predicted 105 against 2 us at T=1")


def test_packed_weights_serve_all_sizes_or_none() -> None:
    library, packed = candidate("library", 100, 0.1), candidate("packed", 1, 1, packs=True)
    assert [c.name for c in choose(site(library, packed)).kernels] == ["packed"]
    slow = candidate("packed", 1000, 1, packs=True)
    assert [c.name for c in choose(site(library, slow)).kernels] == ["library"]


def ranges(choice: Choice) -> list[tuple[int | None, str]]:
    return [(limit, c.name) for limit, c in choice.variants]


def test_a_range_is_left_to_another_kernel() -> None:
    a, b = candidate("a", 0, 0), candidate("b", 0, 0)
    choice = Choice(site(a, b), ((64, a), (None, b)))
    assert ranges(choice.without(0, 16, "other")) == [(16, "other"), (64, "a"), (None, "b")]
    assert ranges(choice.without(16, 64, "other")) == [(16, "a"), (64, "other"), (None, "b")]
    assert ranges(choice.without(16, 256, "other")) == [(16, "a"), (256, "other"), (None, "b")]
    assert ranges(choice.without(64, None, "other")) == [(64, "a"), (None, "other")]
    assert ranges(choice.without(0, None, "other")) == [(None, "other")]


def test_a_kernel_that_does_a_second_site_leaves_it_nothing_to_do() -> None:
    graph = fx.Graph()
    gate, layer = graph.placeholder("gate"), graph.placeholder("layer")
    router = Choice(Site(gate, ()), ((None, candidate("router", 1, 1)),))
    whole = candidate("whole", 0, 1, absorbs=(gate,))
    experts = Choice(Site(layer, ()), ((8, whole), (64, candidate("few", 0, 1)), (None, whole)))
    done = settled({gate: router, layer: experts})
    assert ranges(done[gate]) == [(8, "whole"), (64, "router"), (None, "whole")]
    assert ranges(done[layer]) == ranges(experts)
    steps: list[object] = []
    done[gate].kernels[0].write(steps, [])  # type: ignore[arg-type]
    assert steps == [] and done[gate].record()["variants"][0] == {"max_tokens": 8, "kernel": "whole"}


def test_what_takes_few_tokens_is_not_compared_beyond() -> None:
    few = Candidate("few", lambda t: 50.0 if t <= 64 else math.inf, lambda writer, results: None)
    record = choose(site(candidate("library", 10, 0), few)).record()
    assert record["rejected"][0]["reason"] == "predicted 50 against 10 us at T=1, 50 against 10 us at T=64"


class Norm(nn.Module):
    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return ops.rms_norm(x, w, 1e-6)


@pytest.mark.parametrize(
    ("level", "chosen", "reason"),
    [
        ("avx512_bf16", "tir-rms-norm-avx512_bf16", None),
        ("avx2", "tir-rms-norm-avx2", "needs avx512_bf16, the target is avx2"),
        (None, "library-rms_norm", "the target has no instruction-set level"),
    ],
)
def test_the_level_of_the_target_decides_what_is_there(level: str | None, chosen: str, reason: str | None) -> None:
    gm = torch.export.export(Norm(), (torch.randn(4, 8), torch.randn(8))).graph_module
    (node,) = [n for n in gm.graph.nodes if n.op == "call_function"]
    found = site_of(node, level)
    record = choose(found).record()
    assert record["kernel"] == chosen
    refused = {c.name: c.refused for c in found.candidates}
    assert reason is None or refused["tir-rms-norm-avx512_bf16"].startswith(reason)
    assert all(math.isfinite(c.predict(1)) for c in found.candidates if c.refused is None)

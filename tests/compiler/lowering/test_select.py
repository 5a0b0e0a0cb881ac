from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, fx, nn

from moec.compiler.lowering.candidates import Candidate, Site
from moec.compiler.lowering.select import choose, site_of
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

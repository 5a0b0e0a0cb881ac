"""`moec tune MODEL --target cuda:sm_90a --bundle DIR`: the bundle of a model's expert layers, from its sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moec.compiler.codegen.cuda_archs import architecture
from moec.compiler.kernels.cuda.layer import LayerShape
from moec.compiler.plan.inputs import read_model
from moec.compiler.tune.bundle import BundleRequest, Progress, write_bundle
from moec.compiler.tune.cuda_keys import OP
from moec.compiler.tune.database import Database
from moec.compiler.tune.errors import TuneError
from moec.compiler.tune.record import Config
from moec.compiler.tune.routing import Routing
from moec.passes.ir.gate import GateSpec


def bundle_model(
    model: str,
    target: str,
    out: Path,
    routing: Routing,
    tokens: Sequence[int],
    cache_dir: Path,
    *,
    db: Path | None = None,
    candidates: int = 56,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Builds candidates for every distinct layer of experts -> the bundle's manifest; no weight is read.

    target: "cuda:sm_90a" and the like.  db: whose suggestions (imported tables) are built too, where it exists.
    Raises: TuneError: another target, or no layer of experts.  PlanError: no such model.  ToolchainError: no compiler.
    """
    kind, _, arch = target.partition(":")
    if kind != "cuda" or not arch:
        raise TuneError(f"--bundle builds for a GPU that is not here: give --target cuda:sm_90a, not {target!r}")
    architecture(arch)
    shapes = _layers(model, trust_remote_code)
    request = BundleRequest(shapes, arch, tuple(tokens), routing, candidates, seed, _suggestions(db))
    return write_bundle(request, out, cache_dir, progress=progress)


def _layers(model: str, trust_remote_code: bool) -> tuple[LayerShape, ...]:
    sizes = read_model(model, trust_remote_code)
    found: dict[LayerShape, None] = {}
    for layers in sizes.layers:
        if (moe := layers.moe) is None:
            continue
        if moe.shared_width % moe.width:
            raise TuneError(
                f"{sizes.name}: shared experts of width {moe.shared_width} beside routed ones of {moe.width}"
            )
        gate, shared = GateSpec(moe.top_k).encode(), moe.shared_width // moe.width
        found[LayerShape(sizes.name, sizes.hidden, moe.width, moe.num_experts, moe.top_k, gate, shared)] = None
    if not found:
        raise TuneError(f"{sizes.name} has no layer of experts; there is nothing to tune")
    return tuple(found)


def _suggestions(db: Path | None) -> tuple[Config, ...]:
    if db is None or not db.is_file():
        return ()
    with Database(db, read_only=True) as database:
        return tuple(r.config for r in database.records(op=OP) if not r.is_measured)

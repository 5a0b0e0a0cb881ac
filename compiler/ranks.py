"""compile_ranks(): a model to an engine for several ranks: planned, placed, one program and one weights file a rank."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from moec.compiler.api import Progress, capture_as, format_errors, quiet, tuning_of, with_kernels, with_tuning
from moec.compiler.calibration import weight_plan
from moec.compiler.capture.captured import CacheSpec, Captured
from moec.compiler.errors import CompileError
from moec.compiler.export.engine import Placement, Report, cache_json, evidence_json, export_engine
from moec.compiler.export.model_facts import gate_of, model_facts
from moec.compiler.export.weight_sizes import stored_sizes
from moec.compiler.lowering.emit import Lowered, lower
from moec.compiler.lowering.tuned import Tuned, Tuning
from moec.compiler.options import CompileOptions
from moec.compiler.plan.api import Plan, plan
from moec.compiler.plan.config import shape_from_config
from moec.compiler.plan.report import cannot_fit
from moec.compiler.rank_weights import planned_format, rank_weight_plans
from moec.passes.hardware.errors import PlacementError
from moec.passes.infra.base import Ledger, Pass, PassContext
from moec.passes.infra.evidence import Evidence
from moec.passes.infra.runner import run_passes
from moec.passes.ir.weights import weights_of
from moec.passes.pipeline import PIPELINE
from moec.passes.placement.rank_shares import RankPlace, num_ranks, rank_shares
from moec.passes.placing.check_ranks import TOLERANCE, check_ranks
from moec.passes.placing.collectives import groups_of, order_hash
from moec.passes.placing.limit_experts import Capacity, limited
from moec.passes.placing.place import Placed, finish, place
from moec.passes.quantise_weights import QuantiseWeights
from moec.runtime.format import check_output, weights_name
from moec.runtime.loader import read_manifest

_NAMES = [p.name for p in PIPELINE]
BEFORE: tuple[Pass, ...] = PIPELINE[: _NAMES.index("fuse-gate-up") + 1]
"""What placement needs: canonical sites, experts and their shared experts apart, queries, keys and values apart."""
AFTER: tuple[Pass, ...] = tuple(
    p for p in PIPELINE[len(BEFORE) : _NAMES.index("quantise-weights")] if p.name != "group-expert-gemms"
)
"""Fusions of a rank's graph. Its experts stay one call: slots of experts that it does not hold have no group."""
STORE: tuple[Pass, ...] = PIPELINE[_NAMES.index("quantise-weights") :]
CHECKED_BYTES = 2 << 30
"""Largest model whose ranks are evaluated under verify "sampled": all its weights are read once per rank and probe."""


@dataclasses.dataclass(frozen=True)
class RankOptions:
    """mesh: a name or file; devices: as many CPU processes, where no mesh is given. strategy: None: the planner's.

    chunks: in how many parts an all-to-all of tokens is sent. capacity: of the mean load of a device (a group of ranks
    that serves the same experts) or of an expert, as capacity_per says; slots beyond it are dropped, the weakest first.
    None: nothing is dropped. trace: a file of `moec trace`, by which experts are placed; None: a Zipf law, as for plan.
    """

    mesh: str | None = None
    devices: int | None = None
    strategy: str | None = None
    chunks: int = 1
    capacity: float | None = None
    capacity_per: str = "device"
    trace: str | Path | None = None

    @property
    def limit(self) -> Capacity | None:
        """Raises: CompileError: the capacity has no meaning."""
        try:
            return None if self.capacity is None else Capacity(self.capacity, self.capacity_per)
        except PlacementError as error:
            raise CompileError(f"ranks: {error}") from error

    @property
    def mesh_name(self) -> str:
        """Raises: CompileError: neither, or both, are given, or a number is below 1."""
        if (self.mesh is None) == (self.devices is None):
            raise CompileError("ranks: give one of devices (CPU processes) and mesh (a name or a mesh file)")
        if self.chunks < 1 or (self.devices is not None and self.devices < 1):
            raise CompileError(f"ranks: devices is {self.devices}, chunks is {self.chunks}; expected at least 1")
        return self.mesh or f"cpux{self.devices}"

    def check(self) -> None:
        """Before anything is captured. Raises: CompileError: what has no meaning, or a trace that is not there."""
        _ = self.mesh_name, self.limit
        if self.trace is not None and not Path(self.trace).is_file():
            raise CompileError(f"ranks: there is no trace {self.trace}; `moec trace ENGINE -o FILE` records one")


def compile_ranks(
    model: Any,
    output: str | Path,
    ranks: RankOptions,
    *,
    target: str = "cpu",
    weights: str | None = None,
    layers: int | None = None,
    random_weights: int | None = None,
    trust_remote_code: bool = False,
    verify: str = "sampled",
    tune_db: str | Path | None = None,
    combine: str = "ordered",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compiles a language model into an engine for several ranks; the arguments are compile_model's.

    Returns: the manifest; "placement" says who holds what (docs/engine.md).
    Raises: CompileError: the plan or a format does not fit, or the model is no language model.  PassError: the ranks
        together do not compute what the model computes.  OutputError: output exists.
    Cost: each tensor is read once for all ranks that hold parts of it; one weight of each of them is in memory.
    """
    options, output = CompileOptions.of(target, weights, verify, None, tune_db, combine), Path(output)
    ranks.check()
    if options.weights.packed:
        raise CompileError(
            f"weights: {options.weights.packed} is for engines of one rank; choose experts=bf16 for several"
        )
    check_output(output.absolute())
    report = progress or quiet
    report("capture", 0, 1)
    captured = capture_as(model, None, layers, random_weights, options, trust_remote_code)
    report("capture", 1, 1)
    made = lowered_ranks(captured, ranks, options, report)
    facts = dict(made.facts)
    facts["stored_bytes"] = stored_sizes(w for one in made.lowered for w in one.weights.values())
    kernels = tuple({"rank": r, **c.record()} for r, one in enumerate(made.lowered) for c in one.choices)
    lowered, built = with_kernels(made.lowered, options, report)
    record = placement_record(made.placed, made.document, captured.info.caches)
    placement = Placement(made.document, record, record["replicas"])
    told = Report(
        facts, with_tuning(made.ledgers, made.lowered, options), (*captured.certificates, *made.evidence), kernels
    )
    export_engine(output, captured, lowered, built, told, placement=placement, progress=report)
    return read_manifest(output)


@dataclasses.dataclass(frozen=True)
class OfWholeLayers:
    """A Tuning for ranks: slices of all experts are tuned; a rank with some of the experts sees some of the slots, and
    no measurement is of that."""

    tuning: Tuning
    num_experts: int

    def ranges(self, problem: Any, kernel: str) -> Sequence[Tuned] | str:
        """As the Tuning's own, or why there are none."""
        if problem.num_experts < self.num_experts:
            return (
                f"{problem.num_experts} of {self.num_experts} experts are here; tuning measures layers with all of them"
            )
        return self.tuning.ranges(problem, kernel)


@dataclasses.dataclass(frozen=True)
class LoweredRanks:
    """Every rank's program before its kernels are built, with the plan and what the passes did and showed."""

    lowered: list[Lowered]
    placed: Placed
    document: dict[str, Any]
    facts: dict[str, Any]
    ledgers: dict[str, Ledger]
    evidence: tuple[dict[str, Any], ...]


def lowered_ranks(captured: Captured, ranks: RankOptions, options: CompileOptions, progress: Progress) -> LoweredRanks:
    """Plans, places and lowers a captured model for its ranks. Raises: CompileError, PassError: as compile_ranks."""
    if captured.kind != "language_model":
        raise CompileError(
            f"{captured.info.model_type}: only language models are spread over ranks; compile it for one"
        )
    facts = model_facts(captured)
    tuning = tuning_of(options)
    if tuning is not None:
        tuning = OfWholeLayers(tuning, facts["experts"])
    progress("passes", 0, 1)
    before = run_passes(captured.graph_module, BEFORE, PassContext(read=captured.read), evidence=options.verify)
    progress("passes", 1, 1)
    facts["gate"] = gate_of(before.graph.graph)
    document = _plan(captured, ranks, planned_format(options.weights, captured, facts["total_params"])).document
    progress("place", 0, 1)
    placed, evidence = _place(before.graph, captured, document, ranks, options)
    progress("place", 1, 1)
    lowered = [lower_rank(captured, graph, options, tuning) for graph in placed.graphs]
    ledgers = before.ledgers | merged_ledgers(placed.ledgers)
    records = tuple(evidence_json(e) for e in (*before.evidence, *evidence))
    return LoweredRanks(lowered, placed, document, facts, ledgers, records)


def _plan(captured: Captured, ranks: RankOptions, weights: str) -> Plan:
    """Raises: CompileError: nothing fits, or the configuration is not that of the captured model."""
    shape = shape_from_config(captured.info.config, captured.info.model_type)
    if shape.num_layers != captured.info.layers:
        raise CompileError(f"{shape.name}: its configuration has {shape.num_layers} layers, {captured.info.layers} ran")
    made = plan(shape, ranks.mesh_name, weights, strategy=ranks.strategy, trace=ranks.trace)
    if not made.feasible:
        raise CompileError(cannot_fit(made.document))
    return made


def _place(
    gm: GraphModule, captured: Captured, document: dict[str, Any], ranks: RankOptions, options: CompileOptions
) -> tuple[Placed, tuple[Evidence, ...]]:
    """The ranks' graphs, ready to be lowered, and what was evaluated."""
    document = json.loads(json.dumps(document))
    shares = [rank_shares(document, r) for r in range(num_ranks(document))]
    placed = place(gm, shares, ranks.chunks, ranks.limit)
    placed = finish(placed, AFTER, [PassContext(read=captured.read)] * len(shares))
    evidence = _evidence(limited(gm, shares, ranks.limit), placed, captured, options.verify)
    asked = weight_plan(options.weights, captured)
    plans = rank_weight_plans(gm, placed.graphs, shares, asked, captured.read)
    with format_errors():
        contexts = [PassContext(read=captured.read, options={QuantiseWeights.name: p}) for p in plans]
        return finish(placed, STORE, contexts), evidence


def _evidence(gm: GraphModule, placed: Placed, captured: Captured, verify: str) -> tuple[Evidence, ...]:
    """That the ranks together compute what `gm` computes. Raises: PassError: they do not."""
    stored = sum(w.num_bytes for w in weights_of(gm).values())
    if verify == "off":
        return ()
    if verify == "sampled" and stored > CHECKED_BYTES:
        note = f"{stored / 2**30:.1f} GiB of weights; ranks are evaluated up to 2 GiB, or with verify full"
        return (Evidence("place", None, "logits", "all ranks", None, TOLERANCE, 1, "checkpoint", note),)
    found = check_ranks(gm, placed, captured.read, captured.info.vocab_size)
    return tuple(
        Evidence("place", None, "logits", e.probe, e.max_rel_err, e.tolerance, len(placed.graphs), "checkpoint")
        for e in found
    )


def lower_rank(
    captured: Captured, graph: GraphModule, options: CompileOptions, tuning: Tuning | None = None
) -> Lowered:
    """The program of one rank's graph, with the sizes that placement added. Raises: CompileError."""
    symbols = captured.symbols | {k: v for k, v in graph.meta.get("symbols", {}).items() if k not in captured.symbols}
    captured = dataclasses.replace(captured, graph_module=graph, symbols=symbols)
    return lower(captured, options.level, options.arch, tuning, options.combine == "fast")


def merged_ledgers(ledgers: Sequence[dict[str, Ledger]]) -> dict[str, Ledger]:
    """One ledger per pass: what any rank matched or refused, each entry once."""
    out: dict[str, Ledger] = {}
    for name in ledgers[0]:
        matched = dict.fromkeys(m for one in ledgers for m in one[name].matched)
        refused = dict.fromkeys(r for one in ledgers for r in one[name].refused)
        out[name] = Ledger(tuple(matched), tuple(refused))
    return out


def placement_record(placed: Placed, document: dict[str, Any], caches: Sequence[CacheSpec]) -> dict[str, Any]:
    """The manifest's "placement": docs/engine.md says what each field is."""
    size, replicas = len(placed.graphs), document["certificate"]["plan"]["replicas"]
    ranks = []
    for rank in range(size * replicas):
        shift, (graph, where) = rank - rank % size, (placed.graphs[rank % size], placed.places[rank % size])
        groups = {name: [shift + r for r in members] for name, members in sorted(groups_of(graph).items())}
        entry = {"rank": rank, "replica": rank // size, "stage": where.stage, "lane": where.lane, "groups": groups}
        entry |= {"gives_logits": where.is_last, "weights": weights_name(rank % size)}
        ranks.append(entry | {"caches": [cache_json(c) for c in caches_of(graph, caches)]})
    first: RankPlace = placed.places[0]
    return {
        "strategy": document["strategy"],
        "mesh": document["mesh"]["name"],
        "replicas": replicas,
        "stages": first.num_stages,
        "lanes": first.lanes,
        "order_sha256": order_hash(placed.graphs),
        "copies": copies_of(document),
        "ranks": ranks,
    }


def copies_of(document: dict[str, Any]) -> dict[str, list[list[int]]]:
    """Layer -> for each expert the groups that hold it, of a plan's layers with copied experts."""
    found = {}
    for layer, one in enumerate(document["layers"]):
        groups: dict[int, list[int]] = {}
        for expert, group, _ in one.get("resident", ()):
            groups.setdefault(expert, []).append(group)
        if any(len(g) > 1 for g in groups.values()):
            found[str(layer)] = [sorted(groups[expert]) for expert in sorted(groups)]
    return found


def caches_of(graph: GraphModule, caches: Sequence[CacheSpec]) -> list[CacheSpec]:
    """Those of the model's caches that a rank's graph takes, with its own number of heads."""
    sizes = {n.name: n.meta["val"].shape for n in graph.graph.find_nodes(op="placeholder")}
    known = [(c, sizes[c.name]) for c in caches if c.name in sizes]
    return [dataclasses.replace(c, shape=tuple(size[-len(c.shape) :]) if c.shape else ()) for c, size in known]

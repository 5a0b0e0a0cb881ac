"""lift_block: a block of plain Python becomes routing and experts with a certificate, or is refused."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moec.compiler.capture.lifting.expert_graphs import find_expert_graphs
from moec.compiler.capture.lifting.experts import KnownExperts, find_experts
from moec.compiler.capture.lifting.gates import find_router
from moec.compiler.capture.lifting.held import tensors
from moec.compiler.capture.lifting.native import LIMITS, fitted_dtypes
from moec.compiler.capture.lifting.partition import find_contributions, find_partition
from moec.compiler.capture.lifting.program import NotGeneral
from moec.compiler.capture.lifting.purity import check_purity
from moec.compiler.capture.lifting.refused import Refusal, Refused
from moec.compiler.capture.lifting.replacement import Parts, Replacement
from moec.compiler.capture.lifting.rest import find_masks, find_outputs, find_shared
from moec.compiler.capture.lifting.study import Found, Study
from moec.compiler.capture.lifting.verify import Verifier, verified
from moec.passes.ir.gate import GateSpec
from moec.passes.ir.weights import Weight


@dataclasses.dataclass(frozen=True)
class LiftedBlock:
    """A block that was lifted.

    parts: what was found. replacement: does what the block does, and torch.export can trace it; its recipes' buffers
    are meta tensors. certificate: what was checked and with which result, JSON-able.
    """

    parts: Parts
    replacement: Replacement
    certificate: dict[str, Any]

    @property
    def gate(self) -> GateSpec | None:
        """The routing as a rule; None where it is a graph."""
        return self.parts.spec

    @property
    def activation(self) -> str | None:
        """The experts' activation in the IR's grammar; None where an expert is a graph."""
        return self.parts.experts.act if isinstance(self.parts.experts, KnownExperts) else None

    @property
    def weight_on_input(self) -> bool:
        return isinstance(self.parts.experts, KnownExperts) and self.parts.experts.on_input

    @property
    def recipes(self) -> Mapping[str, Weight]:
        """Weights over the block's parameter names: w_in [E,2F,H], w_out [E,H,F], b_in, b_out, router_weight, .."""
        return self.replacement.recipes

    def retarget(self, module: nn.Module) -> Replacement:
        """The replacement of another block of the same class and configuration."""
        return Replacement(self.parts, tensors(module), self.replacement.dtype)


def lift_block(
    module: nn.Module, example_args: tuple[Any, ...] = (), example_kwargs: dict[str, Any] | None = None, seed: int = 0
) -> LiftedBlock | Refusal:
    """Lifts one block, measured in float64; the module itself is not changed.

    Args: example_args, example_kwargs: one call; its floating argument [.., H] holds the rows.  seed: of the probes.
    Cost: about 105 + 2E runs of 1..300 rows, and 8 bytes per parameter.
    """
    start = time.monotonic()
    try:
        study = Study(module, example_args, example_kwargs or {}, seed)
        parts, verifier = _lift(study)
        parts, native_error = fitted_dtypes(study, parts)
        replacement = Replacement(parts, tensors(module), study.call.dtype)
        if replacement.route(study.rows(1).to(study.call.dtype))[0].shape[1] != parts.partition.top_k:
            raise Refused("gate", "the routing has another number of experts per token than was measured")
    except Refused as error:
        return error.refusal
    except NotGeneral as error:
        return Refusal("graph", str(error))
    record = _certificate(study, parts, verifier, native_error, time.monotonic() - start)
    return LiftedBlock(parts, replacement, record)


def _lift(study: Study) -> tuple[Parts, Verifier]:
    with torch.no_grad():
        check_purity(study)
        partition = find_partition(study)
        contributions = find_contributions(study, partition)
        known = find_experts(study, partition, contributions)
        experts = known or find_expert_graphs(study, partition, contributions)
        router = find_router(study, partition, experts.weights)
        shared = find_shared(study, contributions)
        outputs = find_outputs(study)
        rows = study.rows(40)
        masks = find_masks(study, _shared_rows(study, shared, rows), rows)
    parts = Parts(study.call, partition, experts, router, shared, outputs, masks, 0 if router.rules else None)
    return verified(study, parts)


def _shared_rows(study: Study, shared: Found | Tensor | None, rows: Tensor) -> Tensor | None:
    if isinstance(shared, Found):
        return study.replay(shared, rows)
    return None if shared is None else shared.expand(rows.shape)


def _certificate(study: Study, parts: Parts, verifier: Verifier, native_error: float, seconds: float) -> dict[str, Any]:
    spec = parts.spec
    counts = verifier.counts
    return {
        "block": type(study.module).__name__,
        "num_experts": parts.partition.num_experts,
        "top_k": parts.partition.top_k,
        "gate": None if spec is None else spec.encode(),
        "gate_graph": parts.router.note,
        "rules_that_fit": len(parts.router.rules),
        "activation": parts.experts.act if isinstance(parts.experts, KnownExperts) else None,
        "expert_tensors": [g.key for g in parts.partition.groups],
        "shared": _described(parts.shared),
        "worst_relative_error_f64": max(verifier.worst.values()),
        "errors_f64": verifier.worst,
        "median_relative_error_own_dtype": native_error,
        "own_dtype_limit": LIMITS[study.call.dtype],
        "expert_uses": {"least": int(counts.min()), "most": int(counts.max())},
        "lines": verifier.lines,
        "data_comparisons_both_ways": verifier.num_comparisons,
        "most_rows_to_one_expert": verifier.stress,
        "zero_rows_finite": verifier.finite_at_zero,
        "runs": study.runs,
        "seconds": round(seconds, 2),
        "seed": study.seed,
        "notes": list(study.notes),
    }


def _described(shared: Found | Tensor | None) -> str:
    if isinstance(shared, Found):
        return f"a graph of {len(shared.program.steps)} operations"
    return "none" if shared is None else "a constant vector"

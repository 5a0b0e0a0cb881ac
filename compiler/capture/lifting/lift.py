"""lift_block: a block of plain Python becomes routing and experts with a certificate, or is refused."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moec.compiler.capture.lifting.calls import Call
from moec.compiler.capture.lifting.experts import KnownExperts
from moec.compiler.capture.lifting.held import num_elements, tensors
from moec.compiler.capture.lifting.measure import Lifted, lift_narrow, lift_wide
from moec.compiler.capture.lifting.native import LIMITS
from moec.compiler.capture.lifting.program import NotGeneral
from moec.compiler.capture.lifting.refused import Refusal, Refused
from moec.compiler.capture.lifting.replacement import Parts, Replacement
from moec.compiler.capture.lifting.study import Found
from moec.passes.ir.gate import GateSpec
from moec.passes.ir.weights import Weight

CODE_ERRORS = (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
WIDE_BLOCK = 1 << 24
"""Parameters from which on a narrow twin is measured instead: 0.13 GiB in float64, some seconds."""


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
        """Whether routing weights multiply what the experts read, not what they give."""
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

    A block above WIDE_BLOCK parameters is measured on a narrow twin, and what was found is checked on the block.
    Args: example_args, example_kwargs: one call; its floating argument [.., H] holds the rows.  seed: of the probes.
    Cost: about 105 + 2E runs of 1..300 rows, and 8 bytes per parameter of the twin; then 8 bytes per parameter of one
    expert, and one run for each.
    """
    start = time.monotonic()
    try:
        call = Call(example_args, example_kwargs or {})
        result = lift_wide(module, call, seed) if num_elements(module) > WIDE_BLOCK else None
        result = result or lift_narrow(module, call.args, call.kwargs, seed)
        replacement = Replacement(result.parts, tensors(module), call.dtype)
        probe = torch.zeros(1, call.hidden, dtype=call.dtype)
        if replacement.route(probe)[0].shape[1] != result.parts.partition.top_k:
            raise Refused("gate", "the routing has another number of experts per token than was measured")
    except Refused as error:
        return error.refusal
    except NotGeneral as error:
        return Refusal("graph", str(error))
    except CODE_ERRORS as error:
        return Refusal("run", f"the block fails on probe rows: {type(error).__name__}: {str(error)[:120]}")
    return LiftedBlock(result.parts, replacement, _certificate(module, result, time.monotonic() - start))


def _certificate(module: nn.Module, result: Lifted, seconds: float) -> dict[str, Any]:
    study, parts, verifier = result.study, result.parts, result.verifier
    spec, counts = parts.spec, verifier.counts
    return {
        "block": type(module).__name__,
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
        "median_relative_error_own_dtype": result.native_error,
        "own_dtype_limit": LIMITS[study.call.dtype],
        "expert_uses": {"least": int(counts.min()), "most": int(counts.max())},
        "lines": verifier.lines,
        "data_comparisons_both_ways": verifier.num_comparisons,
        "most_rows_to_one_expert": verifier.stress,
        "zero_rows_finite": verifier.finite_at_zero,
        "full_width": result.full_width,
        "runs": study.runs,
        "seconds": round(seconds, 2),
        "seed": study.seed,
        "notes": list(study.notes),
    }


def _described(shared: Found | Tensor | None) -> str:
    if isinstance(shared, Found):
        return f"a graph of {len(shared.program.steps)} operations"
    return "none" if shared is None else "a constant vector"

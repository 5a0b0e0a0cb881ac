"""All stages of lifting in order, on a block or on its narrow twin."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from moec.compiler.capture.lifting.calls import Call
from moec.compiler.capture.lifting.exits import Exit, exits
from moec.compiler.capture.lifting.expert_graphs import GraphExperts, find_expert_graphs
from moec.compiler.capture.lifting.experts import KnownExperts, find_experts
from moec.compiler.capture.lifting.full_width import FullWidthCheck, lines_run
from moec.compiler.capture.lifting.gates import find_router
from moec.compiler.capture.lifting.held import num_elements, tensors
from moec.compiler.capture.lifting.native import fitted_dtypes
from moec.compiler.capture.lifting.partition import Contributions, Partition, find_contributions, find_partition
from moec.compiler.capture.lifting.program import NotGeneral
from moec.compiler.capture.lifting.purity import check_purity
from moec.compiler.capture.lifting.refused import Refused
from moec.compiler.capture.lifting.replacement import Parts
from moec.compiler.capture.lifting.rest import find_masks, find_outputs, find_shared
from moec.compiler.capture.lifting.study import Found, Study
from moec.compiler.capture.lifting.twin import names_widths, narrow_call, narrow_twin
from moec.compiler.capture.lifting.verify import Verifier, verified
from moec.compiler.capture.lifting.widths import Widths, choices

MAX_BYTES = 4 << 30  # of a float64 copy; a deep copy of the block comes on top while it is made
PROBES = (0, 160, 600)  # rows of the probe: as many as usual, more where these do not reach every expert
RETRIED = ("run", "call", "width", "size", "line coverage", "graph", "gate", "expert", "verify")
"""Stages at which a twin may be refused for its widths, so that another is tried."""


@dataclasses.dataclass(frozen=True)
class Lifted:
    """What was found, and by which study. full_width: what was compared on the block itself, after its twin."""

    study: Study
    parts: Parts
    verifier: Verifier
    native_error: float
    full_width: dict[str, Any] | None = None


def lift_narrow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int) -> Lifted:
    """Measures the block itself. Raises: Refused, NotGeneral."""
    needed = 8 * num_elements(module)
    if needed > MAX_BYTES:
        raise Refused("size", f"a float64 copy takes {needed / 2**30:.1f} GiB, more than {MAX_BYTES >> 30}")
    study = Study(module, args, kwargs, seed)
    parts, verifier = _lift(study)
    parts, native_error = fitted_dtypes(study, parts)
    return Lifted(study, parts, verifier, native_error)


def lift_wide(module: nn.Module, call: Call, seed: int) -> Lifted | None:
    """Measures a twin and checks what was found on the block; None where no twin does and the block itself is small.

    Raises: Refused, NotGeneral: the twin was refused, or every twin fails and the block is too large.
    """
    first: Refused | None = None
    for widths in choices(tensors(module), call.hidden):
        for rewrite in (False, True):
            if rewrite and not names_widths(module, widths):
                continue
            try:
                return _by_twin(module, call, widths, rewrite, seed)
            except Refused as error:
                if error.stage not in RETRIED:
                    raise
                first = first or error
    if 8 * num_elements(module) <= MAX_BYTES:
        return None
    raise first or Refused("size", "no axis of the block is a width that could be shrunk")


def _by_twin(module: nn.Module, call: Call, widths: Widths, rewrite: bool, seed: int) -> Lifted:
    twin = narrow_twin(module, widths, rewrite)
    args, kwargs = narrow_call(call, widths)
    try:
        found = lift_narrow(twin, args, kwargs, seed)
    except NotGeneral as error:
        raise Refused("graph", str(error)) from error
    check = FullWidthCheck(module, call, found.parts, widths, seed)
    record = {"twin": {str(s): n for s, n in widths.sizes.items()}} | check.check(lines_run(found.verifier.source))
    return dataclasses.replace(found, parts=check.parts, full_width=record)


def _lift(study: Study) -> tuple[Parts, Verifier]:
    with torch.no_grad():
        check_purity(study)
        partition, contributions, exit_, experts = _measured(study)
        router = find_router(study, partition, experts.weights)
        shared = find_shared(study, contributions)
        outputs = find_outputs(study)
        rows = study.rows(40)
        masks = find_masks(study, _shared_rows(study, shared, rows), rows)
    rule = 0 if router.rules else None
    parts = Parts(study.call, partition, experts, router, exit_, shared, outputs, masks, rule)
    return verified(study, parts)


def _measured(study: Study) -> tuple[Partition, Contributions, Exit | None, KnownExperts | GraphExperts]:
    """Partition, contributions and experts; with more probes where an expert's form has to be read from a trace."""
    remaining = list(PROBES)
    while True:
        partition = find_partition(study, remaining.pop(0))
        contributions = find_contributions(study, partition)
        try:
            return partition, contributions, *_experts(study, partition, contributions.each)
        except Refused:
            if not remaining or partition.chosen.any(0).all():
                raise


def _experts(study: Study, partition: Partition, each: Tensor) -> tuple[Exit | None, KnownExperts | GraphExperts]:
    """Experts of a known layout, behind an exit or not, else those that can be cut from a trace.

    Raises: Refused("expert"): neither; the reason is that of experts without an exit.
    """
    ways = list(exits(study, each))
    for way, inner in ways:
        known = find_experts(study, partition, inner)
        if known is not None:
            return way, known
    first: Refused | None = None
    for way, inner in ways:
        try:
            return way, find_expert_graphs(study, partition, inner)
        except Refused as error:
            first = first or error
    assert first is not None
    raise first


def _shared_rows(study: Study, shared: Found | Tensor | None, rows: Tensor) -> Tensor | None:
    if isinstance(shared, Found):
        return study.replay(shared, rows)
    return None if shared is None else shared.expand(rows.shape)

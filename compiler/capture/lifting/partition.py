"""Which tensors belong to which expert, measured: change one expert's slice and see which rows move."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moec.compiler.capture.lifting.refused import Refused
from moec.compiler.capture.lifting.slices import Slices, options
from moec.compiler.capture.lifting.study import TOLERANCE, Study
from moec.compiler.capture.lifting.trace import ROWS, Recorder
from moec.compiler.capture.tensors import storage_of

NUM_PROBES, MANY_PROBES, MANY_LEAVES = 32, 48, 100
TRACED = 24
FAINT = 1e-11  # relative change of a row below which it did not move


@dataclasses.dataclass(frozen=True)
class Partition:
    """The experts of a block.

    num_experts, top_k: E and K.  chosen: bool[P, E], which probe row uses which expert.  groups: one Slices per tensor
    of an expert.  factors: slices of single numbers, one per expert.
    """

    num_experts: int
    top_k: int
    chosen: Tensor
    groups: tuple[Slices, ...]
    factors: tuple[Slices, ...]


def find_partition(study: Study, num_probes: int = 0) -> Partition:
    """Sets the study's probe (of num_probes rows) and expert_leaves.

    Raises: Refused("randomness" | "partition" | "dynamic").
    """
    study.set_probe(study.rows(num_probes or (NUM_PROBES if len(study.leaves) < MANY_LEAVES else MANY_PROBES)))
    recorder = study.span(0, TRACED)
    if recorder.random:
        raise Refused("randomness", f"the block calls {recorder.random[0]} in evaluation mode")
    gate = frozenset(n for _, taint in recorder.selections if ROWS in taint for n in taint if n in study.leaves)
    widths = {shape[-1] for shape, _ in recorder.selections if shape}
    by_count = options(study.leaves, widths, gate)

    def likely(count: int) -> tuple[bool, bool, int]:
        return count not in widths, all(s.kind != "list" for s in by_count[count]), -len(by_count[count])

    why = "no group of equally shaped tensors is used by some tokens only"
    for count in sorted(by_count, key=likely):
        family = _family(study, by_count[count], count in widths)
        if family is None:
            continue
        chosen, members = family
        active = chosen.sum(1)
        top_k = int(active.max())
        if int(active.min()) != top_k and not _explained(recorder, chosen, top_k):
            why = f"between {int(active.min())} and {top_k} of {chosen.shape[1]} experts are active per token"
            if len(members) >= 2:
                raise Refused("dynamic", why)
            continue
        groups = tuple(s for s in members if s.view(study.leaves, 0).dim())
        if groups:
            factors = tuple(s for s in members if not s.view(study.leaves, 0).dim())
            _name_experts(study, groups)
            return Partition(chosen.shape[1], top_k, chosen, groups, factors)
    raise Refused("partition", why)


def _name_experts(study: Study, groups: tuple[Slices, ...]) -> None:
    storages = {storage_of(study.leaves[n]) for g in groups for n in g.names}
    names = (n for n, t in study.leaves.items() if storage_of(t) in storages)
    study.expert_leaves = frozenset(names)


def _family(study: Study, candidates: list[Slices], selected: bool) -> tuple[Tensor, list[Slices]] | None:
    """The largest set of slicings that move the same rows, and which rows those are."""
    families: dict[bytes, tuple[Tensor, list[Slices]]] = {}
    used: set[str] = set()
    for slices in candidates:
        if used & set(slices.names):
            continue
        moved = _like_known(study, slices, families) if len(slices.kept) > 8 else None
        moved = _touched(study, slices) if moved is None else moved
        if moved is None or not moved.any():
            continue
        always = moved.all(0)
        if always.any() and not always.all() and moved[:, ~always].any() and not selected:
            kept = (~always).nonzero()[:, 0].tolist()  # a slice that every token uses is the shared expert
            moved, slices = moved[:, kept], slices.keep(kept)
        if moved.all(1).any():
            continue
        families.setdefault(moved.numpy().tobytes(), (moved, []))[1].append(slices)
        used |= set(slices.names)
    if not families:
        return None
    size = lambda s: s.view(study.leaves, 0).numel() * len(s.kept)  # noqa: E731
    best = max(families.values(), key=lambda f: sum(size(s) for s in f[1]))
    others = [s.key for f in families.values() if f is not best for s in f[1]]
    if others:
        study.notes.append(f"{', '.join(others[:2])}: used by some tokens only, but not as the experts are")
    return best


def _like_known(study: Study, slices: Slices, families: dict[bytes, tuple[Tensor, list[Slices]]]) -> Tensor | None:
    """A known pattern that a few experts of these slices repeat."""
    for known, _ in families.values():
        if known.shape[1] == len(slices.kept):
            some = torch.randperm(len(slices.kept), generator=study.generator)[:6].tolist()
            if all(torch.equal(_moves(study, slices, e), known[:, e]) for e in some):
                return known.clone()
    return None


def _touched(study: Study, slices: Slices) -> Tensor | None:
    """bool[P, E]: rows that move with each expert; None once half of the slices move all rows."""
    count = len(slices.kept)
    moved = torch.zeros(len(study.probe), count, dtype=torch.bool)
    for e in range(count):
        moved[:, e] = _moves(study, slices, e)
        if e + 1 == max(4, count // 2) < count and moved[:, : e + 1].all():
            return None
    return moved


def _moves(study: Study, slices: Slices, e: int) -> Tensor:
    view = slices.view(study.leaves, e)
    before = view.clone()
    noise = torch.randn(view.shape, generator=study.generator, dtype=torch.float64).sign()
    view.add_(noise * (0.3 * before.abs() + 0.3 * before.std(unbiased=False) + 0.03))
    try:
        change = (study.run(study.probe) - study.y).abs().amax(1)
    finally:
        view.copy_(before)
    return ~(change <= FAINT * study.y.abs().amax())


def _explained(recorder: Recorder, chosen: Tensor, top_k: int) -> bool:
    """Whether a trace value names K experts per row, of which those with weight 0 (or no expert) do not show.

    The value is an integer [rows, K] (or its transpose) whose rows hold all experts that were seen to act.
    """
    num_experts = chosen.shape[1]
    shown = chosen[:TRACED]
    for value in recorder.values:
        t = value.tensor
        if t.dtype not in (torch.int64, torch.int32) or t.dim() != 2 or not t.numel() or int(t.min()) < 0:
            continue
        for named in (t, t.T):
            if named.shape[0] != len(shown) or not top_k <= named.shape[1] <= num_experts // 2:
                continue
            wide = torch.zeros(len(shown), max(num_experts, int(t.max()) + 1), dtype=torch.bool)
            wide.scatter_(1, named.long(), True)
            if bool((wide.sum(1) == named.shape[1]).all()) and not bool((shown & ~wide[:, :num_experts]).any()):
                return named.shape[1] == top_k
    return False


@dataclasses.dataclass(frozen=True)
class Contributions:
    """y = base + sum over experts of each: base [P, H], each [P, E, H]."""

    base: Tensor
    each: Tensor


def find_contributions(study: Study, partition: Partition) -> Contributions:
    """Zeroes each expert, then all. Raises: Refused("additivity"): the output is no sum of one term per expert."""
    scale = study.y.abs().amax()
    experts = range(partition.num_experts)
    each = torch.stack([study.y - without(study, partition, [e], study.probe) for e in experts], 1)
    each[each.abs() < 1e-13 * scale] = 0
    base = without(study, partition, list(experts), study.probe)
    if not torch.isfinite(base).all() or ((study.y - base - each.sum(1)).abs() > TOLERANCE * scale).any():
        raise Refused("additivity", "the output is not shared(x) plus a sum of one term per expert")
    return Contributions(base, each)


def without(study: Study, partition: Partition, experts: list[int], rows: Tensor) -> Tensor:
    """The output for rows [T, H] with the tensors of some experts zeroed."""
    views = [g.view(study.leaves, e) for g in partition.groups for e in experts]
    before = [v.clone() for v in views]
    try:
        for v in views:
            v.zero_()
        return study.run(rows)
    finally:
        for v, old in zip(views, before, strict=True):
            v.copy_(old)

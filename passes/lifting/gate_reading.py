"""Reads a GateSpec from a piece of graph: constants and ops suggest candidates, evaluation on probes decides.

Nothing is matched op by op: casts, views, transposes and the order of operations do not matter. A candidate is accepted
only when the region and GateSpec.apply agree on every probe row: the experts as a set, the weights expert by expert. On
rows where the region's own choice ties, the sorted weights must agree (torch leaves the order of ties open).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moec.passes.infra.compare import CHOOSING, in_effect, looked_at, open_rows
from moec.passes.infra.errors import in_one_line
from moec.passes.infra.rewrite import Region, symbolic
from moec.passes.ir.evaluate import Constant, run_nodes
from moec.passes.ir.gate import GateSpec
from moec.passes.lifting.probes import gate_logits
from moec.passes.lifting.sizes import in_parts, joined

aten = torch.ops.aten
ROUNDINGS = 8
"""Weights may differ by so many roundings of the coarser of their own dtype and the compute dtype, times the logits'
size: an exponential turns a rounding of its argument into that many roundings of its value."""


@dataclasses.dataclass(frozen=True)
class GateRegion:
    """A gate in a graph. region.inputs are `logits` and sizes only; biases: constants [E] inside that may choose."""

    region: Region
    logits: Node
    weights: Node
    experts: Node
    biases: tuple[Node, ...]

    @property
    def num_experts(self) -> int:
        """E: width of the logits."""
        return int(self.logits.meta["val"].shape[-1])

    @property
    def top_k(self) -> int:
        """K: experts that a token is given."""
        return int(self.weights.meta["val"].shape[-1])


@dataclasses.dataclass(frozen=True)
class ReadGate:
    """A verified reading. bias: which of the region's biases chooses. error: of the weights, relative."""

    spec: GateSpec
    bias: int | None
    error: float


@dataclasses.dataclass(frozen=True)
class _Observed:
    """What the region does on the probe rows. open_rows, free_rows: OpenRows.rows and OpenRows.free."""

    logits: Tensor  # [R, E]
    weights: Tensor  # f32 [R, K]
    experts: Tensor  # i64 [R, K]
    open_rows: Tensor  # bool [R]
    free_rows: Tensor  # bool [R]


@dataclasses.dataclass(frozen=True)
class _Clues:
    """What the region's ops suggest."""

    scores: tuple[str, ...]
    numbers: tuple[float, ...]
    transforms: tuple[tuple[str, float], ...]
    groups: tuple[tuple[int, int], ...]
    masks: tuple[float, ...]
    dtypes: tuple[str, ...]
    renormalises: bool
    clamps: bool


def read_gate(gate: GateRegion, constant: Constant) -> ReadGate | str:
    """The spec that the region agrees with, or why there is none."""
    try:
        observed = _observe(gate, constant)
    except Exception as error:
        return f"the gate region does not run on probe logits: {in_one_line(error)}"
    if observed.open_rows.float().mean() > 0.8:
        return "nearly every probe row ties, so that the rule cannot be told"
    clues = _clues(gate)
    biases = [_value(node, gate, constant).reshape(-1) for node in gate.biases]
    best: ReadGate | None = None
    for spec, bias in _choices(gate, clues):
        vector = None if bias is None else biases[bias]
        found = _finish(spec, bias, vector, observed, clues)
        if found is not None and _is_better(found, best):
            best = found
        if best is not None and best.error == 0:
            return best
    return best or _refusal(clues)


def _is_better(found: ReadGate, best: ReadGate | None) -> bool:
    """Earlier readings are the likelier ones; a later one must be nearer by more than the luck of a rounding."""
    return best is None or (found.error == 0 < best.error) or found.error < best.error / 8


def _refusal(clues: _Clues) -> str:
    parts = f"scores {'/'.join(clues.scores)}, numbers {list(clues.numbers)}, group shapes {list(clues.groups)}"
    return f"no gate rule agrees with the region on the probe logits (tried {parts})"


def _observe(gate: GateRegion, constant: Constant) -> _Observed:
    probes = gate_logits(gate.num_experts, gate.logits.meta["val"].dtype)
    parts = in_parts(probes, gate.logits.meta["val"].shape)
    keep = {gate.weights.name, gate.experts.name, *looked_at(gate.region.nodes)}
    runs = []
    for part in parts:
        given = _given(gate, part)
        runs.append(run_nodes(gate.region.nodes, given, constant, keep - given.keys()) | given)
    values, logits = joined(runs), torch.cat(parts)
    rows = logits.shape[0]
    ties = open_rows(gate.region.nodes, values, rows)
    return _Observed(
        logits,
        values[gate.weights.name].reshape(rows, gate.top_k).float(),
        values[gate.experts.name].reshape(rows, gate.top_k).long(),
        ties.rows,
        ~ties.weighed,
    )


def _given(gate: GateRegion, logits: Tensor) -> dict[str, Any]:
    """Values for the region's inputs: the probe rows in the logits' own shape, and sizes to match."""
    shape = [symbolic(s) for s in gate.logits.meta["val"].shape]
    rows = logits.shape[0]
    values: dict[str, int] = {}
    symbols = [str(x) for s in shape for x in sorted(getattr(s, "free_symbols", ()), key=str)]
    for symbol in dict.fromkeys(symbols):
        values[symbol] = rows if len(values) == len(set(symbols)) - 1 else 1
    given: dict[str, Any] = {gate.logits.name: logits.reshape([_number(s, values) for s in shape])}
    for node in gate.region.sizes:
        given[node.name] = _number(symbolic(node.meta["val"]), values)
    for node in gate.region.templates:
        val = node.meta["val"]
        given[node.name] = torch.zeros([_number(symbolic(s), values) for s in val.shape], dtype=val.dtype)
    return given


def _number(expr: Any, values: dict[str, int]) -> int:
    return expr if isinstance(expr, int) else int(expr.subs({x: values[str(x)] for x in expr.free_symbols}))


def _value(node: Node, gate: GateRegion, constant: Constant) -> Tensor:
    needed, todo = {node}, [node]
    while todo:
        for p in todo.pop().all_input_nodes:
            if p not in needed:
                needed.add(p)
                todo.append(p)
    return run_nodes([n for n in gate.region.nodes if n in needed], {}, constant, {node.name})[node.name]


EXPONENTIALS = ("softmax", "_softmax", "exp", "log_softmax", "_log_softmax", "exp2")


def _clues(gate: GateRegion) -> _Clues:
    nodes = [n for n in gate.region.nodes if n.op == "call_function"]
    names = {getattr(getattr(n.target, "overloadpacket", None), "__name__", str(n.target)) for n in nodes}
    numbers = tuple(dict.fromkeys(_numbers(nodes)))
    scores = ["softmax"] if names & set(EXPONENTIALS) else []
    scores += ["sigmoid"] if names & {"sigmoid", "exp", "tanh", "log_sigmoid"} else []
    if sum(n.target in CHOOSING for n in nodes) > 1 and names & {"masked_fill", "where"}:
        scores.append("sparsemixer")
    dtypes = [n.meta["val"].dtype for n in nodes if isinstance(n.meta.get("val"), Tensor)]
    dtypes = [gate.logits.meta["val"].dtype, *(d for d in dtypes if d.is_floating_point)]
    order = sorted(dict.fromkeys(dtypes), key=lambda d: -d.itemsize)
    return _Clues(
        scores=tuple(scores) or ("none",),
        numbers=tuple(abs(n) for n in numbers if math.isfinite(n) and n),
        transforms=tuple(_transforms(names, numbers)),
        groups=tuple(dict.fromkeys(_groups(nodes, gate))),
        masks=tuple(dict.fromkeys([*(n for n in numbers if n <= 0), -math.inf, 0.0])),
        dtypes=tuple(str(d).removeprefix("torch.") for d in order),
        renormalises=bool(names & {"div", "div_", "true_divide", "normalize", "reciprocal", "linalg_vector_norm"}),
        clamps=bool(names & {"clamp", "clamp_", "clamp_min", "maximum", "max", "normalize"}),
    )


def _numbers(nodes: list[Node]) -> Iterator[float]:
    """The float constants of the region (an int too where arithmetic uses it)."""
    arithmetic = (
        "add",
        "sub",
        "mul",
        "div",
        "clamp",
        "clamp_min",
        "pow",
        "gt",
        "ge",
        "lt",
        "le",
        "masked_fill",
        "where",
    )
    for n in nodes:
        name = getattr(getattr(n.target, "overloadpacket", None), "__name__", "").rstrip("_")
        flat = itertools.chain(n.args, n.kwargs.values())
        for a in flat:
            if isinstance(a, float) or (isinstance(a, int) and not isinstance(a, bool) and name in arithmetic):
                yield float(a)


def _transforms(names: set[str], numbers: tuple[float, ...]) -> Iterator[tuple[str, float]]:
    """The plain logits first."""
    yield "none", 0.0
    positive = [n for n in numbers if n > 0 and math.isfinite(n)]
    if names & {"std", "var", "sqrt", "rsqrt", "std_mean", "var_mean"}:
        yield "std", 0.0
        yield from (("std", n) for n in positive if n < 1e-2)
    if "tanh" in names:
        yield from (("tanh_cap", n) for n in positive)
    if names & {"div", "div_", "mul", "mul_"}:
        yield from (("temperature", n) for p in positive for n in (p, 1 / p) if n != 1.0)


def _groups(nodes: list[Node], gate: GateRegion) -> Iterator[tuple[int, int]]:
    """(groups, kept): from values [.., G, E/G] and top-k calls over G of them."""
    e = gate.num_experts
    shapes = [n.meta["val"].shape for n in nodes if isinstance(n.meta.get("val"), Tensor)]
    counts = [s[-2] for s in shapes if len(s) > 2 and isinstance(s[-2], int) and s[-2] > 1 and s[-2] * s[-1] == e]
    for count in dict.fromkeys(counts):
        for n in nodes:
            if n.target is aten.topk.default and n.args[0].meta["val"].shape[-1] == count:  # type: ignore[union-attr]
                yield int(count), int(n.args[1])  # type: ignore[arg-type]


def _choices(gate: GateRegion, clues: _Clues) -> Iterator[tuple[GateSpec, int | None]]:
    """Specs that differ in what they choose and in the raw weights; renormalisation and scale come later."""
    biases: list[tuple[str, int | None]] = [(on, b) for b in range(len(gate.biases)) for on in ("scores", "logits")]
    biases.append(("none", None))
    given = gate.weights.meta["val"].dtype
    narrower = [d for d in clues.dtypes if getattr(torch, d).itemsize < given.itemsize]
    roundings = [str(given).removeprefix("torch."), *narrower]
    groups = [(1, 1, "max", 0.0)]
    shapes = itertools.product(clues.groups, ("sum_top2", "max"), clues.masks)
    groups = [(g, kept, how, mask) for (g, kept), how, mask in shapes] + groups
    orders = ("score_then_topk", "topk_then_score")
    for dtype, rounded, (transform, param), score, order, (on, bias), (g, kept, how, mask) in itertools.product(
        clues.dtypes, roundings, clues.transforms, clues.scores, orders, biases, groups
    ):
        if score in ("none", "sparsemixer") and order == "topk_then_score":
            continue
        epsilons = [n / 2 for n in clues.numbers if n < 1] if score == "sparsemixer" else [0.0]
        for eps in epsilons:
            spec = GateSpec(
                gate.top_k,
                score,
                order,
                False,
                0.0,
                "add",
                on,
                g,
                kept,
                how,
                mask,
                1.0,
                transform,
                param,
                dtype,
                rounded,
            )
            yield dataclasses.replace(spec, jitter_eps=eps), bias


def _finish(
    spec: GateSpec, bias: int | None, vector: Tensor | None, observed: _Observed, clues: _Clues
) -> ReadGate | None:
    """The spec with the renormalisation and scale that make its weights agree; None where none does."""
    try:
        raw, experts = spec.apply(observed.logits, vector)
    except (ValueError, RuntimeError):
        return None
    if not _same_experts(experts, raw, observed):
        return None
    best: ReadGate | None = None
    for renormalise, eps, rule in _renormalisations(clues):
        given = dataclasses.replace(spec, renormalise=renormalise, renorm_eps=eps, renorm_rule=rule)
        weights, _ = given.apply(observed.logits, vector)
        for scale in _scales(weights, observed, clues):
            final = dataclasses.replace(given, scale=scale)
            weights, experts = final.apply(observed.logits, vector)
            error = _weights_error(weights, experts, observed)
            read = ReadGate(final, bias, error)
            if error <= _allowed(final) and _is_better(read, best):
                best = read
    return best


def _renormalisations(clues: _Clues) -> Iterator[tuple[bool, float, str]]:
    """The region's own eps first, although a tiny one cannot be told from none by the softmax of anything."""
    yield False, 0.0, "add"
    if clues.renormalises:
        rules = ("clamp", "add") if clues.clamps else ("add",)
        small = [n for n in clues.numbers if n < 1e-2]
        yield from ((True, n, rule) for n in small for rule in rules)
        yield True, 0.0, "add"


def _scales(weights: Tensor, observed: _Observed, clues: _Clues) -> list[float]:
    """The factor between both weights where it is one of the region's numbers, its inverse, or a product of two."""
    settled = ~observed.open_rows & weights.isfinite().all(-1) & observed.weights.isfinite().all(-1)
    ours, theirs = weights[settled].sum(-1), observed.weights[settled].sum(-1)
    usable = ours.abs() > 1e-6
    if not usable.any():
        return [1.0]
    ratio = float((theirs[usable] / ours[usable]).median())
    ones = [1.0, *clues.numbers, *(1 / n for n in clues.numbers)]
    known = [*ones, *(a * b for a, b in itertools.combinations(clues.numbers, 2))]
    near = [k for k in known if abs(k - ratio) <= 2e-2 * abs(ratio)]
    return list(dict.fromkeys(near[:4]))


def _same_experts(experts: Tensor, weights: Tensor, observed: _Observed) -> bool:
    settled = ~observed.open_rows & ~weights.isnan().any(-1) & ~observed.weights.isnan().any(-1)
    ours, theirs = in_effect(experts, weights), in_effect(observed.experts, observed.weights)
    return bool(settled.any()) and torch.equal(ours[settled].sort(-1).values, theirs[settled].sort(-1).values)


def _allowed(spec: GateSpec) -> float:
    return ROUNDINGS * max(torch.finfo(getattr(torch, n)).eps for n in (spec.compute_dtype, spec.weights_dtype))


def _weights_error(weights: Tensor, experts: Tensor, observed: _Observed) -> float:
    """The largest relative difference, over the logits' size; inf where NaN does not agree."""
    by_expert = [in_effect(experts, weights), in_effect(observed.experts, observed.weights)]
    order = [e.argsort(-1) for e in by_expert]
    by_size = (observed.weights.isnan().any(-1) | observed.open_rows)[:, None]
    ours = torch.where(by_size, weights.sort(-1).values, weights.gather(-1, order[0]))
    theirs = torch.where(by_size, observed.weights.sort(-1).values, observed.weights.gather(-1, order[1]))
    if not torch.equal(ours.isnan(), theirs.isnan()):
        return math.inf
    free = observed.free_rows[:, None]
    ours, theirs = ours.nan_to_num().masked_fill(free, 0), theirs.nan_to_num().masked_fill(free, 0)
    size = 1 + observed.logits.float().nan_to_num().abs().amax(-1, keepdim=True)
    # below 1e-30 the eps of a renormalisation is all that is left of a weight
    return float(((ours - theirs).abs() / (theirs.abs() * size + 1e-23)).max())

"""Reads a moec::experts call from a region of ATen: roles of the weights by dataflow, layout and activation by trial.

What a weight does follows from where it acts on the way from x: the first products take the input projections, the
second ones the output projections, additions after each the biases. Which half is the gate, how the stacks lie, which
activation, which value weighs: candidates for all of these are evaluated against the region, on random weights.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moec.passes.infra.compare import relative_error
from moec.passes.infra.errors import in_one_line
from moec.passes.infra.evidence import BUDGET_BYTES, TOLERANCE
from moec.passes.infra.recipes import recipe_of
from moec.passes.infra.rewrite import PRODUCTS, num_elements
from moec.passes.ir.activation import FUNCTIONS, Activation
from moec.passes.ir.evaluate import constants_of, random_read, run_nodes
from moec.passes.ir.weights import Read, Weight, concat, reshape, slice_, stack, transpose
from moec.passes.lifting.expert_regions import ExpertsRegion
from moec.passes.lifting.sizes import bind, in_parts, like, number

aten = torch.ops.aten
GROUPED = (*PRODUCTS, aten._grouped_mm.default, aten.baddbmm.default)


@dataclasses.dataclass(frozen=True)
class Stacks:
    """Canonical recipes. w_in [E, 2F, H] gate half first ([E, F, H] without gate), w_out [E, H, F], biases or None."""

    w_in: Weight
    w_out: Weight
    b_in: Weight | None
    b_out: Weight | None
    gated: bool


@dataclasses.dataclass(frozen=True)
class ReadExperts:
    """A verified reading, free of one region's nodes. layout: which of the candidate stacks. weigher: the place in the
    region's calls of the value that weighs (dense: over all E). error: relative, at the region's own dtype."""

    layout: int
    weigher: int
    dense: bool
    act: str
    weight_on_input: bool
    error: float


PROBE_SCALES = (1.0, 30.0)  # rows that tell smooth activations apart, and rows that reach the limits of clamped ones


@dataclasses.dataclass(frozen=True)
class _Trial:
    """The region's values on probe rows."""

    x: Tensor
    y: Tensor
    experts: Tensor
    weighers: tuple[tuple[int, bool, Tensor], ...]  # (place, dense, [R, K])


def read_experts(site: ExpertsRegion, weights: Mapping[str, Weight]) -> ReadExperts | str:
    """The moec::experts call that agrees with the region, or why there is none."""
    found = roles(site, weights)
    if isinstance(found, str):
        return found
    stacks = list(layouts(site, found))
    if not stacks:
        return f"the weights {', '.join(n.name for n in site.constants[:4])} do not fit the shapes of gated experts"
    needed = sum(w.num_bytes for ws in found.values() for w in ws)
    if needed > BUDGET_BYTES:
        return f"its weights need {needed >> 20} MiB on trial, more than {BUDGET_BYTES >> 20} MiB"
    own = [weights[str(n.target)] for n in site.cut.weights if str(n.target) in weights]
    read = random_read([*own, *(w for ws in found.values() for w in ws)])
    trials = []
    for scale in PROBE_SCALES:
        trial = _observe(site, weights, scale, read)
        if isinstance(trial, str):
            return trial
        trials.append(trial)
    best = _search(site, stacks, trials, read)
    if best is None:
        return "no layout, activation and weighing of gated experts agrees with the region on probes"
    return best


def roles(site: ExpertsRegion, weights: Mapping[str, Weight]) -> dict[str, list[Weight]] | str:
    """Recipes by role: "in" and "out" (products), "in bias" and "out bias", each in order of use; or why not."""
    by_role: dict[str, list[Weight]] = {"in": [], "out": [], "in bias": [], "out bias": []}
    recipes = {n: recipe_of(n, weights) for n in site.constants}
    for node, role in _roles(site).items():
        recipe = recipes[node]
        if role not in by_role:
            return f"{node.name} is used {role}; experts have two products and their biases"
        if recipe is None:
            return f"{node.name} is computed from weights by {node.target}, not only rearranged"
        by_role[role].append(recipe)
    if not by_role["in"] or not by_role["out"]:
        return "the region does not multiply by weights twice"
    return by_role


def _roles(site: ExpertsRegion) -> dict[Node, str]:
    """What each constant does, from the number of products between x and its use."""
    level: dict[Node, int] = {site.cut.entry: 0}  # values that depend on x
    carried: dict[Node, tuple[Node, ...]] = {c: (c,) for c in site.constants}  # values that do not, and their weights
    found: dict[Node, str] = {}
    for node in site.cut.nodes:
        if node in carried:
            continue
        producers = node.all_input_nodes
        moving = [level[p] for p in producers if p in level]
        met = [c for p in producers for c in carried.get(p, ())]
        if not moving:
            carried[node] = tuple(dict.fromkeys(met))
            continue
        is_product = node.target in GROUPED
        for c in met:
            found.setdefault(c, _role(node, c, max(moving), is_product))
        level[node] = max(moving) + (is_product and any(found[c] in ("in", "out") for c in met))
    return found


def _role(node: Node, constant: Node, products_before: int, is_product: bool) -> str:
    """products_before: on the way from x to this use."""
    bias = is_product and _is_own_bias(node, constant)
    if is_product and not bias:
        return ("in", "out")[products_before] if products_before < 2 else "in a third product"
    at = products_before + bias
    is_sum = bias or node.target in (aten.add.Tensor, aten.add_.Tensor)
    return ("", "in bias", "out bias")[at] if is_sum and 1 <= at <= 2 else f"by {node.target}"


def _is_own_bias(node: Node, constant: Node) -> bool:
    """Whether a product adds this operand (linear's third, addmm's and baddbmm's first)."""
    if node.target is aten.linear.default:
        return len(node.args) > 2 and node.args[2] is constant
    return node.target in (aten.addmm.default, aten.baddbmm.default) and node.args[0] is constant


def layouts(site: ExpertsRegion, found: Mapping[str, list[Weight]]) -> Iterator[Stacks]:
    """Every canonical reading of the roles that fits the shapes, in a fixed order."""
    e, h = site.choice.num_experts, int(site.cut.entry.meta["val"].shape[-1])
    biases_in = list(_gathered(_flat(found["in bias"], e), e, 1)) or [()]
    biases_out = list(_gathered(_flat(found["out bias"], e), e, 1)) or [()]
    for w_in, w_out, b_in, b_out in itertools.product(
        _gathered(found["in"], e, 2), _gathered(found["out"], e, 2), biases_in, biases_out
    ):
        if len(w_out) != 1 or len(b_out) > 1:
            continue
        for down in _oriented(w_out[0], h, 1):
            inner = down.shape[2]
            for parts in itertools.product(*(_oriented(w, h, 2) for w in w_in)):
                yield from _halved(parts, down, inner, b_in, b_out[0] if b_out else None)


def _flat(biases: list[Weight], e: int) -> list[Weight]:
    """Stacked biases without the axis [E, 1, n] by which they are added to [E, T, n]."""
    stacked = [len(w.shape) == 3 and tuple(w.shape[:2]) == (e, 1) for w in biases]
    return [reshape(w, (e, w.shape[2])) if s else w for w, s in zip(biases, stacked, strict=True)]


def _gathered(recipes: list[Weight], e: int, rank: int) -> Iterator[tuple[Weight, ...]]:
    """Stacks [E, ..] from stacks, or from lists of E or 2E single ones (in turn, or one kind after the other)."""
    if recipes and all(len(w.shape) == rank + 1 and w.shape[0] == e for w in recipes):
        yield tuple(recipes)
    elif recipes and all(len(w.shape) == rank for w in recipes):
        if len(recipes) == e:
            yield (_restack(recipes),)
        elif len(recipes) == 2 * e:
            yield _restack(recipes[::2]), _restack(recipes[1::2])
            yield _restack(recipes[:e]), _restack(recipes[e:])


def _restack(parts: list[Weight]) -> Weight:
    """A stack; the original where the parts are its slices in order."""
    whole = parts[0]
    while whole.op in ("reshape", "slice"):
        (whole,) = whole.inputs
    if whole.shape == (len(parts), *parts[0].shape) and all(_is_slice(p, whole, i) for i, p in enumerate(parts)):
        return whole
    return stack(parts)


def _is_slice(part: Weight, whole: Weight, idx: int) -> bool:
    """Whether a part is whole[idx]."""
    if part.op != "reshape" or part.inputs[0].op != "slice":
        return False
    inner = part.inputs[0]
    return inner.args == (0, idx, idx + 1, 1) and inner.inputs[0] == whole


def _oriented(w: Weight, h: int, axis: int) -> Iterator[Weight]:
    """The stack with H on `axis`, both ways where it is square."""
    if w.shape[axis] == h:
        yield w
    if w.shape[3 - axis] == h:
        yield transpose(w, 1, 2)


def _halved(
    parts: tuple[Weight, ...], down: Weight, inner: int, b_in: tuple[Weight, ...], b_out: Weight | None
) -> Iterator[Stacks]:
    """One or two input projections as gate and up halves, in each order that their widths allow."""
    widths = [p.shape[1] for p in parts]
    if len(parts) == 1 and widths == [inner] and len(b_in) <= 1:
        yield Stacks(parts[0], down, b_in[0] if b_in else None, b_out, False)
    elif len(parts) == 1 and widths == [2 * inner] and len(b_in) <= 1:
        for arrange in (lambda w: w, _swapped, _even_first, lambda w: _swapped(_even_first(w))):
            yield Stacks(arrange(parts[0]), down, arrange(b_in[0]) if b_in else None, b_out, True)
    elif widths == [inner, inner] and len(b_in) in (0, 2):
        for order in (1, -1):
            bias = concat(list(b_in[::order]), 1) if b_in else None
            yield Stacks(concat(list(parts[::order]), 1), down, bias, b_out, True)


def _swapped(w: Weight) -> Weight:
    half = w.shape[1] // 2
    return concat([slice_(w, 1, half, 2 * half), slice_(w, 1, 0, half)], 1)


def _even_first(w: Weight) -> Weight:
    return concat([slice_(w, 1, 0, w.shape[1], 2), slice_(w, 1, 1, w.shape[1], 2)], 1)


def _observe(site: ExpertsRegion, weights: Mapping[str, Weight], scale: float, read: Read) -> _Trial | str:
    """Runs the region on random rows of a scale, at once or in parts; the first E prefer each expert in turn."""
    e, entry = site.choice.num_experts, site.cut.entry.meta["val"]
    h = int(entry.shape[-1])
    generator = torch.Generator().manual_seed(20261122)
    rows = scale * torch.randn(max(16, 2 * e), h, generator=generator)
    wanted = torch.randn(len(rows), e, generator=generator)  # scores far from 0 and 1 tell where a weight acts
    wanted[:e] += 6 * torch.eye(e)
    constant = functools.cache(constants_of(weights, _no_attribute, read))
    weighers = list(_weighers(site))
    parts = zip(in_parts(rows, entry.shape), in_parts(wanted, (*entry.shape[:-1], e)), strict=True)
    try:
        runs = [_run(site, x, logits, constant, weighers) for x, logits in parts]
    except Exception as error:
        return f"the region does not run on probes: {in_one_line(error)}"
    x, y, experts, *weighed = (torch.cat(values) for values in zip(*runs, strict=True))
    reached = experts.unique().numel()
    if reached < e:
        return f"the probes reach only {reached} of {e} experts"
    found = [
        (at, dense, w.gather(1, experts) if dense else w) for (at, dense), w in zip(weighers, weighed, strict=True)
    ]
    return _Trial(x, y, experts, tuple(found))


def _run(
    site: ExpertsRegion, x: Tensor, logits: Tensor, constant: Callable[[str], Tensor], weighers: list[tuple[int, bool]]
) -> list[Tensor]:
    """x [R, H], y [R, H], experts [R, K] and each weigher [R, K or E] of one run of the region.

    Raises: ValueError: it does not give a row for each token.  Whatever its operators raise.
    """
    rows, entry, output = len(x), site.cut.entry, site.cut.output.name
    values = bind(entry.meta["val"].shape, rows)
    given: dict[str, Any] = {n.name: like(n, values) for n in site.cut.leaves}
    shape = [number(s, values) for s in entry.meta["val"].shape]
    given[entry.name] = x.reshape(shape).to(entry.meta["val"].dtype)
    for node in site.choice.logits:
        given[node.name] = logits.reshape(given[node.name].shape).to(given[node.name].dtype)
    names = [site.choice.indices.name, *(site.cut.nodes[i].name for i, _ in weighers)]
    got = run_nodes((*site.cut.weights, *site.cut.nodes), given, constant, {output, *names})
    if got[output].numel() != x.numel():
        raise ValueError("it does not take and give one row for each token")
    routing = [got[name].reshape(rows, -1) for name in names]
    return [given[entry.name].reshape(x.shape), got[output].reshape(x.shape), *routing]


def _no_attribute(name: str) -> Tensor:
    raise KeyError(f"{name} is no weight")


def _weighers(site: ExpertsRegion) -> Iterator[tuple[int, bool]]:
    """Values that follow from the routing alone and hold K or E numbers per token, the latest first."""
    indices, entry = site.choice.indices, site.cut.entry
    e, k = site.choice.num_experts, site.choice.top_k
    rows = num_elements(indices) // k
    moving, places = {entry}, []
    fixed = set(site.constants)
    for place, node in enumerate(site.cut.nodes):
        producers = node.all_input_nodes
        if any(p in moving for p in producers):
            moving.add(node)
            continue
        if producers and all(p in fixed or p.op == "get_attr" for p in producers):
            fixed.add(node)
            continue
        val = node.meta.get("val")
        if isinstance(val, Tensor) and val.dtype.is_floating_point and val.dim() >= 2:
            width = val.shape[-1]
            if width in (k, e) and num_elements(node) == rows * width:
                places.append((place, width == e and width != k))
    yield from reversed(places)


def _search(site: ExpertsRegion, stacks: list[Stacks], trials: list[_Trial], read: Read) -> ReadExperts | None:
    """The first candidate within tolerance on all trials; of activations that differ in rounding only, the closest."""
    names = {str(getattr(n.target, "overloadpacket", n.target)).removeprefix("aten.") for n in site.cut.nodes}
    for layout, given in enumerate(stacks):
        found = _search_layout(layout, given, list(_activations(site, given.gated, names)), trials, read)
        if found is not None:
            return found
    return None


def _search_layout(
    layout: int, given: Stacks, activations: list[str], trials: list[_Trial], read: Read
) -> ReadExperts | None:
    """The best candidate of one layout, whose stacks are in memory until it returns."""
    tolerance = TOLERANCE[trials[0].y.dtype]
    tensors = [None if r is None else r.materialise(read) for r in (given.w_in, given.w_out, given.b_in, given.b_out)]
    for weigher, on_input in itertools.product(range(len(trials[0].weighers)), (False, True)):
        place, dense, _ = trials[0].weighers[weigher]
        found: list[ReadExperts] = []
        for act in activations:
            error = 0.0
            for trial in trials:
                error = max(error, _error(tensors, trial.weighers[weigher][2], on_input, act, trial))
                if not error <= tolerance:
                    break
            else:
                found.append(ReadExperts(layout, place, dense, act, on_input, error))
        if found:
            return min(found, key=lambda r: r.error)
    return None


def _error(tensors: list[Tensor | None], weights: Tensor, on_input: bool, act: str, trial: _Trial) -> float:
    """tensors: w_in, w_out, b_in, b_out."""
    y = torch.ops.moec.experts(trial.x, weights, trial.experts, *tensors, None, act, 0, on_input)
    return relative_error(trial.y, y.to(trial.y.dtype))


HINTS = {"silu": {"silu", "sigmoid"}, "gelu": {"gelu", "erf"}, "gelu_tanh": {"gelu", "tanh"}, "sigmoid": {"sigmoid"}}
HINTS |= {"relu": {"relu", "clamp", "clamp_min", "maximum"}, "relu2": {"relu", "clamp", "clamp_min"}, "identity": set()}


def _activations(site: ExpertsRegion, gated: bool, ops: set[str]) -> Iterator[str]:
    """Names worth trying: functions whose ops occur, with the region's own numbers as limits and slopes."""
    numbers = sorted({abs(float(a)) for n in site.cut.nodes for a in n.args if isinstance(a, (int, float)) and a})
    clamps = any(o.startswith(("clamp", "minimum", "hardtanh")) for o in ops)
    low = site.cut.entry.meta["val"].dtype.itemsize < 4
    plain = [f for f in FUNCTIONS if not HINTS[f] or HINTS[f] & ops]
    if not gated:
        yield from (f"!{f}" for f in plain)
        return
    for name in plain:
        yield name
        if low:
            yield f"f32:{name}"
        if clamps:
            yield from (str(Activation(name, True, x)) for x in numbers)
    if clamps and "sigmoid" in ops:
        yield from (str(Activation("swigluoai", True, x, alpha)) for x in numbers for alpha in numbers)

"""The feed-forward layouts that moec::experts knows: which of an expert's tensors is what, found by trying."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moec.passes.ir.activation import FUNCTIONS, Activation
from moec.passes.ir.weights import Weight, concat, reshape, slice_, transpose

SPLITS = ("gate|up", "up|gate", "gate,up", "up,gate")  # halves of a fused matrix; with a comma: in turn


@dataclasses.dataclass(frozen=True)
class Stacks:
    """The weights of moec::experts: w_in [E, 2F, H], w_out [E, H, F], b_in [E, 2F], b_out [E, H]."""

    w_in: Weight
    w_out: Weight
    b_in: Weight | None
    b_out: Weight | None


@dataclasses.dataclass(frozen=True)
class Layout:
    """Roles of an expert's tensors, by their index.

    matrices: the input projections (gate and up, or one), then the output projection.  transposed: stored [in, out].
    biases: of each matrix, None where there is none.  split: of a fused input projection; None: not fused.
    """

    matrices: tuple[int, ...]
    transposed: tuple[bool, ...]
    biases: tuple[int | None, ...]
    split: str | None

    @property
    def gated(self) -> bool:
        """Whether there is a gate projection beside the one of up."""
        return self.split is not None or len(self.matrices) == 3

    def stacks(self, parts: Sequence[Weight]) -> Stacks:
        """From the stack [E, ..] of each tensor."""
        parts = [reshape(p, (p.shape[0], *matrix_shape(p.shape[1:]))) if p.shape[-1] == 1 else p for p in parts]
        turned = [
            transpose(parts[m], 1, 2) if t else parts[m] for m, t in zip(self.matrices, self.transposed, strict=True)
        ]
        biases = [None if b is None else parts[b] for b in self.biases]
        w_in, b_in = turned[0], biases[0]
        if len(self.matrices) == 3:
            w_in = concat(turned[:2], 1)
            b_in = None if biases[0] is None else concat([b for b in biases[:2] if b is not None], 1)
        elif self.split not in (None, "gate|up"):
            w_in = self._gate_first(w_in)
            b_in = None if b_in is None else self._gate_first(b_in)
        return Stacks(w_in, turned[-1], b_in, biases[-1])

    def _gate_first(self, w: Weight) -> Weight:
        n = w.shape[1]
        first, second = (w_half(w, 0, n // 2), w_half(w, n // 2, n))
        if self.split in ("gate,up", "up,gate"):
            first, second = slice_(w, 1, 0, n, 2), slice_(w, 1, 1, n, 2)
        return concat([second, first] if self.split in ("up|gate", "up,gate") else [first, second], 1)


def matrix_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without the axes of size 1 behind the second (kernels of convolutions of width 1)."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return tuple(shape)


def w_half(w: Weight, start: int, stop: int) -> Weight:
    """Rows start to stop of every expert's matrix or bias: w [E, N, ..] -> [E, stop - start, ..]."""
    return slice_(w, 1, start, stop)


def layouts(shapes: Sequence[tuple[int, ...]], hidden: int) -> Iterator[Layout]:
    """All layouts that fit tensors of these shapes (one expert's)."""
    matrices = [i for i, s in enumerate(shapes) if len(s) == 2]
    vectors = [i for i, s in enumerate(shapes) if len(s) == 1]
    if len(matrices) + len(vectors) != len(shapes) or len(matrices) not in (2, 3) or len(vectors) > 3:
        return
    for order in itertools.permutations(matrices):
        for turned in itertools.product((False, True), repeat=len(order)):
            sizes = [shapes[m] if t else shapes[m][::-1] for m, t in zip(order, turned, strict=True)]  # (in, out)
            splits = list(_splits(sizes, hidden))
            for biases in (
                dict.fromkeys(itertools.permutations([None] * len(order) + vectors, len(order))) if splits else ()
            ):
                fits = all(b is None or shapes[b] == (o,) for b, (_, o) in zip(biases, sizes, strict=True))
                both = len(order) == 2 or (biases[0] is None) == (biases[1] is None)
                if fits and both and set(vectors) <= set(biases):
                    for split in splits:
                        yield Layout(order, turned, biases, split)


def _splits(sizes: Sequence[tuple[int, int]], hidden: int) -> Iterator[str | None]:
    if sizes[0][0] != hidden or sizes[-1][1] != hidden:
        return
    if len(sizes) == 3:
        if sizes[0] == sizes[1] and sizes[2][0] == sizes[0][1]:
            yield None
        return
    if sizes[0][1] == sizes[1][0]:
        yield None
    if sizes[0][1] == 2 * sizes[1][0]:
        yield from SPLITS


def activations(gated: bool, literals: Mapping[float, str]) -> Iterator[str]:
    """Activation names to try; limits and slopes are numbers that the block itself uses."""
    if not gated:
        yield from (f"!{fn}" for fn in FUNCTIONS)
        return
    yield from FUNCTIONS
    limits = [v for v in literals if 1 < v < 1000]
    for limit in limits:
        yield from (str(Activation(fn, limit=limit)) for fn in FUNCTIONS)
        yield from (str(Activation("swigluoai", limit=limit, alpha=alpha)) for alpha in limits)


def ratio(delta: Tensor, unit: Tensor) -> tuple[Tensor, float]:
    """delta = w * unit row by row? [n, H] twice -> w [n] and the largest relative residual."""
    w = (delta * unit).sum(1) / (unit * unit).sum(1).clamp_min(1e-300)
    rest = (delta - w[:, None] * unit).norm(dim=1) / delta.norm(dim=1).clamp_min(1e-300)
    return w, float(rest.max()) if len(rest) else 0.0


def apply_expert(x: Tensor, weights: Sequence[Tensor | None], act: str) -> Tensor:
    """One expert on rows [n, H]; weights as Stacks, with E = 1."""
    w_in, w_out, b_in, b_out = (None if w is None else w[0] for w in weights)
    assert w_in is not None and w_out is not None
    return F.linear(Activation.parse(act)(F.linear(x, w_in, b_in)), w_out, b_out)


def tensors_of(stacks: Stacks, read: Mapping[str, Tensor]) -> list[Tensor | None]:
    """w_in, w_out, b_in and b_out made; None for an absent bias. read: source name -> tensor."""
    made = (stacks.w_in, stacks.w_out, stacks.b_in, stacks.b_out)
    with torch.no_grad():
        return [None if w is None else w.materialise(lambda n: read[n].detach()) for w in made]


def fitting(
    inputs: Tensor,
    delta: Tensor,
    candidates: Iterable[tuple[Layout, list[Tensor | None]]],
    literals: Mapping[float, str],
    tolerance: float,
) -> list[tuple[Layout, str]]:
    """Layouts and activations with delta = w * expert(inputs) row by row."""
    found = []
    for layout, weights in candidates:
        for act in activations(layout.gated, literals):
            if ratio(delta, apply_expert(inputs, weights, act))[1] < tolerance:
                found.append((layout, act))
    return found

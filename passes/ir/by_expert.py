"""What the ops over stacks of expert weights mean, one expert at a time.

Each class is one op under way. It is made from the op's arguments, of the stacks looking at shapes alone; `add` takes
the matrices of one expert, for every expert of `used` in order; `result` is the op's. So whoever has the stacks may
run it whole (`run`), and whoever makes matrices as they are needed has one expert of a layer in memory
(passes/infra/stream.py). Letters as in passes/ir/ops.py.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from moec.passes.ir.activation import Activation


class Stack(Protocol):
    """Matrices [E, N, K] that can be had one by one: a tensor, or something that makes them."""

    @property
    def shape(self) -> Sequence[int]:
        """[E, N, K]."""

    def __getitem__(self, expert: int, /) -> Tensor: ...


class ByExpert(abc.ABC):
    """An op under way. places: which of its arguments are stacks. used: the experts to add, rising."""

    places: ClassVar[tuple[int, ...]]
    stacks: tuple[Stack, ...]
    used: list[int]

    @abc.abstractmethod
    def add(self, expert: int, *matrices: Tensor) -> None:
        """Does the work of one expert. matrices: [N, K] of each stack."""

    @abc.abstractmethod
    def result(self) -> Tensor:
        """What the op gives, once every expert has been added."""


def run(call: ByExpert) -> Tensor:
    """The op's result, from its own stacks."""
    for expert in call.used:
        call.add(expert, *(stack[expert] for stack in call.stacks))
    return call.result()


class Experts(ByExpert):
    """moec::experts. Its stacks: w_gate_up and w_down in the layout that `transposed` and `interleaved` say."""

    places = (3, 4)

    def __init__(
        self,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        w_gate_up: Stack,
        w_down: Stack,
        b_gate_up: Tensor | None,
        b_down: Tensor | None,
        shared_weight: Tensor | None,
        act: str,
        num_shared: int = 0,
        weight_on_input: bool = False,
        transposed: bool = False,
        interleaved: bool = False,
    ) -> None:
        self.stacks = (w_gate_up, w_down)
        self._x, self._weights, self._experts, self._shared_weight = x, weights, experts, shared_weight
        self._biases = (b_gate_up, b_down)
        self._activation, self._weight_on_input = Activation.parse(act), weight_on_input
        self._transposed, self._interleaved = transposed, interleaved
        self._num_routed = w_gate_up.shape[0] - num_shared
        routed = [e for e in experts.unique().tolist() if e < self._num_routed]
        self.used = routed + list(range(self._num_routed, w_gate_up.shape[0]))
        self._y = torch.zeros(x.shape, dtype=_wide(x), device=x.device)

    def add(self, expert: int, *matrices: Tensor) -> None:
        w_in, w_out = matrices
        factor: Tensor | None
        if expert < self._num_routed:
            rows, k = (self._experts == expert).nonzero(as_tuple=True)
            factor = self._weights[rows, k]
        else:
            rows, factor = torch.arange(self._x.shape[0], device=self._x.device), self._shared_weight
        b_in, b_out = (None if b is None else b[expert] for b in self._biases)
        if self._transposed:
            w_in, w_out = w_in.t(), w_out.t()
        if self._interleaved:
            w_in, b_in = _halves(w_in), None if b_in is None else _halves(b_in)
        h = self._x[rows]
        if self._weight_on_input and factor is not None:
            h = (h * factor[:, None]).to(self._x.dtype)
        h = F.linear(self._activation(F.linear(h, w_in, b_in)), w_out, b_out).to(self._y.dtype)
        if factor is not None and not self._weight_on_input:
            h = h * factor[:, None].to(self._y.dtype)
        self._y.index_add_(0, rows, h)

    def result(self) -> Tensor:
        return self._y.to(self._x.dtype)


class GroupedGemm(ByExpert):
    """moec::grouped_gemm. Its stack: w."""

    places = (1,)

    def __init__(
        self,
        x: Tensor,
        w: Stack,
        bias: Tensor | None,
        slot_order: Tensor,
        expert_start: Tensor,
        slot_weight: Tensor | None,
        slots_per_token: int,
        act: str,
    ) -> None:
        self.stacks, self._bias, self._activation = (w,), bias, Activation.parse(act)
        self._x = x[slot_order.long() // slots_per_token]  # [S, H]
        if slot_weight is not None:
            self._x = (self._x * slot_weight[slot_order.long(), None]).to(x.dtype)
        self._segments = _segments(expert_start)
        self.used = list(self._segments)
        self._out = x.new_zeros(len(self._x), w.shape[1] // 2 if self._activation.gated else w.shape[1])

    def add(self, expert: int, *matrices: Tensor) -> None:
        (w,) = matrices
        rows, bias = self._segments[expert], None if self._bias is None else self._bias[expert]
        self._out[rows] = self._activation(F.linear(self._x[rows], w, bias))

    def result(self) -> Tensor:
        return self._out


class CombineGemm(ByExpert):
    """moec::combine_gemm. Its stack: w."""

    places = (1,)

    def __init__(
        self,
        h: Tensor,
        w: Stack,
        bias: Tensor | None,
        slot_order: Tensor,
        expert_start: Tensor,
        slot_weight: Tensor | None,
        slots_per_token: int,
    ) -> None:
        self.stacks, self._bias, self._h, self._slot_weight = (w,), bias, h, slot_weight
        self._slots, self._slots_per_token = slot_order.long(), slots_per_token
        self._segments = _segments(expert_start)
        self.used = list(self._segments)
        self._y = torch.zeros(h.shape[0] // slots_per_token, w.shape[1], dtype=_wide(h), device=h.device)

    def add(self, expert: int, *matrices: Tensor) -> None:
        (w,) = matrices
        rows, bias = self._segments[expert], None if self._bias is None else self._bias[expert]
        y, slots = F.linear(self._h[rows], w, bias).to(self._y.dtype), self._slots[rows]
        if self._slot_weight is not None:
            y = y * self._slot_weight[slots, None].to(self._y.dtype)
        self._y.index_add_(0, slots // self._slots_per_token, y)

    def result(self) -> Tensor:
        return self._y.to(self._h.dtype)


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _halves(w: Tensor) -> Tensor:
    """[2F, ..] with gate and up rows in turn -> gate rows first."""
    return torch.cat([w[::2], w[1::2]])


def _segments(expert_start: Tensor) -> dict[int, slice]:
    """The rows of each expert that has some."""
    bounds = itertools.pairwise(expert_start.tolist())
    return {e: slice(start, end) for e, (start, end) in enumerate(bounds) if end > start}

"""Collective steps: what a rank's program says to other ranks. docs/engine.md lists them.

A builder takes a group, where the step stands (for errors), and the step's constants, and gives its function. Sums are
left folds over the ranks in order, in the value's own dtype: every rank gets the same bits, and the same as one process
that adds the ranks' parts. For this every part goes to every rank: R - 1 times the operand arrives at each rank, a ring
would send 2 (R - 1) / R of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moec.runtime.errors import FormatError
from moec.runtime.program import Step
from moec.runtime.ranks.groups import Group, Pending, as_bytes, from_bytes

Function = Callable[..., Any]


def all_reduce(group: Group, where: str, reduce: str) -> Function:
    """-> f(x) -> the sum over the group, under way."""
    if reduce != "sum":
        raise FormatError(f"program.json: {where} reduces by {reduce!r}; this runtime knows sum")

    def start(x: Tensor) -> Pending:
        work, raw, own = _gather(group, x)

        def finish() -> Tensor:
            first, *others = from_bytes(raw, x, (len(group.ranks), *x.shape)).unbind(0)
            total = first.clone()
            for part in others:
                total += part
            return total

        return Pending(group, work, where, finish, (own, raw))

    return start


def all_gather_into_tensor(group: Group, where: str) -> Function:
    """-> f(x [T, ..]) -> [R*T, ..], under way."""

    def start(x: Tensor) -> Pending:
        work, raw, own = _gather(group, x)
        shape = (len(group.ranks) * x.shape[0], *x.shape[1:])
        return Pending(group, work, where, lambda: from_bytes(raw, x, shape), (own,))

    return start


def _gather(group: Group, x: Tensor) -> tuple[Any, Tensor, Tensor]:
    """-> the work (None where there is nothing to move), uint8[R * n] that it fills, and what it reads."""
    own = as_bytes(x)
    raw = own.new_empty(len(group.ranks) * own.numel())
    return (group.all_gather(raw, own) if own.numel() else None), raw, own


def all_to_all_single(group: Group, where: str) -> Function:
    """-> f(x [S, ..], sent i64[R] or None, received i64[R] or None) -> [S', ..], under way."""
    ones = [1] * len(group.ranks)

    def start(x: Tensor, sent: Tensor | None, received: Tensor | None) -> Pending:
        to, come = (ones if n is None else n.tolist() for n in (sent, received))
        row_bytes = math.prod(x.shape[1:]) * x.element_size()
        own = as_bytes(x).view(x.shape[0], row_bytes)
        raw = own.new_empty(sum(come), row_bytes)
        work = group.all_to_all(raw, own, come, to)
        return Pending(group, work, where, lambda: from_bytes(raw.view(-1), x, (sum(come), *x.shape[1:])), (own,))

    return start


def isend(group: Group, where: str, to: int) -> Function:
    """-> f(x) -> an empty tensor, under way. The group is two ranks."""
    _check_pair(group, where, to)

    def start(x: Tensor) -> Pending:
        own = as_bytes(x)
        work = group.broadcast(own, group.index) if own.numel() else None
        return Pending(group, work, where, lambda: x.new_empty(0), (own,))

    return start


def irecv(group: Group, where: str, source: int) -> Function:
    """-> f(buffer) -> what was sent, of the buffer's shape and dtype, under way."""
    _check_pair(group, where, source)

    def start(buffer: Tensor) -> Pending:
        raw = torch.empty(buffer.numel() * buffer.element_size(), dtype=torch.uint8, device=buffer.device)
        work = group.broadcast(raw, source) if raw.numel() else None
        return Pending(group, work, where, lambda: from_bytes(raw, buffer, buffer.shape))

    return start


def _check_pair(group: Group, where: str, other: int) -> None:
    if len(group.ranks) != 2 or other != 1 - group.index:
        raise FormatError(f"program.json: {where} is between {group.ranks}; expected this rank and another")


def wait_tensor(pending: Pending, operand: Tensor) -> Tensor:
    """The value of what was started. operand: lives until here."""
    return pending.wait()


COLLECTIVES: dict[str, Callable[..., Function]] = {
    "all_reduce": all_reduce,
    "all_gather_into_tensor": all_gather_into_tensor,
    "all_to_all_single": all_to_all_single,
    "isend": isend,
    "irecv": irecv,
}


def collective_function(step: Step, groups: Mapping[str, Group]) -> Function:
    """The function of a collective step. Raises: FormatError: the step names no group or collective that there is."""
    if step.name == "wait_tensor":
        return wait_tensor
    constants = dict(step.kwargs)
    name, layer = constants.pop("group", None), constants.pop("layer", None)
    if step.name not in COLLECTIVES or name not in groups:
        raise FormatError(
            f"step {step.node} is the collective {step.name!r} of group {name!r}; this rank has {sorted(groups)}"
        )
    where = f"{'' if layer is None else f'layer {layer}, '}{step.name} of {name} (node {step.node})"
    try:
        return COLLECTIVES[step.name](groups[name], where, **constants)
    except TypeError as error:
        raise FormatError(f"step {step.node}: constants {step.kwargs} do not fit {step.name}: {error}") from error

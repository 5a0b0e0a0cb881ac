"""Layers with a state of fixed size for each sequence: moec::shift_window and moec::recurrence by torch calls.

A decode step (one row for each sequence) is one call for all rows. Otherwise the sequences go on side by side: first
the first new token of each, then the second of those that have one, and so on.
"""

from __future__ import annotations

import keyword
import operator as python_operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moec.runtime.batch import Batch
from moec.runtime.constants import decode_constant, torch_dtype
from moec.runtime.errors import FormatError
from moec.runtime.launch.aten import operator

Function = Callable[..., Any]
Tensors = list[Tensor]


def shift_window() -> Function:
    """-> f(batch, x [T,C,1], state [N,C,K], slots) -> [T,C,K+1]: each token behind the K before it; state moves on."""

    def apply(batch: Batch, x: Tensor, state: Tensor, slots: Tensor) -> Tensor:
        if batch.is_decode:
            window = torch.cat([state.index_select(0, slots), x.to(state.dtype)], -1)
            state.index_copy_(0, slots, window[..., 1:])
            return window
        windows, width = [], state.shape[2]
        for run in batch.runs:
            new = x[run.start : run.stop, :, 0].t().to(state.dtype)  # [C, S]
            columns = torch.cat([state[run.slot], new], -1)  # [C, K + S]
            state[run.slot] = columns[:, -width:]
            windows.append(columns.unfold(-1, width + 1, 1).transpose(0, 1))  # [S, C, K + 1]
        return torch.cat(windows)

    return apply


def recurrence(body: dict[str, Any]) -> Function:
    """-> f(batch, inputs, constants, states, slots) -> outputs, lists of tensors; see passes/ir/body.py for the body.

    Raises: FormatError: the body cannot be read, or names an operator that this runtime does not have.
    """
    try:
        step = compiled_body(body)
        types = [(torch_dtype(dtype), tuple(map(int, shape))) for dtype, shape in body["types"]]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise FormatError(f"program.json: the body of a recurrence cannot be read ({error!r})") from error
    count = len(types)

    def decode(inputs: Tensors, constants: Tensors, states: Tensors, slots: Tensor) -> Tensors:
        values = step(slots.shape[0], *inputs, *constants, *[s.index_select(0, slots) for s in states])
        _store(states, slots, values[count:])
        return values[:count]

    def apply(batch: Batch, inputs: Tensors, constants: Tensors, states: Tensors, slots: Tensor) -> Tensors:
        if batch.is_decode:
            return decode(inputs, constants, states, slots)
        runs = sorted(batch.runs, key=lambda run: run.start - run.stop)  # the longest first
        lengths = [run.stop - run.start for run in runs]
        first, homes = (torch.tensor(column) for column in zip(*((r.start, r.slot) for r in runs), strict=True))
        outputs = [torch.empty((batch.num_rows, *shape), dtype=dtype) for dtype, shape in types]
        now, active = [s.index_select(0, homes) for s in states], len(runs)
        for t in range(lengths[0]):
            going = next(i for i in range(active, 0, -1) if lengths[i - 1] > t)
            if going < active:
                _store(states, homes[going:active], [s[going:] for s in now])
                now, active = [s[:going] for s in now], going
            rows = first[:active] + t
            values = step(active, *[x.index_select(0, rows) for x in inputs], *constants, *now)
            for whole, value in zip(outputs, values, strict=False):
                whole.index_copy_(0, rows, value)
            now = values[count:]
        _store(states, homes[:active], now)
        return outputs

    return apply


def _store(states: Tensors, slots: Tensor, values: Tensors) -> None:
    """Puts the values of some slots into the states."""
    for state, value in zip(states, values, strict=True):
        state.index_copy_(0, slots, value.to(state.dtype))


def compiled_body(body: dict[str, Any]) -> Callable[..., Tensors]:
    """The body as one Python function of the number of rows and the values given.

    As in executor.py the source holds only names made here and whole numbers.
    """
    names: dict[str, Any] = {"__builtins__": {}}
    given = int(body["inputs"]) + int(body["constants"]) + int(body["states"])

    def bind(prefix: str, value: Any) -> str:
        names[name := f"{prefix}{len(names)}"] = value
        return name

    def argument(a: Any) -> str:
        if a is None or isinstance(a, bool | int):
            return f"({a!r})"
        if isinstance(a, dict) and "value" in a:
            return f"v{int(a['value'])}"
        if isinstance(a, dict) and "rows" in a:
            return f"{int(a['rows'])} * rows"
        if isinstance(a, list):
            return f"[{', '.join(map(argument, a))}]"
        return bind("k", decode_constant(a))

    lines = [f"def step({', '.join(['rows', *(f'v{i}' for i in range(given))])}):"]
    for number, (name, args, kwargs) in enumerate(body["steps"], given):
        function = python_operator.getitem if name == "getitem" else operator(name, bool(kwargs))
        if not all(key.isidentifier() and not keyword.iskeyword(key) for key in kwargs):
            raise FormatError(f"program.json: {list(kwargs)} are no argument names")
        passed = [*map(argument, args), *(f"{key}={argument(a)}" for key, a in kwargs.items())]
        lines.append(f"    v{number} = {bind('f', function)}({', '.join(passed)})")
    given_back = [f"v{int(i)}" for i in [*body["outputs"], *body["new_states"]]]
    exec("\n".join([*lines, f"    return [{', '.join(given_back)}]"]), names)
    return names["step"]

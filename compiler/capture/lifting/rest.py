"""What a block does beside its experts: the shared part of its output, its further outputs, and masks."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from moec.compiler.capture.lifting.calls import Key, leaves, main_index
from moec.compiler.capture.lifting.partition import Contributions
from moec.compiler.capture.lifting.program import NotGeneral, Program
from moec.compiler.capture.lifting.refused import Refused
from moec.compiler.capture.lifting.study import TOLERANCE, Form, Found, Match, MatchFor, Study, close
from moec.compiler.capture.lifting.trace import IdealArithmetic

MaskRule = Literal["unused", "zero", "shared", "input"]


def find_shared(study: Study, contributions: Contributions) -> Found | Tensor | None:
    """The output without experts: a program, a constant [H] that is no tensor of the block, or None for zero.

    Raises: Refused("shared").
    """
    base = contributions.base
    scale = base.abs().max()
    if scale <= 1e-12 * study.y.abs().max():
        return None
    if (base - base[:1]).abs().max() <= 1e-12 * scale:
        return _held(study, base[0]) or base[0].clone()

    def matcher(factor: float) -> MatchFor:
        def match_for(low: int, high: int) -> Match:
            want = base[low:high]

            def match(v: Tensor) -> Form | None:
                if not v.is_floating_point() or v.numel() != want.numel():
                    return None
                if not (factor * v.reshape(want.shape) - want).abs().max() <= TOLERANCE * scale:
                    return None
                return Form(study.hidden, factor=factor)

            return match

        return match_for

    why = ""
    for any_source, factor in [(False, 1.0), (True, 1.0), *((False, f) for f in _factors(study, base))]:
        try:
            return study.general(matcher(factor), "shared part", any_source, formed=matcher(1.0))
        except NotGeneral as error:
            why = why or str(error)
    raise Refused("shared", why)


def _factors(study: Study, base: Tensor) -> list[float]:
    """Constants by which values of the trace differ from the shared part."""
    found: list[float] = []
    for value in study.values(study.span(0, len(study.probe)), base.numel()):
        flat = value.reshape(base.shape)
        factor = float((flat * base).sum() / (flat * flat).sum().clamp_min(1e-300))
        factor = round(factor, 12)
        if factor not in (0.0, 1.0) and close(factor * flat, base, base.abs().max()):
            found.append(factor)
    return found


def _held(study: Study, vector: Tensor) -> Found | None:
    """The block's own tensor that is this vector (an output bias), as a program without steps."""
    for name, tensor in study.leaves.items():
        if tensor.numel() == len(vector) and close(tensor.reshape(-1), vector, vector.abs().max()):
            program = Program([name], [tensor], [], 0, False)
            return Found(program, Form(len(vector), each=True), False)
    return None


@dataclasses.dataclass(frozen=True)
class Output:
    """One part of what the block returns.

    kind: "main", "value" (found gives it; tail behind the leading axes of the rows, its own shape where that is None)
    or "constant".
    """

    kind: Literal["main", "value", "constant"]
    found: Found | None = None
    tail: tuple[int, ...] | None = None
    constant: Any = None


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The block's output: a sample of its container, its parts in order. flat: the main part is [T, H] always."""

    sample: Any
    parts: tuple[Output, ...]
    flat: bool


def find_outputs(study: Study) -> Outputs:
    """Raises: Refused("outputs"): a part of the output is neither a value per token nor a constant."""
    sample = study.span(0, 5).output
    main = main_index(sample, 5, study.hidden)
    others = leaves(study.span(5, 10).output)
    whole = leaves(study.span(0, len(study.probe)).output)
    parts = []
    for i, value in enumerate(leaves(sample)):
        if i == main:
            parts.append(Output("main"))
        elif isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            parts.append(_value(study, i, value, whole[i]))
        elif not isinstance(value, Tensor) and repr(value) == repr(others[i]) == repr(whole[i]):
            parts.append(Output("constant", constant=value))
        else:
            raise Refused("outputs", f"output {i} is neither a float value per token nor a constant")
    lead = study.call.shape_of(5)
    return Outputs(sample, tuple(parts), leaves(sample)[main].dim() == 2 and len(lead) > 1)


def _value(study: Study, index: int, value: Tensor, whole: Tensor) -> Output:
    def match_for(low: int, high: int) -> Match:
        rows = high - low

        def match(v: Tensor) -> Form | None:
            want = whole if rows == len(study.probe) else leaves(study.span(low, high).output)[index]
            fits = v.is_floating_point() and v.shape == want.shape
            if not fits or not torch.allclose(v, want, rtol=1e-11, atol=1e-13):
                return None
            return Form(None)

        return match

    lead = study.call.shape_of(5)
    try:
        found = study.general(match_for, f"output {index}", any_source=False)
    except NotGeneral as error:
        raise Refused("outputs", f"output {index}: {error}") from error
    with_lead = len(lead) > 1 and tuple(value.shape[: len(lead)]) == lead
    if found.rowwise:
        raise Refused("outputs", f"output {index} is made row by row")
    return Output("value", found, tuple(value.shape[len(lead) :]) if with_lead else None)


def find_masks(study: Study, shared: Tensor | None, rows: Tensor) -> dict[Key, MaskRule]:
    """What the arguments per token do to rows where they are 0. shared: the shared part of `rows`, None for zero.

    Raises: Refused("mask"): a masked row changes others, or follows no known rule.
    """
    extras = study.call.extras
    if not extras:
        return {}
    if len(extras) > 1 or not all(e.is_mask for e in extras.values()):
        return _unused(study, rows)
    (key,) = extras
    keep = torch.rand(len(rows), generator=study.generator) > 0.4
    full, masked = study.run(rows), study.run(rows, mask=keep)
    scale = full.abs().max()
    if ((full - masked)[keep].abs() > TOLERANCE * scale).any():
        raise Refused("mask", "a masked row changes the other rows")
    off = ~keep
    candidates: dict[MaskRule, Tensor] = {
        "unused": full,
        "zero": torch.zeros_like(full),
        "shared": torch.zeros_like(full) if shared is None else shared,
        "input": rows,
    }
    for rule, value in candidates.items():
        if (masked[off] - value[off]).abs().max() <= TOLERANCE * scale:
            return {key: rule}
    raise Refused("mask", "masked rows follow no known rule")


def _unused(study: Study, rows: Tensor) -> dict[Key, MaskRule]:
    """Arguments with other values than 0 and 1 must not change anything."""
    bound = study.call.bind(rows)
    for key, extra in study.call.extras.items():
        sample = study.call.items[key].reshape(-1)
        index = torch.randint(0, sample.numel(), bound[key].shape, generator=study.generator)
        other = sample[index] if not extra.is_mask else index % 2 == 0
        bound[key] = other.to(bound[key].dtype)
    args, kwargs = study.call.split(bound)
    with IdealArithmetic():
        out = study.wide(*args, **kwargs)
    y = leaves(out)[main_index(out, len(rows), study.hidden)].reshape(rows.shape)
    if not torch.equal(y, study.run(rows)):
        raise Refused("mask", f"arguments {list(study.call.extras)} change the result; masks of 0 and 1 are lifted")
    return dict.fromkeys(study.call.extras, "unused")

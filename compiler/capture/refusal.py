"""Turns whatever a trace raised into one line."""

from __future__ import annotations

from torch import nn

from moec.compiler.errors import UnsupportedModel


def refusal(model: nn.Module, error: BaseException) -> UnsupportedModel:
    """The refusal inside an error (libraries wrap ours), else one that tells the error's most telling line."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, UnsupportedModel):
            return inner
        inner = inner.__cause__ or inner.__context__
    text = str(error)
    if "Constraints violated" in text or "specialized" in text:
        return UnsupportedModel(
            f"{type(model).__name__} cannot be traced: its code treats some size of a token dimension specially, "
            "so one graph cannot serve every size"
        )
    if "data-dependent" in text:
        return UnsupportedModel(
            f"{type(model).__name__} cannot be traced: its code depends on the values of tensors (a loop over experts, "
            ".item() or .tolist()); only code whose operations are the same for all values can be"
        )
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return UnsupportedModel(f"{type(model).__name__} cannot be traced: {type(error).__name__}: {first[:300]}")

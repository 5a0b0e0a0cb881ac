"""Turns whatever a trace raised into one line."""

from __future__ import annotations

import traceback

from torch import nn

from moec.compiler.errors import UnsupportedModel

# what torch says where code asks for values: in a trace, and twice on the meta device
_VALUES_NEEDED = ("data-dependent", "data-independent", "Cannot copy out of meta tensor")


class NeedsValues(UnsupportedModel):
    """The model's code depends on the values of tensors; lifting its blocks may help."""


def refusal(model: nn.Module, error: BaseException) -> UnsupportedModel:
    """The refusal inside an error (libraries wrap ours), else one that tells the error's most telling line."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, UnsupportedModel):
            return _with_culprit(inner)
        inner = inner.__cause__ or inner.__context__
    text = str(error)
    if "Constraints violated" in text or "specialized" in text:
        return UnsupportedModel(
            f"{type(model).__name__} cannot be traced: its code treats some size of a token dimension specially, "
            "so one graph cannot serve every size"
        )
    if any(said in text for said in _VALUES_NEEDED):
        return NeedsValues(
            f"{type(model).__name__} cannot be traced: its code depends on the values of tensors (a loop over experts, "
            ".item() or .tolist()); only code whose operations are the same for all values can be"
        )
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return UnsupportedModel(f"{type(model).__name__} cannot be traced: {type(error).__name__}: {first[:300]}")


def _with_culprit(error: UnsupportedModel) -> UnsupportedModel:
    """The same refusal with the class of the module that was running, where it says "the model" only."""
    text = str(error)
    if not text.startswith("the model "):
        return error
    running = [f.f_locals.get("self") for f, _ in traceback.walk_tb(error.__traceback__)]
    modules = [m for m in running if isinstance(m, nn.Module)]
    return UnsupportedModel(type(modules[-1]).__name__ + text.removeprefix("the model")) if modules else error

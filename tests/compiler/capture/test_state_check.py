"""The check of state modules finds one that means something else token by token."""

import pytest
import torch
from family_table import family_config
from zoo import build

from moec.compiler.capture import capture
from moec.compiler.capture import state_check as check
from moec.compiler.capture.language_model import _dry_run
from moec.compiler.capture.seams import seams
from moec.compiler.errors import UnsupportedModel

pytestmark = pytest.mark.null


def dry_run(model):
    with torch.no_grad(), seams(model):
        return _dry_run(model, torch.device("cpu"))[0]


def test_a_state_that_does_not_begin_with_zeros_is_refused():
    """With a bias, ZAYA's delayed values begin with that bias: a sequence of zeros is not an empty one."""
    with pytest.raises(UnsupportedModel, match="ZayaCCAProjection: a sequence token by token, from a state of zeros"):
        capture(build(family_config("zaya", attention_bias=True)))


def test_half_precision_is_compared_in_float32(monkeypatch):
    """The check is of what the code means, not of its rounding."""
    monkeypatch.setattr(check, "TOLERANCE", 1e-5)
    model = build(family_config("lfm2_moe"), dtype=torch.bfloat16)
    found = dry_run(model)
    assert {kept.dtype or torch.bfloat16 for c in found.values() for _, kept in c.kept} == {torch.bfloat16}


def test_modules_that_are_alike_are_checked_once(monkeypatch):
    checked = []
    monkeypatch.setattr(check, "_check", lambda module, *_: checked.append(type(module).__name__))
    dry_run(build(family_config("lfm2_moe")))
    dry_run(build(family_config("minimax")))
    assert checked == ["Lfm2MoeShortConv"]

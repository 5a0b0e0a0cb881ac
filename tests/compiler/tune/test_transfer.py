"""Predictions for token counts, skews and devices that were not measured, and what they say they may lose."""

import dataclasses
import math

import pytest

from moec.compiler.tune.record import Key, Record
from moec.compiler.tune.space import Branch, Space
from moec.compiler.tune.transfer import UNPROVEN_LOSS, predict

KEY = Key("0" * 64, "experts", "E=8", 16, "bfloat16", "zipf-0.4", "cpu:amx_bf16:A-1:x2", "tvm-0")
VALUES = {"width": (1, 2, 4, 8, 16, 32), "even": (False, True)}
SPACE = Space((Branch({"kernel": "k", "width": 4, "even": False}, VALUES),))
COUNTS = (1, 4, 64, 512)


def _record(tokens, ratio, width, even=False, winner=False, **changes):
    """One measurement with a bound of one percent."""
    config = {"kernel": "k", "width": width, "even": even}
    key = dataclasses.replace(KEY, tokens=tokens, **changes)
    default = config == SPACE.default
    low, high = ratio * 0.99, ratio * 1.01
    return Record(key, config, "ok", "", 100.0 * ratio, ratio, low, high, 9, is_default=default, is_winner=winner)


def _measured(best_width, gain, counts=COUNTS, **changes):
    """Every width at every count; the nearer to best_width(tokens) in octaves, the faster."""
    found = []
    for tokens in counts:
        best = best_width(tokens)
        for width in VALUES["width"]:
            ratio = 1 - gain + 0.05 * abs(math.log2(width / best)) if width != 4 else 1.0
            found.append(_record(tokens, ratio, width, winner=width == best, **changes))
    return found


def test_a_winner_everywhere_is_taken_between():
    found = predict(KEY, SPACE, _measured(lambda tokens: 16, gain=0.2))
    assert found.config == {"kernel": "k", "width": 16, "even": False}
    assert found.ratio == pytest.approx(0.8, abs=0.06) and found.loss < 0.03
    assert "T=1,4,64,512, zipf-0.4 routing" in found.source


def test_what_wins_at_few_tokens_is_not_taken_to_many():
    """Narrow wins up to 4 tokens, wide from 64: at 2048 it is wide, at 2 narrow."""
    records = _measured(lambda tokens: 1 if tokens <= 4 else 32, gain=0.2)
    wide = predict(dataclasses.replace(KEY, tokens=2048), SPACE, records)
    narrow = predict(dataclasses.replace(KEY, tokens=2), SPACE, records)
    assert wide.config["width"] >= 16 and narrow.config["width"] <= 2


def test_a_gain_below_the_expected_loss_yields_to_the_default():
    records = [_record(64, 0.98, 16, winner=True), _record(64, 1.0, 4)]
    found = predict(KEY, SPACE, records)
    assert found.config == SPACE.default and found.loss == UNPROVEN_LOSS
    assert "is not above the expected loss of 5.0%" in found.source


def test_another_skew_and_a_sibling_device_are_used_and_named():
    other = _measured(lambda tokens: 16, 0.2, routing="uniform")
    assert "uniform routing" in predict(KEY, SPACE, other).source
    sibling = _measured(lambda tokens: 16, 0.2, device="cpu:amx_bf16:B-2:x8")
    assert predict(KEY, SPACE, sibling).source.endswith("on cpu:amx_bf16:B-2:x8")
    both = [*sibling, *_measured(lambda tokens: 1, 0.2)]
    assert predict(KEY, SPACE, both).config["width"] <= 2, "what was measured here counts, and it alone"


def test_nothing_of_the_layer_predicts_nothing():
    strangers = [
        *_measured(lambda tokens: 16, 0.2, shape="E=9"),
        *_measured(lambda tokens: 16, 0.2, kernel_sha256="1" * 64),
        *_measured(lambda tokens: 16, 0.2, device="cpu:avx2:A-1:x2"),
    ]
    assert predict(KEY, SPACE, strangers) is None

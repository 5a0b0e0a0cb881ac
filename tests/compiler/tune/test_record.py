"""Records and their canonical text."""

import dataclasses
import json

import pytest
from tuning import a_record

from moec.compiler.tune.errors import ResultsError
from moec.compiler.tune.record import (
    canonical,
    config_hash,
    config_text,
    record_from_json,
    record_to_json,
    shape_sizes,
    shape_text,
)

pytestmark = pytest.mark.null


def test_a_shape_has_one_spelling():
    text = shape_text({"H": 64, "E": 8, "mode": "down", "bias": True})
    assert text == "E=8,H=64,bias=true,mode=down"
    assert shape_sizes(text) == {"E": 8, "H": 64, "bias": "true", "mode": "down"}
    with pytest.raises(ValueError, match="cannot be written"):
        shape_text({"act": "a,b"})


def test_a_configuration_has_one_spelling():
    assert config_text({"b": 1, "a": True}) == '{"a":true,"b":1}' == config_text({"a": True, "b": 1})
    assert config_hash({"b": 1, "a": True}) == config_hash({"a": True, "b": 1}) != config_hash({"a": True, "b": 2})


def test_a_record_goes_through_json_unchanged():
    record = a_record(7, is_default=True, is_winner=True)
    text = canonical(record_to_json(record))
    assert record_from_json(json.loads(text), "here") == record


def test_the_digest_is_of_the_measurement_not_of_who_won():
    record = a_record(1)
    assert record.digest() == dataclasses.replace(record, is_winner=True).digest()
    assert record.digest() != dataclasses.replace(record, median_us=1.5).digest()


def test_only_what_works_and_is_bounded_below_one_is_faster():
    record = a_record(1, ratio=0.8, ratio_low=0.7, ratio_high=0.9)
    assert record.is_faster
    for change in ({"ratio_high": 1.0}, {"ratio_high": None}, {"status": "wrong"}):
        assert not dataclasses.replace(record, **change).is_faster


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("status"), "here: the field 'status' is missing"),
        (lambda d: d.update(speed=1), "here: unknown field 'speed'"),
        (lambda d: d.update(status="fast"), "here: status: expected one of ok, wrong, .*, got 'fast'"),
        (lambda d: d["key"].update(tokens="4"), "here: key.tokens: expected int, got '4'"),
        (lambda d: d["key"].update(tokens=-3), "here: key.tokens: expected a whole number of at least 0"),
        (lambda d: d["key"].update(op=""), "here: key.op: expected str"),
        (lambda d: d.update(key=[]), "here: key: expected an object, got list"),
        (lambda d: d.update(config={"a": 1.5}), "here: config.a: expected a whole number, text"),
        (lambda d: d.update(config={}), "here: config: expected an object of values"),
        (lambda d: d.update(median_us=-1.0), "here: median_us: expected a number above 0"),
        (lambda d: d.update(ratio=float("nan")), "here: ratio: expected a number above 0"),
        (lambda d: d.update(seed=2**70), "here: seed: expected a number"),
        (lambda d: d.update(is_winner=1), "here: is_winner: expected true or false"),
    ],
)
def test_what_is_no_record_is_refused_by_field(change, message):
    data = record_to_json(a_record(0))
    change(data)
    with pytest.raises(ResultsError, match=message):
        record_from_json(data, "here")


def test_what_is_no_object_is_refused():
    with pytest.raises(ResultsError, match="here: expected an object, got list"):
        record_from_json([1], "here")

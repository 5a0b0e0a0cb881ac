"""Engines that keep keys and values as int8."""

import pytest
import torch
from zoo import model_of

import moec
from moec.compiler.errors import CompileError

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [2, 7, 1]]


def logits_of(engine, steps):
    """Prefill of two prompts and single tokens after them, both in one batch."""
    cache = engine.new_cache(2, 32)
    slots = [cache.allocate(), cache.allocate()]
    parts = [engine.step(cache, slots, PROMPTS)]
    parts += [engine.step(cache, slots, [[t], [t + 1]]) for t in steps]
    return torch.stack(parts), cache


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    return moec.compile(model_of("gpt_oss"), kv_cache="int8", output=tmp_path_factory.mktemp("kv") / "engine")


def test_logits_stay_near_those_of_a_plain_cache_and_the_cache_shrinks(codes):
    """gpt_oss: windows and sinks too."""
    plain = moec.compile(model_of("gpt_oss"))
    (expected, wide), (got, narrow) = (logits_of(e, range(8, 16)) for e in (plain, codes))
    error = float((got - expected).norm() / expected.norm())
    # a code is off by at most 1/254 of its row's largest number, and all paths but attention stay exact
    assert 0 < error < 0.01
    head = model_of("gpt_oss").config.head_dim
    assert narrow.num_bytes / wide.num_bytes == pytest.approx((head + 4) / (4 * head))
    assert {str(t.dtype) for t in narrow.tensors} == {"torch.int8", "torch.float32"}


def test_an_engine_is_the_same_from_disk_and_batched(codes):
    tokens = codes.generate(PROMPTS, 12)
    assert moec.load(codes.directory).generate(PROMPTS, 12) == tokens
    assert [codes.generate([p], 12)[0] for p in PROMPTS] == tokens
    assert [c["dtype"] for c in codes.manifest["caches"][:4]] == ["int8", "int8", "float32", "float32"]


def test_what_cannot_be_kept_as_int8_is_refused():
    with pytest.raises(CompileError, match="kv_cache='int4'; known: int8"):
        moec.compile(model_of("gpt_oss"), kv_cache="int4")
    with pytest.raises(CompileError, match="no layer of deepseek_v3 keeps keys and values that way"):
        moec.compile(model_of("deepseek_v3"), kv_cache="int8")

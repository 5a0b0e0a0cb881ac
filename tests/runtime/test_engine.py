from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import moec
from moec.runtime.engine import Engine
from moec.runtime.errors import ContextError, InputError, OutputError

PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [3]]


def reference_logits(model: torch.nn.Module, prompt: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0]


def test_logits_of_a_batch_a_list_and_one(engine: Engine, model: torch.nn.Module) -> None:
    # float32, three layers: sums in another order differ by a few roundings of logits near 1
    expected = reference_logits(model, PROMPTS[0])
    for found in (engine(torch.tensor(PROMPTS[0])), engine(torch.tensor([PROMPTS[0]]))[0], engine(PROMPTS)[0]):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert engine(torch.tensor([PROMPTS[0], PROMPTS[0]])).shape == (2, 5, 128)
    assert torch.allclose(engine(PROMPTS)[1], reference_logits(model, PROMPTS[1]), rtol=1e-4, atol=1e-5)
    assert engine(PROMPTS[2]).shape == (1, 128)


def test_steps_by_hand_equal_one_prefill(engine: Engine) -> None:
    cache = engine.new_cache(2, 8)
    a, b = cache.allocate(), cache.allocate()
    engine.step(cache, [a], [PROMPTS[0][:2]])
    mixed = engine.step(cache, [b, a], [PROMPTS[1], PROMPTS[0][2:]])  # a new sequence beside one that goes on
    whole = engine(PROMPTS)
    assert torch.allclose(mixed[1], whole[0][-1], rtol=1e-4, atol=1e-5)
    assert torch.allclose(mixed[0], whole[1][-1], rtol=1e-4, atol=1e-5)


def test_streams_in_order_and_stops(engine: Engine) -> None:
    tokens = engine.generate(PROMPTS, 6)
    events = list(engine.stream(PROMPTS, 6))
    assert [e.sequence for e in events[:3]] == [0, 1, 2]
    assert [[e.token for e in events if e.sequence == i] for i in range(3)] == tokens
    assert [e.finished for e in events[-3:]] == ["length"] * 3 and not events[0].finished
    stop = tokens[0][2]
    cut = engine.generate(PROMPTS, 6, stop_tokens=[stop])
    assert cut[0] == tokens[0][: tokens[0].index(stop) + 1]
    assert all(c == t[: len(c)] for c, t in zip(cut, tokens, strict=True))


def test_sampling_is_seeded(engine: Engine) -> None:
    def draw(seed: int) -> list[list[int]]:
        return engine.generate(PROMPTS, 8, temperature=1.0, top_k=50, top_p=0.95, seed=seed)

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize("token", [128, -1])
def test_token_outside_of_the_vocabulary(engine: Engine, token: int) -> None:
    for call in (engine, engine.generate, lambda p: engine.step(engine.new_cache(1, 4), [0], p)):
        with pytest.raises(
            InputError, match=rf"prompt 0, place 1: token {token} is outside of the vocabulary 0\.\.127"
        ):
            call([[1, token]])


def test_empty_prompts(engine: Engine) -> None:
    for empty in ([[1], []], torch.zeros(0, dtype=torch.long), torch.zeros(1, 0, dtype=torch.long)):
        with pytest.raises(InputError, match=r"prompt \d is empty; expected at least one token"):
            engine.generate(empty)
    with pytest.raises(InputError, match="no prompt was given"):
        engine.generate(torch.zeros(0, 3, dtype=torch.long))


def test_no_tokens_in_a_step(engine: Engine) -> None:
    cache = engine.new_cache(1, 4)
    with pytest.raises(InputError, match="prompt 0 is empty"):
        engine.step(cache, [cache.allocate()], [[]])
    with pytest.raises(InputError, match="the step has no sequences"):
        engine.step(cache, [], [])


def test_cache_overrun(engine: Engine) -> None:
    cache = engine.new_cache(1, 4)
    slot = cache.allocate()
    engine.step(cache, [slot], [[1, 2, 3]])
    with pytest.raises(ContextError, match="slot 0 has 3 tokens: 2 more overrun the cache of 4"):
        engine.step(cache, [slot], [[4, 5]])


def test_end_of_context(engine: Engine) -> None:
    with pytest.raises(ContextError, match="the end of the model's context of 256"):
        engine.generate([[1] * 250], 20)


def test_other_wrong_calls(engine: Engine) -> None:
    with pytest.raises(InputError, match="expected int64"):
        engine(torch.ones(2, 3))
    with pytest.raises(InputError, match="takes input_ids alone"):
        engine(PROMPTS, PROMPTS)
    with pytest.raises(InputError, match="twice"):
        engine.step(engine.new_cache(2, 4), [0, 0], [[1], [2]])


def test_save_copies_the_engine(engine: Engine, tmp_path: Path) -> None:
    engine.save(tmp_path / "saved")
    assert moec.load(tmp_path / "saved").generate(PROMPTS, 4) == engine.generate(PROMPTS, 4)
    with pytest.raises(OutputError, match="exists and is kept"):
        engine.save(tmp_path / "saved")


def test_full_disk_on_save(engine: Engine, tmp_path: Path) -> None:
    """A real one: a file system of 64 KiB, where the test may mount it."""
    tiny = tmp_path / "tiny"
    tiny.mkdir()
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("mounting needs root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tiny)], capture_output=True).returncode:
        pytest.skip("this system does not let a test mount a tmpfs")
    try:
        with pytest.raises(OutputError, match="No space left on device; nothing was written"):
            engine.save(tiny / "saved")
        assert os.listdir(tiny) == []
    finally:
        subprocess.run(["umount", str(tiny)], check=True)


def test_verify_and_inspect(engine: Engine) -> None:
    report = engine.verify()
    assert report["passed"] and report["files"] >= 5
    facts = engine.inspect()
    assert (facts["experts"], facts["top_k"], facts["moe_layers"]) == (8, 2, [0, 1, 2])
    assert {"ledger", "evidence", "kernels", "target", "weights", "kv_bytes_per_token"} <= facts.keys()


def test_profile_names_nodes(engine: Engine) -> None:
    rows = engine.profile([PROMPTS[0]])
    assert len(rows) > 20 and all(r["us"] >= 0 and r["node"] for r in rows)

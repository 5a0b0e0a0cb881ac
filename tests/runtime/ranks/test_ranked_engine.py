"""Placed engines through moec.load: started here, joined from outside, refused, and closed without a trace."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import moec
from moec.compiler.ranks import RankOptions, compile_ranks
from moec.runtime.errors import InputError, RankError

PROMPTS = [[5, 9, 2, 77], [11], [3, 3, 3]]


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """The folders of one model: for one rank; for 4 with two lanes, two stages and 5 experts in 2 groups; and for 2,
    with kernels, which cost most of the time."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=48, intermediate_size=48, num_hidden_layers=2, num_attention_heads=6, vocab_size=131
    )
    config.num_key_value_heads, config.num_local_experts = 6, 5
    model, folder = MixtralForCausalLM(config).eval(), tmp_path_factory.mktemp("engines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moec.compiler.options._level", lambda target: None)
        moec.compile(model, output=folder / "one", verify="off")
        compile_ranks(model, folder / "four", RankOptions(devices=4, strategy="DP2-EP2xPP2"), verify="off")
    compile_ranks(model, folder / "two", RankOptions(devices=2, strategy="TP2"), verify="off")
    return folder


def test_tokens_are_those_of_one_process(engines):
    one, engine = moec.load(engines / "one"), moec.load(engines / "four")
    processes = engine._world.processes
    assert engine.rank == 0 and len(processes) == 3
    assert engine.generate(PROMPTS, 5) == one.generate(PROMPTS, 5)
    assert engine.generate(PROMPTS[0], 5) == one.generate(PROMPTS[0], 5)  # the other lane has no tokens
    for got, want in zip(engine(PROMPTS), one(PROMPTS), strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()  # f32 sums in another order
    cache = engine.new_cache(3, 8)
    first, second = cache.allocate(), cache.allocate()
    engine.step(cache, [first, second], [[1, 2], [3]])
    got = engine.step(cache, [second, first], [[4], [5, 6]])
    assert got.argmax(-1).tolist() == torch.stack([one([3, 4])[-1], one([1, 2, 5, 6])[-1]]).argmax(-1).tolist()
    with pytest.raises(InputError, match="twice"):
        engine.step(cache, [0, 0], [[1], [2]])
    with pytest.raises(RankError, match="rank 0 gives the work"):
        engine.serve()
    engine.close()
    assert [p.returncode for p in processes] == [0, 0, 0]


def outside(engine, rank, port, **more):
    """One of two ranks that something else starts."""
    place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **more}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in place.items()}}
    command = [sys.executable, "-m", "moec.cli", "run", str(engine), "--tokens", "1,2,3", "--max-new-tokens", "4"]
    return subprocess.Popen([*command, "--json"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


def test_ranks_that_a_scheduler_started(engines):
    port = free_port()
    ranks = [outside(engines / "two", rank, port) for rank in range(2)]
    out = [process.communicate(timeout=120) for process in ranks]
    assert [p.returncode for p in ranks] == [0, 0], out
    assert json.loads(out[0][0])["tokens"] == moec.load(engines / "one").generate([1, 2, 3], 4)[0]
    assert out[1][0] == b""


def test_a_rank_with_another_engine_is_named(engines, tmp_path):
    """Another model's weights under the same plan: all ranks refuse to start."""
    other = tmp_path / "other"
    shutil.copytree(engines / "two", other)
    from moec.runtime.loader import manifest_text

    manifest = json.loads((other / "manifest.json").read_text())
    manifest["model"]["eos_token_ids"] = [3]
    (other / "manifest.json").write_text(manifest_text(manifest))
    port = free_port()
    ranks = [outside(engines / "two", 0, port), outside(other, 1, port)]
    out = [process.communicate(timeout=120) for process in ranks]
    assert [p.returncode for p in ranks] == [1, 1]
    assert all(b"rank 1 has another engine digest than rank 0" in err for _, err in out)


def test_a_killed_rank_is_named(engines):
    engine = moec.load(engines / "two")
    (other,) = engine._world.processes
    stream = engine.stream([[1, 2, 3]], 200)
    next(stream)
    other.kill()
    killed = time.monotonic()
    with pytest.raises(
        RankError,
        match=r"^rank 1 was killed by signal 9; rank 0 was at: .*(layer \d, )?all_(reduce|gather).* of stage-0 \(node",
    ):
        for _ in stream:
            pass
    assert time.monotonic() - killed < 2.0 + 8.0  # two seconds are asked for; the rest is for a busy machine
    with pytest.raises(RankError, match="rank 1 was killed"):
        engine.generate([1], 1)
    engine.close()
    assert other.poll() == -9

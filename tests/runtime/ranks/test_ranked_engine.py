"""Placed engines through moec.load: started here, joined from outside, refused, and closed without a trace."""

from __future__ import annotations

import json
import math
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
from moec.compiler.plan.rebalance import rebalance
from moec.compiler.ranks import RankOptions, compile_ranks
from moec.runtime.errors import InputError, RankError
from moec.runtime.timeline import overlap

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
        for name, capacity in (("copies", None), ("limited", 0.7)):
            options = RankOptions(devices=2, strategy="DP2-EP2+1", capacity=capacity)
            compile_ranks(model, folder / name, options, verify="off")
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


def test_copies_take_other_parts_of_the_tokens_while_serving(engines):
    one, engine = moec.load(engines / "one"), moec.load(engines / "copies")
    expected = one(PROMPTS)

    def check() -> None:
        for got, want in zip(engine(PROMPTS), expected, strict=True):
            assert (got - want).abs().max() <= 1e-5 * want.abs().max()  # f32 sums in another order

    check()
    slots = 2 * sum(map(len, PROMPTS))  # two experts a token
    counters = engine.counters()
    assert [c["layer"] for c in counters["layers"]] == [0, 1] and counters["dropped"] == 0
    assert [sum(c["load"]) for c in counters["layers"]] == [slots, slots]
    copies = engine.manifest["placement"]["copies"]
    assert set(copies) == {"0", "1"} and all(max(map(len, homes)) == 2 for homes in copies.values())
    balanced = rebalance(engine)
    assert set(balanced) == {0, 1} and all(after <= before + 1e-9 for before, after in balanced.values())
    check()
    for layer, homes in copies.items():
        engine.set_token_shares(int(layer), [[1.0] + [0.0] * (len(groups) - 1) for groups in homes])
    check()
    assert engine.counters()["slots"] == 6 * slots
    with pytest.raises(InputError, match="layer 7 has no copied experts; layers that have some: 0, 1"):
        engine.set_token_shares(7, [])
    with pytest.raises(InputError, match="expert 0: parts are"):
        engine.set_token_shares(0, [[0.3] * len(groups) for groups in copies["0"]])
    with pytest.raises(InputError, match="expected a part for each copy of 5 experts"):
        engine.set_token_shares(0, [[1.0]])
    engine.close()


def test_slots_beyond_a_capacity_are_dropped_and_counted(engines, tmp_path):
    """A group that serves all copies alone gets more slots than it may take: more are dropped."""
    engine = moec.load(engines / "limited")
    engine(PROMPTS)
    before = engine.counters()
    assert 0 < before["dropped"] < before["slots"]
    capacity = [math.ceil(0.7 * 2 * n / 2) for n in (7, 1)]  # lanes have the first and last, and the middle prompt
    for layer in before["layers"]:
        assert sum(layer["load"]) - sum(layer["dropped"]) <= 2 * sum(capacity)
    for layer, homes in engine.manifest["placement"]["copies"].items():
        engine.set_token_shares(int(layer), [[1.0] + [0.0] * (len(groups) - 1) for groups in homes])
    with engine.trace(tmp_path / "trace.json"):
        engine(PROMPTS)
    after = engine.counters()
    assert after["slots"] == 2 * before["slots"] and after["dropped"] - before["dropped"] > before["dropped"]
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    named = {(e["pid"], e["args"]["name"]) for e in events if e["name"] == "thread_name"}
    assert named >= {(rank, track) for rank in (0, 1) for track in ("steps", "communication")}
    moved = {e["name"] for e in events if e.get("cat") == "communication" and e["pid"] == 1}
    assert any(n.startswith("layer 1, all_to_all_single of stage-0") for n in moved)
    assert all(0 <= overlap(spans)["overlapped_ms"] <= overlap(spans)["communication_ms"] for spans in engine.spans)
    engine.close()


def test_torchrun(engines):
    """torch.distributed.run starts the ranks, with a port and a store of its own."""
    place = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "--no-python"]
    command = [
        sys.executable,
        *place,
        sys.executable,
        "-m",
        "moec.cli",
        "run",
        str(engines / "two"),
        "--tokens",
        "1,2,3",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--max-new-tokens", "4", "--json"], env=environment, capture_output=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == moec.load(engines / "one").generate([1, 2, 3], 4)[0]


def test_closing_ends_the_threads_of_the_groups(engines):
    """Each group has two of gloo's. One that gives a tensor back while the interpreter ends would abort the process."""
    engine = moec.load(engines / "two")
    engine.generate([1, 2, 3], 2)
    before = len(os.listdir("/proc/self/task"))
    engine.close()
    assert before - len(os.listdir("/proc/self/task")) >= 2 * len(engine._groups) > 0


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

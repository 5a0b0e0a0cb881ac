"""Kills and stops ranks of a placed engine at random moments, and reports how the others took it.

    python benchmarks/fault_injection.py [--kills 30] [--hangs 10] [--markdown docs/reliability.md]

A tiny model runs on 4 processes with two lanes and its experts in 4 groups (DP2TP2-EP4). Phases: load (before the
engine is ready), dispatch and combine (the rank stops by itself where it would start the exchange of tokens before or
after the experts, in a random step and layer), idle (between two requests). Detection is the time from the fault to
each survivor's message. A busy machine makes all of it slower.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.context import ForkProcess as Process
from pathlib import Path
from typing import Any

import tvm_ffi  # noqa: F401  (so that ranks, which are copies of this process, need not import it while they load)

from moec.runtime.engine import load
from moec.runtime.errors import EngineError
from moec.runtime.launch import collectives
from moec.runtime.ranks import engine as rank_engine

RANKS, SILENT_S = 4, 3.0
PHASES = ("load", "dispatch", "combine", "idle")
MARKER = "<!-- written by benchmarks/fault_injection.py -->"


def make_engine(folder: Path) -> None:
    """A Mixtral of 2 layers, 4 heads and 5 experts, spread over 4 ranks."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    from moec.compiler.ranks import RankOptions, compile_ranks

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=48, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=131
    )
    config.num_key_value_heads, config.num_local_experts = 4, 5
    compile_ranks(MixtralForCausalLM(config).eval(), folder, RankOptions(devices=RANKS, strategy="DP2TP2-EP4"))


def rank_main(engine: Path, rank: int, port: int, fault: dict[str, Any], report: Path) -> None:
    """One rank, with a fault of its own if it is the victim; writes what it ended with, and when."""
    place = {"RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    limits = {"MOEC_RANK_SILENT_S": SILENT_S, "MOEC_RANK_JOIN_S": 60, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    os.environ.update({k: str(v) for k, v in (place | limits).items()})
    os.dup2(os.open(report / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT), 2)

    def strike() -> None:
        (report / "struck").write_text(str(time.time()))
        os.kill(os.getpid(), getattr(signal, fault["signal"]))

    if rank == fault["rank"] and fault["phase"] in ("dispatch", "combine"):
        _arm(collectives, fault, strike)
    if rank == fault["rank"] and fault["phase"] == "load":
        _arm_load(fault, strike)
    try:
        loaded = load(engine)
        if rank:
            loaded.serve()
        else:
            (report / "ready").write_text(str(time.time()))
            while fault["phase"] != "idle":
                loaded.generate([[1, 2, 3], [4, 5], [6]], 8)
            while True:
                time.sleep(0.05)
                loaded.new_cache(1, 4)
    except EngineError as error:
        (report / f"rank-{rank}").write_text(json.dumps([time.time(), str(error)]))
        os._exit(1)


def _arm(collectives: Any, fault: dict[str, Any], strike: Any) -> None:
    """Lets the fault strike at the nth exchange of its phase: three all-to-alls lead to the experts, one comes back."""
    plain, calls = collectives.COLLECTIVES["all_to_all_single"], [0]

    def build(group: Any, where: str, **constants: Any) -> Any:
        start, mine = plain(group, where, **constants), build.made % 4  # type: ignore[attr-defined]
        build.made += 1  # type: ignore[attr-defined]

        def faulty(*args: Any) -> Any:
            if (mine == 3) == (fault["phase"] == "combine"):
                calls[0] += 1
                if calls[0] == fault["after"]:
                    strike()
            return start(*args)

        return faulty

    build.made = 0  # type: ignore[attr-defined]
    collectives.COLLECTIVES["all_to_all_single"] = build


def _arm_load(fault: dict[str, Any], strike: Any) -> None:
    """Lets the fault strike up to 0.2 s after the rank began to load its part."""
    plain = rank_engine._load_rank

    def faulty(*args: Any) -> Any:
        threading.Timer(fault["after"] / 200, strike).start()
        return plain(*args)

    rank_engine._load_rank = faulty


def inject(engine: Path, draw: random.Random, phase: str, kind: str) -> dict[str, Any]:
    """One fault -> seconds until every survivor said who was lost, and what was wrong with it, if anything."""
    victim = draw.randrange(RANKS)
    fault = {"rank": victim, "phase": phase, "signal": kind, "after": draw.randint(1, 40)}
    with tempfile.TemporaryDirectory() as name:
        report, port = Path(name), _free_port()
        processes = [_start(engine, rank, port, fault, report) for rank in range(RANKS)]
        struck = _strike(processes, victim, phase, kind, draw, report)
        problems = _wait(processes, victim)
        times, texts = [], []
        for rank in range(RANKS):
            if rank == victim:
                continue
            path = report / f"rank-{rank}"
            text = (report / f"stderr-{rank}").read_text(errors="replace")
            if path.is_file():
                at, said = json.loads(path.read_text())
                times.append(at - struck)
                texts.append(said)
            elif found := re.search(r"error: (rank .*)", text):
                texts.append(found[1])
            else:
                problems.append(f"rank {rank} said nothing: {text[-200:]!r}")
            if processes[rank].exitcode == 0:
                problems.append(f"rank {rank} ended with exit code 0")
        problems += [f"rank {victim} is not named: {t}" for t in texts if not re.search(rf"rank(s \[)? ?{victim}\b", t)]
    return {
        "phase": phase,
        "kind": kind,
        "worst_s": max(times, default=float("nan")),
        "problems": problems,
        "texts": texts,
    }


def _start(engine: Path, rank: int, port: int, fault: dict[str, Any], report: Path) -> Process:
    """A rank as a copy of this process, which has imported everything and started no thread: imports take seconds."""
    process = multiprocessing.get_context("fork").Process(target=rank_main, args=(engine, rank, port, fault, report))
    process.start()
    return process


def _strike(
    processes: Sequence[Process], victim: int, phase: str, kind: str, draw: random.Random, report: Path
) -> float:
    """Waits until the fault has struck, or strikes from outside -> when it was."""
    if phase != "idle":
        _wait_for(report / "struck", processes)
        return float((report / "struck").read_text())
    _wait_for(report / "ready", processes)
    time.sleep(draw.uniform(0.2, 1.0))
    os.kill(processes[victim].pid, getattr(signal, kind))
    return time.time()


def _wait_for(path: Path, processes: Sequence[Process]) -> None:
    """Raises: RuntimeError: the ranks ended before."""
    while not path.is_file() or not path.read_text():
        if not any(p.is_alive() for p in processes):
            raise RuntimeError(f"all ranks ended before {path.name}: {(path.parent / 'stderr-0').read_text()!r}")
        time.sleep(0.01)


def _wait(processes: Sequence[Process], victim: int) -> list[str]:
    """Waits for the survivors to end by themselves, then ends a stopped victim -> what was wrong."""
    problems, deadline = [], time.monotonic() + SILENT_S + 30
    for rank, process in enumerate(processes):
        if rank == victim:
            continue
        process.join(max(0.1, deadline - time.monotonic()))
        if process.is_alive():
            problems.append(f"rank {rank} did not end")
            process.kill()
            process.join()
    processes[victim].kill()
    processes[victim].join()
    return problems


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def shared_memory() -> set[str]:
    folder = Path("/dev/shm")
    return {p.name for p in folder.iterdir()} if folder.is_dir() else set()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of faults by kind and phase."""
    lines = [
        "| fault | phase | trials | all survivors named the rank, exit code not 0 | slowest survivor, s | median, s |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for kind, shown in (("SIGKILL", "killed"), ("SIGSTOP", "hung")):
        for phase in PHASES:
            some = [r for r in rows if r["kind"] == kind and r["phase"] == phase]
            if some:
                times = sorted(r["worst_s"] for r in some)
                good = sum(not r["problems"] for r in some)
                middle = times[len(times) // 2]
                lines.append(f"| {shown} | {phase} | {len(some)} | {good} | {times[-1]:.2f} | {middle:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--kills", type=int, default=30, help="per phase")
    parser.add_argument("--hangs", type=int, default=10, help="per phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, help="file whose part below its marker line is replaced by the table")
    options = parser.parse_args()
    draw, before, rows = random.Random(options.seed), shared_memory(), []
    with tempfile.TemporaryDirectory() as name:
        engine = Path(name) / "engine"
        maker = multiprocessing.get_context("spawn").Process(target=make_engine, args=(engine,))
        maker.start()
        maker.join()
        for kind, count in (("SIGKILL", options.kills), ("SIGSTOP", options.hangs)):
            for phase in PHASES:
                for _ in range(count):
                    rows.append(inject(engine, draw, phase, kind))
                    print(json.dumps(rows[-1]), flush=True)
    text = table(rows) + f"\n\nShared memory left over: {len(shared_memory() - before)} files."
    print(text)
    if options.markdown:
        kept = options.markdown.read_text(encoding="utf-8").split(MARKER)[0]
        options.markdown.write_text(f"{kept}{MARKER}\n\n{text}\n", encoding="utf-8")
    if any(r["problems"] for r in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()

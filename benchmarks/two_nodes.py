"""Runs placed engines on two nodes that are two network namespaces of this machine, with a slower link between them.

    sudo python benchmarks/two_nodes.py [--rate 200mbit] [--delay 0.5ms] [--markdown docs/scale.md]

A veth pair joins the namespaces; `tc` shapes both ends (netem, or tbf where the kernel has no netem). Ranks of one node
talk over its loopback. First, eight ranks, four on each node: their tokens are compared with those of one process. Then
one rank on each node, with experts dealt over both: how long a prefill takes, and how much of the communication runs
beside computation, by the number of chunks in which tokens travel. Needs root, `ip` and `tc`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NODES, DEVICES = ("moec-node0", "moec-node1"), ("moec-link0", "moec-link1")
ADDRESSES = ("198.18.7.1", "198.18.7.2")  # a range for benchmarks, RFC 2544
PORT, ROUNDS, TOKENS, CHUNKS = 29517, 7, 256, (1, 2, 4)
PROMPTS = [[5, 9, 2, 77], [11], [3, 3, 3]]
STRATEGIES = ("TP4xPP2", "EP8", "DP4TP2-EP4TP2")
MARKER = "<!-- written by benchmarks/two_nodes.py -->"


def run(*command: str) -> None:
    """Raises: RuntimeError: the command failed; with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}")


@contextmanager
def two_nodes(rate: str, delay: str) -> Iterator[str]:
    """The namespaces and their link, gone afterwards -> what shapes the link."""
    run("ip", "link", "add", DEVICES[0], "type", "veth", "peer", "name", DEVICES[1])
    try:
        for node, device, address in zip(NODES, DEVICES, ADDRESSES, strict=True):
            run("ip", "netns", "add", node)
            run("ip", "link", "set", device, "netns", node)
            for one in (f"addr add {address}/30 dev {device}", f"link set {device} up", "link set lo up"):
                run("ip", "-n", node, *one.split())
        shaped = {_shape(node, device, rate, delay) for node, device in zip(NODES, DEVICES, strict=True)}
        yield ", ".join(shaped)
    finally:
        for node in NODES:
            subprocess.run(["ip", "netns", "del", node], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", DEVICES[0]], capture_output=True, check=False)


def _shape(node: str, device: str, rate: str, delay: str) -> str:
    shape = ["tc", "-n", node, "qdisc", "add", "dev", device, "root"]
    try:
        run(*shape, "netem", "rate", rate, "delay", delay)
        return f"netem: {rate}, {delay} each way"
    except RuntimeError:
        run(*shape, "tbf", "rate", rate, "burst", "64kb", "latency", "50ms")
        return f"tbf: {rate} (this kernel has no netem, so no added delay)"


def launch(engine: Path, ranks: int, job: str, report: Path) -> Any:
    """Runs an engine with half of its ranks on each node -> what rank 0 reports. Raises: RuntimeError: one failed."""
    processes = []
    for rank in range(ranks):
        node = rank // (ranks // 2)
        place = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": PORT}
        place |= {"LOCAL_WORLD_SIZE": ranks // 2, "GLOO_SOCKET_IFNAME": DEVICES[node], "OMP_NUM_THREADS": 1}
        command = ["ip", "netns", "exec", NODES[node], sys.executable, __file__, "--engine", str(engine), "--job", job]
        environment = {**os.environ, **{k: str(v) for k, v in place.items()}}
        command += ["--report", str(report)]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE))
    said = [process.communicate()[1].decode() for process in processes]
    failed = [
        f"rank {r}: {text[-300:]}" for r, (p, text) in enumerate(zip(processes, said, strict=True)) if p.returncode
    ]
    if failed:
        raise RuntimeError("; ".join(failed))
    return json.loads(report.read_text())


def rank_main(engine: Path, job: str, report: Path) -> None:
    """One rank: rank 0 does the job and writes what came of it."""
    from moec.runtime.engine import load

    loaded = load(engine)
    if loaded.rank:
        loaded.serve()
        os._exit(0)
    report.write_text(json.dumps(loaded.generate(PROMPTS, 6) if job == "generate" else _measure(loaded, report)))
    loaded.close()
    os._exit(0)


def _measure(engine: Any, report: Path) -> dict[str, Any]:
    """Prefills of TOKENS tokens in each lane: the median time, then the share of communication beside computation."""
    from moec.runtime.timeline import overlap

    lanes = [[(7 * i + lane) % 1000 for i in range(TOKENS)] for lane in range(2)]
    times = []
    for _ in range(ROUNDS + 1):
        before = time.perf_counter()
        engine(lanes)
        times.append(time.perf_counter() - before)
    with engine.trace(report.with_suffix(".trace.json")):
        for _ in range(ROUNDS):
            engine(lanes)
    found = [overlap(spans) for spans in engine.spans]
    total = {key: sum(one[key] for one in found) / ROUNDS / len(found) for key in found[0]}
    return {"prefill_ms": 1e3 * statistics.median(times[1:]), **total}


def uneven_engines(folder: Path) -> None:
    """A Mixtral of 12 heads, 10 experts, 4 layers and 131 words for one process and for eight ranks."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    import moec

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=96, intermediate_size=48, num_hidden_layers=4, num_attention_heads=12, vocab_size=131
    )
    config.num_key_value_heads, config.num_local_experts = 12, 10
    model = MixtralForCausalLM(config).eval()
    moec.compile(model, output=folder / "one", verify="off")
    for strategy in STRATEGIES:
        moec.compile_ranks(model, folder / strategy, moec.RankOptions(devices=8, strategy=strategy), verify="off")


def exchange_engines(folder: Path) -> None:
    """A DeepSeekMoE of 4 layers, 16 experts and 2 shared ones, wide enough to compute for as long as it sends."""
    import torch

    import moec
    from moec.compiler.families.deepseek_moe import DeepseekMoeConfig, DeepseekMoeForCausalLM

    torch.manual_seed(0)
    config = DeepseekMoeConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1024, moe_intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=8, n_routed_experts=16, n_shared_experts=2, num_experts_per_tok=4,
        first_k_dense_replace=0,
    )  # fmt: skip
    model = DeepseekMoeForCausalLM(config).eval()
    for chunks in CHUNKS:
        options = moec.RankOptions(devices=2, strategy="DP2-EP2", chunks=chunks)
        moec.compile_ranks(model, folder / f"chunks-{chunks}", options, verify="off")


def table(link: str, rows: Sequence[tuple[int, dict[str, Any]]]) -> str:
    lines = [
        f"Link: {link}. Eight ranks on two nodes ({', '.join(STRATEGIES)}) give the tokens of one process.",
        f"One rank on each node, {TOKENS} tokens in each of two lanes, means of both ranks over {ROUNDS} prefills:",
        "",
        "| chunks | prefill, ms | computing, ms | waiting, ms | communication, ms | of it beside computation, ms |",
        "|---|---|---|---|---|---|",
    ]
    for chunks, row in rows:
        keys = ("prefill_ms", "compute_ms", "wait_ms", "communication_ms", "overlapped_ms")
        lines.append(f"| {chunks} | {' | '.join(f'{row[key]:.0f}' for key in keys)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rate", default="200mbit", help="of the link, as tc writes it")
    parser.add_argument("--delay", default="0.5ms", help="each way")
    parser.add_argument("--markdown", type=Path, help="file whose part below its marker line is replaced by the table")
    parser.add_argument("--traces", type=Path, help="keep the timelines in this folder")
    for name in ("--engine", "--job", "--report"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        rank_main(Path(options.engine), options.job, Path(options.report))
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), []
        uneven_engines(folder)
        exchange_engines(folder)
        with two_nodes(options.rate, options.delay) as link:
            expected = _one_process(folder / "one")
            for strategy in STRATEGIES:
                if launch(folder / strategy, 8, "generate", folder / "report") != expected:
                    raise SystemExit(f"{strategy} on two nodes gives other tokens than one process")
                print(f"{strategy}: the tokens of one process", flush=True)
            for chunks in CHUNKS:
                rows.append((chunks, launch(folder / f"chunks-{chunks}", 2, "measure", folder / "report")))
                if options.traces:
                    (folder / "report.trace.json").rename(options.traces / f"chunks-{chunks}.json")
                print(chunks, rows[-1][1], flush=True)
    text = table(link, rows)
    print(text)
    if options.markdown:
        kept = options.markdown.read_text(encoding="utf-8").split(MARKER)[0]
        options.markdown.write_text(f"{kept}{MARKER}\n\n{text}\n", encoding="utf-8")


def _one_process(engine: Path) -> list[list[int]]:
    from moec.runtime.engine import load

    return load(engine).generate(PROMPTS, 6)


if __name__ == "__main__":
    main()

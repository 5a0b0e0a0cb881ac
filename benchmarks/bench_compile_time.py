"""Seconds from a configuration to a planned graph: `python benchmarks/bench_compile_time.py`.

Captures the full-width model on the meta device and runs the whole pipeline, evidence off: of the weights only those
that a gate is told apart by are made. DeepSeek-V3 at several depths gives the growth with the number of layers;
Mixtral and Qwen3-235B stand beside it. Each model runs in a process of its own. Wall seconds depend on what else the
machine does, CPU seconds of the process hardly, so the growth is told from those.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DEEPSEEK_V3: dict[str, Any] = {"model_type": "deepseek_v3", "vocab_size": 129280, "n_routed_experts": 256}
QWEN3_235B: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 4096, "moe_intermediate_size": 1536,
    "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}  # fmt: skip
MIXTRAL: dict[str, Any] = {"model_type": "mixtral"}
CASES: tuple[tuple[str, dict[str, Any], int], ...] = (
    *(("deepseek-v3", DEEPSEEK_V3, n) for n in (8, 16, 31, 61)),
    ("mixtral-8x7b", MIXTRAL, 32),
    ("qwen3-235b", QWEN3_235B, 94),
)
"""Name, settings of config.json, decoder layers."""


def child(config: dict[str, Any], threads: int, profile: bool) -> None:
    """Prints seconds of imports, capture and each pass, and the number of nodes, as JSON."""
    started = time.monotonic()
    import torch

    from moec.compiler.capture import capture
    from moec.passes.infra.base import PassContext
    from moec.passes.infra.runner import run_passes
    from moec.passes.pipeline import PIPELINE

    torch.set_num_threads(threads)
    marks, cpu = [("imports", time.monotonic())], time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({"dtype": "bfloat16", **config}))
        captured = capture(folder, random_weights=0)
    marks.append(("capture", time.monotonic()))
    context = PassContext(read=captured.read)
    if profile:
        for one in PIPELINE:
            run_passes(captured.graph_module, (one,), context)
            marks.append((one.name, time.monotonic()))
    else:
        run_passes(captured.graph_module, PIPELINE, context)
        marks.append(("passes", time.monotonic()))
    spent: dict[str, float] = {}
    for (_, before), (name, after) in itertools.pairwise([("", started), *marks]):
        spent[name] = spent.get(name, 0.0) + after - before
    found = {"seconds": spent, "cpu": time.process_time() - cpu, "nodes": len(captured.graph_module.graph.nodes)}
    print(json.dumps(found))


def run(config: dict[str, Any], layers: int, threads: int, profile: bool) -> dict[str, Any]:
    request = json.dumps({**config, "num_hidden_layers": layers})
    command = [sys.executable, __file__, "--child", request, "--threads", str(threads)]
    done = subprocess.run(command + ["--profile"] * profile, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="", help="only this one")
    parser.add_argument(
        "--profile", action="store_true", help="seconds of each pass; adds the runner's own work to each"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(json.loads(options.child), options.threads, options.profile)
        return
    points: dict[str, list[tuple[int, float]]] = {}
    for name, config, layers in CASES:
        if options.model not in ("", name):
            continue
        found = run(config, layers, options.threads, options.profile)
        parts = ", ".join(f"{k} {v:.1f}" for k, v in found["seconds"].items())
        total = sum(v for k, v in found["seconds"].items() if k != "imports")
        points.setdefault(name, []).append((layers, found["cpu"]))
        print(
            f"{name}, {layers} layers: {total:.1f} s, {found['cpu']:.1f} s of CPU, {found['nodes']} nodes (s: {parts})",
            flush=True,
        )
    for name, measured in points.items():
        if len(measured) > 1:
            (few, first), (many, last) = measured[0], measured[-1]
            exponent = math.log(last / first) / math.log(many / few)
            per_layer = [(b - a) / (n - m) for (m, a), (n, b) in itertools.pairwise(measured)]
            steps = ", ".join(f"{s * 1e3:.0f}" for s in per_layer)
            print(f"{name}: CPU time grows as layers^{exponent:.2f}; ms for each further layer: {steps}")


if __name__ == "__main__":
    main()

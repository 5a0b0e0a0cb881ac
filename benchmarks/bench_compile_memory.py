"""Memory that compiling a checkpoint takes above the process's own.

    python benchmarks/bench_compile_memory.py
    python benchmarks/bench_compile_memory.py --mixtral --weights int4 --at-most 1    Mixtral-8x7B's sizes, 6 GB on disk

Writes a Mixtral-shaped bf16 checkpoint of equal layers, compiles a tiny model in a child process (so that libraries,
kernels and code paths are there), notes the child's memory, compiles the checkpoint, and prints the peak above that, in
layers. Figures are the kernel's: VmHWM of /proc/self/status, reset by writing 5 to /proc/self/clear_refs; it counts
anonymous memory and the mapped pages of every file, so a checkpoint that is mapped and touched counts in full. Exit
code 1 where a compile takes more layers (in bf16) than --at-most.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MIB = 1 << 20
HEADS, KV_HEADS, NUM_EXPERTS, VOCAB = 16, 4, 8, 1024


def config(layers: int, hidden: int, inner: int) -> dict[str, Any]:
    """config.json of a Mixtral of this size."""
    return {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "dtype": "bfloat16",
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_local_experts": NUM_EXPERTS,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 4096,
    }


def shapes_of_layer(hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one layer by the published names without their prefix."""
    kv = hidden // HEADS * KV_HEADS
    found: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    found |= {
        f"self_attn.{p}_proj.weight": (n, hidden) for p, n in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden))
    }
    found["block_sparse_moe.gate.weight"] = (NUM_EXPERTS, hidden)
    for e in range(NUM_EXPERTS):
        for name, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
            found[f"block_sparse_moe.experts.{e}.{name}.weight"] = shape
    return found


def write_checkpoint(directory: Path, layers: int, hidden: int, inner: int) -> int:
    """Writes random weights, one shard for each layer -> bytes of a layer."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config(layers, hidden, inner)))
    shapes = shapes_of_layer(hidden, inner)
    places: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)

    def save(file: str, tensors: dict[str, tuple[int, ...]]) -> None:
        made = {n: (torch.randn(s, generator=generator) * 0.02).to(torch.bfloat16) for n, s in tensors.items()}
        save_file(made, directory / file, {"format": "pt"})
        places.update(dict.fromkeys(made, file))

    for i in range(layers):
        save(f"layer-{i}.safetensors", {f"model.layers.{i}.{n}": s for n, s in shapes.items()})
    ends = {"model.embed_tokens.weight": (VOCAB, hidden), "lm_head.weight": (VOCAB, hidden)}
    save("ends.safetensors", {**ends, "model.norm.weight": (hidden,)})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    total = 0
    for shape in shapes.values():
        total += 2 * torch.Size(shape).numel()
    return total


def memory(field: str) -> int:
    """A figure of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}; this benchmark needs Linux")


def child(small: str, large: str, folder: str, verify: str, weights: str) -> None:
    """Compiles both and prints what the large one took, as JSON."""
    import torch

    import moec

    torch.set_num_threads(1)
    asked = {"verify": verify, "weights": weights or None}
    moec.compile_to(small, Path(folder) / "small.engine", **asked)
    stages: dict[str, int] = {}

    def note(stage: str, done: int, total: int) -> None:
        stages[stage] = max(stages.get(stage, 0), memory("VmHWM"))

    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.monotonic()
    moec.compile_to(large, Path(folder) / "large.engine", progress=note, **asked)
    seconds = time.monotonic() - start
    by_stage = {stage: peak - before for stage, peak in stages.items()}
    print(json.dumps({"before": before, "above": memory("VmHWM") - before, "stages": by_stage, "seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=2432, help="width of an expert; 2432 makes layers of 248 MiB")
    parser.add_argument("--mixtral", action="store_true", help="2 layers of Mixtral-8x7B's widths, 2.7 GiB each")
    parser.add_argument("--weights", default="", help="formats, as for moec compile")
    parser.add_argument("--verify", default="sampled,off", help="comma-separated: off, sampled, full")
    parser.add_argument("--at-most", type=float, help="layers that a compile may take")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    if options.mixtral:
        options.layers, options.hidden, options.inner = 2, 4096, 14336
    most = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder / "small", 2, 256, 256)
        layer = write_checkpoint(folder / "large", options.layers, options.hidden, options.inner)
        print(f"{options.layers} layers of {layer / MIB:.0f} MiB {options.weights}")
        for verify in options.verify.split(","):
            most = max(most, measure(folder, verify, options.weights, layer))
    if options.at_most is not None and most > options.at_most:
        raise SystemExit(f"{most:.2f} layers, more than {options.at_most}")


def measure(folder: Path, verify: str, weights: str, layer_bytes: int) -> float:
    """Compiles folder/large in a process of its own and prints what it took -> layers."""
    with tempfile.TemporaryDirectory(dir=folder) as engines:
        arguments = ["--child", str(folder / "small"), str(folder / "large"), engines, verify, weights]
        done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    stages = ", ".join(f"{stage} {peak / MIB:.0f}" for stage, peak in found["stages"].items())
    layers: float = found["above"] / layer_bytes
    print(
        f"verify {verify}: {found['above'] / MIB:.0f} MiB above {found['before'] / MIB:.0f} MiB = "
        f"{layers:.2f} layers, {found['seconds']:.0f} s (MiB, stages: {stages})"
    )
    return layers


if __name__ == "__main__":
    main()

"""Peak memory of compiling a 2-layer checkpoint of Mixtral-8x7B's shape, against the process alone plus one bf16 layer.

    python benchmarks/compile_memory.py [--weights int4] [--layers 2] [--directory DIR]

Writes a checkpoint of random weights (6.3 GB, removed afterwards unless --directory names a place to keep it), compiles
it in a process of its own and prints that process's peak resident memory. Exit code 1 where it is above the memory of
the process before it compiles plus the bytes of one layer in bf16.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

HIDDEN, INNER, EXPERTS, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 4096, 14336, 8, 32000, 32, 8, 128
LAYER_BYTES = 2 * (3 * EXPERTS * HIDDEN * INNER + EXPERTS * HIDDEN + 2 * HIDDEN * (HEADS + KV_HEADS) * HEAD_DIM)
CONFIG = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu", "torch_dtype": "bfloat16",
    "hidden_size": HIDDEN, "intermediate_size": INNER, "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip


def write_checkpoint(directory: Path, layers: int) -> None:
    """A shard for each layer. Matrices are pieces of one pool of normal numbers: drawing each anew takes minutes."""
    pool = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    weight_map: dict[str, str] = {}

    def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
        count = rows * columns
        return pool.roll(997 * seed).repeat(-(-count // len(pool)))[:count].view(rows, columns)

    def write(shard: int, tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{shard:05}.safetensors"
        save_file(tensors, directory / file)
        weight_map.update(dict.fromkeys(tensors, file))

    for layer in range(layers):
        at = f"model.layers.{layer}"
        q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        shapes = {"q_proj": (q, HIDDEN), "k_proj": (kv, HIDDEN), "v_proj": (kv, HIDDEN), "o_proj": (HIDDEN, q)}
        made = {f"{at}.self_attn.{n}.weight": matrix(*s, layer) for n, s in shapes.items()}
        made |= {
            f"{at}.{n}.weight": torch.ones(HIDDEN).bfloat16() for n in ("input_layernorm", "post_attention_layernorm")
        }
        made[f"{at}.block_sparse_moe.gate.weight"] = matrix(EXPERTS, HIDDEN, layer)
        for e in range(EXPERTS):
            inside = f"{at}.block_sparse_moe.experts.{e}"
            made |= {f"{inside}.{n}.weight": matrix(INNER, HIDDEN, 3 * e + i) for i, n in enumerate(("w1", "w3"))}
            made[f"{inside}.w2.weight"] = matrix(HIDDEN, INNER, 3 * e + 2)
        write(layer, made)
    ends = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN, 1), "lm_head.weight": matrix(VOCAB, HIDDEN, 2)}
    write(layers, {**ends, "model.norm.weight": torch.ones(HIDDEN).bfloat16()})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


CHILD = """
import json, resource, sys, time
import moec, moec.compiler.api, torch, transformers
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
base, started = peak(), time.time()
engine = moec.compile(sys.argv[1], weights=sys.argv[2], verify="off", output=sys.argv[3])
print(json.dumps({"base": base, "peak": peak(), "seconds": time.time() - started,
                  "stored": engine.inspect()["stored_bytes"]}))
"""


def main(
    weights: Annotated[str, typer.Option()] = "int4",
    layers: Annotated[int, typer.Option(min=1)] = 2,
    directory: Annotated[Path | None, typer.Option(help="where to keep the checkpoint")] = None,
) -> None:
    """Compiles and compares."""
    with tempfile.TemporaryDirectory(prefix="moec-memory-") as folder:
        checkpoint = directory or Path(folder) / "checkpoint"
        if not (checkpoint / "config.json").is_file():
            write_checkpoint(checkpoint, layers)
        command = [sys.executable, "-c", CHILD, str(checkpoint), weights, str(Path(folder) / "engine")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.stderr.write(done.stderr)
            raise typer.Exit(1)
        found = json.loads(done.stdout.splitlines()[-1])
    limit = found["base"] + LAYER_BYTES
    gb = {name: n / 1e9 for name, n in (("base", found["base"]), ("peak", found["peak"]), ("limit", limit))}
    sys.stdout.write(
        f"{layers} layers of Mixtral-8x7B's shape in {weights}: process {gb['base']:.2f} GB, peak {gb['peak']:.2f} GB, "
        f"limit {gb['limit']:.2f} GB (one bf16 layer more), {found['seconds']:.0f} s\nstored: {found['stored']}\n"
    )
    raise typer.Exit(int(found["peak"] > limit))


if __name__ == "__main__":
    typer.run(main)

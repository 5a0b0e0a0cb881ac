"""Attention over the cache for few tokens: checks against float64, and times beside torch's, for several splits.

    python benchmarks/gpu/attention.py build --arch sm_90a --out build/gpu-attention     # where TVM is; no GPU
    PYTHONPATH=src python benchmarks/gpu/attention.py run build/gpu-attention            # where the GPU is; torch only

`run` prints, for heads, batch and context, the best split's time, its share of the copy rate measured in the same run
(keys and values of all tokens count once), and torch's time on the same caches. Exit code 1: a wrong result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

HEADS = {"mixtral-8x7b": (32, 8, 128, 128), "gpt-oss-like": (64, 8, 64, 64), "wide": (16, 8, 256, 256)}
BATCHES, CONTEXTS, SPLITS = (1, 8, 64), (512, 4096, 32768), (1, 2, 4, 8, 16, 32)
TOLERANCE = 2**-8  # of the largest result: weights and results are rounded to bf16
PARTS = ("append", "decode", "merge")


def build(arch: str, out: Path) -> None:
    """Cubins and launches of every shape into out, with manifest.json."""
    from moec.compiler.codegen.cuda import build_cubins
    from moec.compiler.codegen.cuda_archs import architecture
    from moec.compiler.codegen.llvm import default_cache_dir
    from moec.compiler.kernels.attention.problem import AttentionProblem
    from moec.compiler.kernels.cuda.catalogue import SPECS

    spec = next(s for s in SPECS if s.name == "cuda-attention")
    out.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = {}
    for name, heads in HEADS.items():
        made = spec.kernels(AttentionProblem(*heads), architecture(arch))
        cubins = build_cubins([kernel.source() for kernel in made.values()], default_cache_dir())
        for part, cubin in zip(made, cubins, strict=True):
            (out / f"{name}.{part}.cubin").write_bytes(cubin.path.read_bytes())
        manifest[name] = {part: cubin.source.launch() for part, cubin in zip(made, cubins, strict=True)}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))


class Step:
    """One decode step of `batch` sequences that hold `context` keys each, this one's included."""

    def __init__(
        self, heads: tuple[int, int, int, int], kernels: Mapping[str, Callable[..., None]], batch: int, context: int,
        device: str,
    ) -> None:  # fmt: skip
        self.heads, self.kernels, self.batch, self.context = heads, kernels, batch, context
        num_heads, kv_heads, width, value_width = heads
        generator = torch.Generator(device).manual_seed(batch + context)

        def new(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).bfloat16()

        self.q = new(batch, num_heads, width)
        self.k, self.v = new(batch, kv_heads, width), new(batch, kv_heads, value_width)
        self.caches = new(batch, context, kv_heads, width), new(batch, context, kv_heads, value_width)
        self.slots = torch.arange(batch, device=device)
        self.positions = torch.full_like(self.slots, context - 1)
        self.out = torch.empty(batch, num_heads, value_width, dtype=torch.bfloat16, device=device)
        self.scale = width**-0.5

    def run(self, splits: int) -> None:
        """The three launches."""
        num_heads, _, _, value_width = self.heads
        parts = splits * self.batch
        values: dict[str, Any] = {"n": self.batch, "parts": parts, "splits": splits, "cache_length": self.context}
        values |= {"cached": self.batch * self.context, "slots": self.slots, "positions": self.positions}
        values |= {"k_cache": self.caches[0], "v_cache": self.caches[1], "out": self.out, "scale": self.scale}
        for name, x in (("q", self.q), ("k", self.k), ("v", self.v)):
            values |= {name: x, f"{name}_stride": x[0].numel(), f"{name}_elements": x.numel()}
        device = self.out.device
        values["part"] = torch.empty(parts, num_heads, value_width, device=device)
        values["stats"] = torch.empty(parts, num_heads, 2, device=device)
        for part in PARTS:
            self.kernels[part](**values, window=0, chunk=0, softcap=0.0)

    def reference(self) -> Tensor:
        """f64 [T,Q,Dv]; after a run, when the caches hold this step's keys."""
        repeat = self.heads[0] // self.heads[1]
        keys, values = (c.double().repeat_interleave(repeat, 2) for c in self.caches)
        weights = (torch.einsum("bqd,bkqd->bqk", self.q.double(), keys) * self.scale).softmax(-1)
        return torch.einsum("bqk,bkqd->bqd", weights, values)

    def by_torch(self) -> Tensor:
        """torch's own on the same caches."""
        k, v = (c.transpose(1, 2) for c in self.caches)
        return F.scaled_dot_product_attention(self.q.unsqueeze(2), k, v, scale=self.scale, enable_gqa=True)

    @property
    def num_bytes(self) -> int:
        """Of keys and values."""
        return sum(c.numel() * c.element_size() for c in self.caches)


def is_right(step: Step, splits: int) -> bool:
    """Whether the launches give the float64 result within TOLERANCE."""
    step.out.fill_(float("nan"))
    step.run(splits)
    want = step.reference()
    return bool((step.out.double() - want).abs().max() < TOLERANCE * want.abs().max())


def _time_us(run: Callable[[], Any], flush: Tensor, repeats: int = 15) -> float:
    """Median of a captured graph's replays, caches flushed before each."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def measure(folder: Path) -> int:
    """Every shape: checked, then timed. Returns the exit code."""
    from moec.runtime.launch.cuda import Driver, Kernel

    torch.zeros(1, device="cuda")  # makes torch's context current
    driver, wrong = Driver(), 0
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    copied = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(copied)
    rate = 2 * copied.numel() / _time_us(lambda: other.copy_(copied), flush)  # bytes per us
    for name, launches in json.loads((folder / "manifest.json").read_text()).items():
        kernels = {p: Kernel.load(driver, (folder / f"{name}.{p}.cubin").read_bytes(), launches[p]) for p in PARTS}
        for batch in BATCHES:
            for context in CONTEXTS:
                step = Step(HEADS[name], kernels, batch, context, "cuda")
                if batch * context <= 1 << 15 and not all(is_right(step, s) for s in SPLITS):
                    print(f"{name}, {batch} x {context}: wrong result")
                    wrong += 1
                    continue
                times = {s: _time_us(lambda s=s, step=step: step.run(s), flush) for s in SPLITS}  # type: ignore[misc]
                best = min(times, key=times.__getitem__)
                share = step.num_bytes / times[best] / rate
                theirs = _time_us(step.by_torch, flush)
                what = f"{name}, {batch} x {context}"
                print(f"{what}: {times[best]:.1f} us ({best} splits, {share:.0%} of a copy), torch {theirs:.1f}")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    commands = parser.add_subparsers(dest="command", required=True)
    builder = commands.add_parser("build")
    builder.add_argument("--arch", default="sm_90a")
    builder.add_argument("--out", type=Path, default=Path("build/gpu-attention"))
    commands.add_parser("run").add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.command == "build":
        build(options.arch, options.out)
        return 0
    if not torch.cuda.is_available():
        print("error: torch finds no CUDA device; run this on a machine with a GPU", file=sys.stderr)
        return 1
    return measure(options.folder)


if __name__ == "__main__":
    sys.exit(main())

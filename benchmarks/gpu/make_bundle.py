"""Builds what run.py measures: cubins of every shape, with how to launch them. Needs TVM and a CUDA compiler, no GPU.

python benchmarks/gpu/make_bundle.py --arch sm_90a --out build/gpu-bundle
python benchmarks/gpu/make_bundle.py --small --out build/small-bundle       # for compute-sanitizer
python benchmarks/gpu/make_bundle.py --emulate --out build/dry-bundle       # a tiny layer for run.py --dry-run
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moec.compiler.codegen.cuda import BuiltCubin, build_cubins
from moec.compiler.codegen.cuda_archs import architecture
from moec.compiler.codegen.cuda_toolchain import cubin_compiler
from moec.compiler.codegen.emulator.device import build_emulated
from moec.compiler.codegen.llvm import default_cache_dir
from moec.compiler.kernels.cuda import dispatch, moe_decode
from moec.compiler.kernels.cuda import gate as gate_kernel
from moec.compiler.kernels.cuda.catalogue import SPECS
from moec.compiler.kernels.cuda.dispatch import DispatchProblem
from moec.compiler.kernels.cuda.gemm_space import SPACE
from moec.compiler.kernels.cuda.kernel import CudaKernel
from moec.compiler.kernels.cuda.layer import LayerError, LayerShape, layer_kernels
from moec.compiler.kernels.cuda.moe_decode import DecodeProblem
from moec.compiler.kernels.cuda.shapes import SHAPES
from moec.compiler.kernels.gate.problem import GateProblem
from moec.passes.ir.gate import GateSpec

SHARES = {
    "skywork-moe/8": (dataclasses.replace(SHAPES["skywork-moe"], name="skywork-moe/8", inner=12288 // 8), 16),
    "deepseek-moe-16b/8": (
        dataclasses.replace(SHAPES["deepseek-moe-16b"], name="deepseek-moe-16b/8", num_experts=8, num_shared=0),
        64,
    ),
    "qwen3-30b-a3b/8": (dataclasses.replace(SHAPES["qwen3-30b-a3b"], name="qwen3-30b-a3b/8", num_experts=16), 128),
}
"""One rank's share of eight, and the experts that its gate chooses among: a slice of every expert, or whole experts."""
ALL = {**{name: (shape, shape.num_experts) for name, shape in SHAPES.items()}, **SHARES}
TINY = LayerShape("tiny", 128, 128, 5, 2, GateSpec(2, renormalise=True).encode(), num_shared=1)
SMALL = [
    dataclasses.replace(TINY, name=f"small-{dtype}", hidden=256, inner=256, dtype=dtype)
    for dtype in ("bfloat16", "float8_e4m3fn", "int4-g128", "int8")
]
"""Layers that a checker of memory and races gets through in seconds."""
TILE_ROWS = SPACE["gemm_mma"]["rows"]
"""Of the tiles that a tuning bundle tries; wgmma's are among them."""
Build = Callable[..., list[BuiltCubin]]


def make_bundle(
    shapes: Sequence[tuple[LayerShape, int]],
    arch: str,
    out: Path,
    cache_dir: Path,
    build: Build = build_cubins,
    sizes: Sequence[str] = ("small", "large"),
) -> dict[str, object]:
    """Writes manifest.json and the cubins into out; returns the manifest. A kernel that several layers share is one.

    shapes: with the number of experts that the gate chooses among; those from num_experts on are held elsewhere.
    """
    out.mkdir(parents=True, exist_ok=True)
    layers: list[dict[str, object]] = []
    refused: list[str] = []
    dispatches: dict[str, object] = {}
    for shape, routed in shapes:
        for size in sizes:
            try:
                made = layer_kernels(shape, arch, size)
            except LayerError as error:
                refused.append(f"{shape.name}: {error}")
                continue
            gate = GateProblem(shape.gate, routed)
            made.kernels["gate"] = CudaKernel("gate", arch, functools.partial(gate_kernel.build, gate))
            entry = {"shape": dataclasses.asdict(shape), "size": size, "tile_rows": made.tile_rows, "routed": routed}
            entry |= {"splits": made.splits, "part_dtype": made.part_dtype, "gathers": made.gathers}
            layers.append(entry | {"kernels": _write(made.kernels, out, cache_dir, build)})
        if routed == shape.num_experts and build is build_cubins:
            _add_decode(shape, arch, out, cache_dir, layers, refused)
        if routed == shape.num_experts and shape.dtype == "bfloat16":
            dispatches[shape.name] = {
                str(rows): _write(_dispatch(shape, arch, rows), out, cache_dir, build) for rows in TILE_ROWS
            }
    compiler = cubin_compiler().version if build is build_cubins else "emulated"
    manifest = {"arch": arch, "compiler": compiler, "layers": layers, "refused": refused, "dispatch": dispatches}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
    return manifest


def _dispatch(shape: LayerShape, arch: str, rows: int) -> dict[str, CudaKernel]:
    """The dispatch kernels for tiles of so many rows: run.py --tuned puts the tuned GEMMs after them."""
    problem = DispatchProblem(shape.num_experts, shape.top_k, shape.num_shared, rows)
    builds = {
        "place": functools.partial(dispatch.build_place, problem, True),
        "count": functools.partial(dispatch.build_count, problem),
        "place_chunks": functools.partial(dispatch.build_place, problem, False),
    }
    return {name: CudaKernel(name, arch, build) for name, build in builds.items()}


def _write(kernels: Mapping[str, CudaKernel], out: Path, cache_dir: Path, build: Build) -> dict[str, object]:
    """Compiles kernels and copies their cubins; -> file and launch of each."""
    written: dict[str, object] = {}
    built = build([k.source() for k in kernels.values()], cache_dir)
    for name, cubin in zip(kernels, built, strict=True):
        file = f"{cubin.key[:32]}.cubin"
        shutil.copyfile(cubin.path, out / file)
        written[name] = {"file": file, "launch": cubin.source.launch()}
    return written


def _add_decode(
    shape: LayerShape, arch: str, out: Path, cache_dir: Path, layers: list[dict[str, object]], refused: list[str]
) -> None:
    """The layer in one launch, for up to 16 tokens, where there is such a kernel."""
    up, down = (shape.gemm(mode, "float32") for mode in ("gate_up", "down"))
    gate = GateProblem(shape.gate, shape.num_experts, hidden=shape.hidden)
    problem = DecodeProblem(gate, up, down, shape.num_shared)
    tiles = moe_decode.default_tiles(problem, architecture(arch))
    if isinstance(tiles, str):
        refused.append(f"{shape.name} in one launch: {tiles}")
        return
    made = next(s for s in SPECS if s.name == "cuda-moe-decode").kernels(problem, architecture(arch))
    entry = {"shape": dataclasses.asdict(shape), "size": "decode", "tile_rows": 16, "splits": tiles[1].splits}
    entry |= {"part_dtype": "float32", "gathers": False, "max_tokens": moe_decode.MAX_TOKENS}
    entry |= {"blocks_per_sm": made["moe_decode"].blocks_per_sm, "kernels": _write(made, out, cache_dir, build_cubins)}
    layers.append(entry)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--out", type=Path, default=Path("build/gpu-bundle"))
    parser.add_argument("--shapes", nargs="*", default=list(ALL), choices=list(ALL))
    parser.add_argument("--emulate", action="store_true", help="a tiny layer whose kernels run on the CPU")
    parser.add_argument("--small", action="store_true", help="layers of 256 x 256 alone, for compute-sanitizer")
    options = parser.parse_args()
    cache, shapes = default_cache_dir(), [ALL[s] for s in options.shapes]
    if options.emulate:
        tiny = [(TINY, TINY.num_experts)]
        manifest = make_bundle(tiny, options.arch, options.out, cache, build_emulated, ("small",))
    else:
        shapes = [(shape, shape.num_experts) for shape in SMALL] if options.small else shapes
        manifest = make_bundle(shapes, options.arch, options.out, cache)
    size = sum(f.stat().st_size for f in options.out.iterdir())
    print(f"{options.out}: {len(manifest['layers'])} layers, {size >> 10} KiB")  # type: ignore[arg-type]
    for reason in manifest["refused"]:  # type: ignore[attr-defined]
        print(f"left out: {reason}")


if __name__ == "__main__":
    main()

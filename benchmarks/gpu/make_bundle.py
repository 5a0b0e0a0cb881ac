"""Builds what run.py measures: cubins of every shape, with how to launch them. Needs TVM and a CUDA compiler, no GPU.

python benchmarks/gpu/make_bundle.py --arch sm_90a --out build/gpu-bundle
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from moec.compiler.codegen.cuda import build_cubins
from moec.compiler.codegen.cuda_archs import architecture
from moec.compiler.codegen.cuda_toolchain import cubin_compiler
from moec.compiler.codegen.llvm import default_cache_dir
from moec.compiler.kernels.cuda import moe_decode
from moec.compiler.kernels.cuda.catalogue import SPECS
from moec.compiler.kernels.cuda.kernel import CudaKernel
from moec.compiler.kernels.cuda.layer import LayerError, LayerShape, layer_kernels
from moec.compiler.kernels.cuda.moe_decode import DecodeProblem
from moec.compiler.kernels.cuda.shapes import SHAPES
from moec.compiler.kernels.gate.problem import GateProblem


def make_bundle(shapes: list[LayerShape], arch: str, out: Path, cache_dir: Path) -> dict[str, object]:
    """Writes manifest.json and the cubins into out; returns the manifest. A kernel that several layers share is one."""
    out.mkdir(parents=True, exist_ok=True)
    layers: list[dict[str, object]] = []
    refused: list[str] = []
    for shape in shapes:
        for size in ("small", "large"):
            try:
                made = layer_kernels(shape, arch, size)
            except LayerError as error:
                refused.append(f"{shape.name}: {error}")
                continue
            entry = {"shape": dataclasses.asdict(shape), "size": size, "tile_rows": made.tile_rows}
            entry |= {"splits": made.splits, "part_dtype": made.part_dtype, "gathers": made.gathers}
            layers.append(entry | {"kernels": _write(made.kernels, out, cache_dir)})
        _add_decode(shape, arch, out, cache_dir, layers, refused)
    manifest = {"arch": arch, "compiler": cubin_compiler().version, "layers": layers, "refused": refused}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
    return manifest


def _write(kernels: Mapping[str, CudaKernel], out: Path, cache_dir: Path) -> dict[str, object]:
    """Compiles kernels and copies their cubins; -> file and launch of each."""
    written: dict[str, object] = {}
    built = build_cubins([k.source() for k in kernels.values()], cache_dir)
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
    entry |= {"blocks_per_sm": made["moe_decode"].blocks_per_sm, "kernels": _write(made, out, cache_dir)}
    layers.append(entry)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--out", type=Path, default=Path("build/gpu-bundle"))
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    options = parser.parse_args()
    manifest = make_bundle([SHAPES[s] for s in options.shapes], options.arch, options.out, default_cache_dir())
    size = sum(f.stat().st_size for f in options.out.iterdir())
    print(f"{options.out}: {len(manifest['layers'])} layers, {size >> 10} KiB")  # type: ignore[arg-type]
    for reason in manifest["refused"]:  # type: ignore[attr-defined]
        print(f"left out: {reason}")


if __name__ == "__main__":
    main()

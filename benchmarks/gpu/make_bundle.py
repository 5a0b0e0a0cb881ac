"""Builds what run.py measures: cubins of every shape, with how to launch them. Needs TVM and a CUDA compiler, no GPU.

python benchmarks/gpu/make_bundle.py --arch sm_90a --out build/gpu-bundle
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

from moec.compiler.codegen.cuda import build_cubins
from moec.compiler.codegen.cuda_toolchain import cubin_compiler
from moec.compiler.codegen.llvm import default_cache_dir
from moec.compiler.kernels.cuda.layer import LayerError, LayerShape, layer_kernels
from moec.compiler.kernels.cuda.shapes import SHAPES


def make_bundle(shapes: list[LayerShape], arch: str, out: Path, cache_dir: Path) -> dict[str, object]:
    """Writes manifest.json and the cubins into out; returns the manifest. A kernel that several layers share is one."""
    out.mkdir(parents=True, exist_ok=True)
    layers, refused = [], []
    for shape in shapes:
        for size in ("small", "large"):
            try:
                made = layer_kernels(shape, arch, size)
            except LayerError as error:
                refused.append(f"{shape.name}: {error}")
                continue
            built = build_cubins([k.source() for k in made.kernels.values()], cache_dir)
            entry = {"shape": dataclasses.asdict(shape), "size": size, "tile_rows": made.tile_rows}
            entry |= {"splits": made.splits, "part_dtype": made.part_dtype, "gathers": made.gathers, "kernels": {}}
            for name, cubin in zip(made.kernels, built, strict=True):
                file = f"{cubin.key[:32]}.cubin"
                shutil.copyfile(cubin.path, out / file)
                entry["kernels"][name] = {"file": file, "launch": cubin.source.launch()}  # type: ignore[index]
            layers.append(entry)
    manifest = {"arch": arch, "compiler": cubin_compiler().version, "layers": layers, "refused": refused}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
    return manifest


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

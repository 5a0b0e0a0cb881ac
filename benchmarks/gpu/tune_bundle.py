"""Builds a bundle of tuning candidates for a layer shape, and says how long it took. Needs a CUDA compiler, no GPU.

python benchmarks/gpu/tune_bundle.py --out build/tune-bundle            # 112 candidates of Mixtral-8x7B for sm_90a
python build/tune-bundle/run.py                                         # on the GPU: Python and the driver
moec tune import build/tune-bundle/results.jsonl --db tuning.db
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from moec.compiler.codegen.llvm import default_cache_dir
from moec.compiler.kernels.cuda.shapes import SHAPES
from moec.compiler.tune.bundle import BundleRequest, write_bundle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--out", type=Path, default=Path("build/tune-bundle"))
    parser.add_argument("--shapes", nargs="*", default=["mixtral-8x7b"], choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 16, 256, 4096])
    parser.add_argument("--candidates", type=int, default=56, help="of each GEMM")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=default_cache_dir())
    options = parser.parse_args()
    shapes = tuple(SHAPES[s] for s in options.shapes)
    request = BundleRequest(shapes, options.arch, tuple(options.tokens), candidates=options.candidates)
    began = time.monotonic()
    manifest = write_bundle(request, options.out, options.cache, options.workers)
    passed, size = time.monotonic() - began, sum(f.stat().st_size for f in options.out.rglob("*") if f.is_file())
    print(
        f"{options.out}: {len(manifest['candidates'])} candidates, {len(manifest['files'])} cubins, "
        f"{len(manifest['rejected'])} rejected, {size >> 10} KiB, built in {passed:.0f} s"
    )


if __name__ == "__main__":
    main()

"""Options of one compilation, checked; the one place of the compiler that reads the environment."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch

from moec.compiler.codegen.cuda_archs import ARCHITECTURES, Architecture, ArchitectureError, architecture
from moec.compiler.codegen.llvm import default_cache_dir
from moec.compiler.errors import CompileError
from moec.compiler.weights_option import WeightsOption, parse_weights
from moec.passes.ir.formats import parse_format
from moec.runtime.launch.cpu_features import LEVELS, best_level

LEVEL_NAMES = {"avx2": "avx2", "avx512": "avx512f", "avx512_bf16": "avx512_bf16", "amx": "amx_bf16"}
"""What `--target cpu:NAME` accepts, beside the level names themselves."""
COMBINES = ("ordered", "fast")


@dataclasses.dataclass(frozen=True)
class CompileOptions:
    """level: instruction-set level to build kernels for, None: library kernels only. weights: dtype and formats.

    arch: of the GPU, None for a CPU target.
    cache_dir: where built kernels are kept.
    tune_db: the tuning database that configures kernels, None: none.
    combine: how experts' results are summed, "ordered" or (of a GPU) "fast": by atomics, last bits differ between runs.
    """

    level: str | None
    weights: WeightsOption
    verify: str
    dump: Path | None
    cache_dir: Path
    arch: Architecture | None = None
    tune_db: Path | None = None
    combine: str = "ordered"

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the model, None: the checkpoint's."""
        return self.weights.dtype

    @classmethod
    def of(
        cls,
        target: str,
        weights: str | None,
        verify: str,
        dump: str | Path | None,
        tune_db: str | Path | None = None,
        combine: str = "ordered",
    ) -> CompileOptions:
        """Raises: CompileError: a value that has no meaning."""
        if verify not in ("off", "sampled", "full"):
            raise CompileError(f"verify={verify!r}; known: off, sampled, full")
        if combine not in COMBINES:
            raise CompileError(f"combine={combine!r}; known: {', '.join(COMBINES)}")
        arch, option = _arch(target), parse_weights(weights)
        level = _level(target) if arch is None else None
        if arch is None and combine != COMBINES[0]:
            raise CompileError(f"combine={combine!r} is for GPUs; a CPU sums in one order, leave it out")
        option = option if arch is None else _for_arch(option, arch)
        folder, database = (None if p is None else Path(p) for p in (dump, tune_db))
        return cls(level, option, verify, folder, cache_folder(), arch, database, combine)


def _arch(target: str) -> Architecture | None:
    kind, _, name = target.partition(":")
    if kind != "cuda":
        return None
    if not name:
        raise CompileError(f"target={target!r}; say which GPU: {_cuda_targets()}")
    try:
        return architecture(name)
    except ArchitectureError as error:
        raise CompileError(f"target={target!r}: {error}") from None


def _cuda_targets() -> str:
    return ", ".join(f"cuda:{name}" for name in ARCHITECTURES)


def _for_arch(option: WeightsOption, arch: Architecture) -> WeightsOption:
    """The experts' fp8 as this GPU multiplies it: where tensor cores take e4m3, activations are rounded to it too.

    Raises: CompileError: a format that only CPUs have kernels for.
    """
    if option.packed:
        raise CompileError(
            f"weights: {option.packed} is for CPUs; on {arch.name} leave experts as they are, or experts=bf16"
        )
    if not arch.multiplies_e4m3:
        return option
    formats = tuple(
        (role, parse_format("fp8-w8a8") if role == "experts" and format.name == "fp8" else format)
        for role, format in option.formats
    )
    return dataclasses.replace(option, formats=formats)


def _level(target: str) -> str | None:
    kind, _, name = target.partition(":")
    if kind != "cpu":
        raise CompileError(f"target={target!r}; known: cpu, cpu:{', cpu:'.join(LEVEL_NAMES)}, {_cuda_targets()}")
    if not name:
        return best_level()
    level = LEVEL_NAMES.get(name, name)
    if level not in LEVELS:
        raise CompileError(f"target={target!r}; known CPU levels: {', '.join(LEVEL_NAMES)}")
    return level


def cache_folder() -> Path:
    """Where built kernels are kept: MOEC_CACHE_DIR, else a folder below the home directory."""
    folder = os.environ.get("MOEC_CACHE_DIR")
    return Path(folder) if folder else default_cache_dir()


def temporary_folder() -> str | None:
    """Where engines without an output folder are built: MOEC_TMPDIR, else the system's choice."""
    return os.environ.get("MOEC_TMPDIR")

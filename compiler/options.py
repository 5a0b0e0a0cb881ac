"""Options of one compilation, checked; the one place of the compiler that reads the environment."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch

from moec.compiler.codegen.llvm import default_cache_dir
from moec.compiler.errors import CompileError
from moec.compiler.weights_option import WeightsOption, parse_weights
from moec.runtime.launch.cpu_features import LEVELS, best_level

LEVEL_NAMES = {"avx2": "avx2", "avx512": "avx512f", "avx512_bf16": "avx512_bf16", "amx": "amx_bf16"}
"""What `--target cpu:NAME` accepts, beside the level names themselves."""


@dataclasses.dataclass(frozen=True)
class CompileOptions:
    """level: instruction-set level to build kernels for, None: library kernels only. weights: dtype and formats.

    cache_dir: where built kernels are kept: MOEC_CACHE_DIR, else the home directory.
    """

    level: str | None
    weights: WeightsOption
    verify: str
    dump: Path | None
    cache_dir: Path

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the model, None: the checkpoint's."""
        return self.weights.dtype

    @classmethod
    def of(cls, target: str, weights: str | None, verify: str, dump: str | Path | None) -> CompileOptions:
        """Raises: CompileError: a value that has no meaning."""
        if verify not in ("off", "sampled", "full"):
            raise CompileError(f"verify={verify!r}; known: off, sampled, full")
        cache = os.environ.get("MOEC_CACHE_DIR")
        cache_dir = Path(cache) if cache else default_cache_dir()
        return cls(_level(target), parse_weights(weights), verify, None if dump is None else Path(dump), cache_dir)


def _level(target: str) -> str | None:
    kind, _, name = target.partition(":")
    if kind != "cpu":
        raise CompileError(f"target={target!r}; known: cpu, cpu:{', cpu:'.join(LEVEL_NAMES)}")
    if not name:
        return best_level()
    level = LEVEL_NAMES.get(name, name)
    if level not in LEVELS:
        raise CompileError(f"target={target!r}; known CPU levels: {', '.join(LEVEL_NAMES)}")
    return level


def temporary_folder() -> str | None:
    """Where engines without an output folder are built: MOEC_TMPDIR, else the system's choice."""
    return os.environ.get("MOEC_TMPDIR")

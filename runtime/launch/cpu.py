"""Loads kernel libraries: torch and tvm-ffi alone.

    library = load_library(Path("kernels-amx_bf16.so"), level="amx_bf16")
    library["moec_rms_norm"](x, weight, y)            # torch tensors in and out, nothing is copied or returned

A library is made by moec.compiler.codegen.llvm. It carries its own small runtime, which runs parallel loops on torch's
OpenMP threads: torch.set_num_threads counts for kernels too, from one call to the next.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch  # noqa: F401  (loads the OpenMP library that kernels share; must come before a library is opened)
import tvm_ffi

from moec.runtime.errors import EngineError
from moec.runtime.launch.cpu_features import LEVELS, missing_features


class UnsupportedProcessor(EngineError):
    """The kernels were built for features that this processor or its kernel does not give."""


def load_library(path: Path, level: str) -> Any:
    """Opens a kernel library; library[name] is a function of torch tensors and ints.

    Args:     path: a whole file; a truncated one can kill the process, so check its digest first.
              level: the instruction-set level that the library was built for, a key of LEVELS.
    Raises:   UnsupportedProcessor: before anything is opened, where a feature is missing.
              EngineError: the file is absent or no kernel library.
    """
    if level not in LEVELS:
        raise EngineError(
            f"{path}: unknown CPU level {level!r}, expected one of {', '.join(LEVELS)}; recompile the engine"
        )
    if lacking := missing_features(level):
        raise UnsupportedProcessor(
            f"{path}: the kernels need {level}, this processor lacks {', '.join(lacking)}; recompile on this machine"
        )
    if not path.is_file():
        raise EngineError(f"{path}: no such kernel library; the engine is incomplete, compile it again")
    try:
        library = tvm_ffi.load_module(str(path))
        request_amx = library["moec_request_amx"]
    except (RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise EngineError(f"{path}: not a kernel library of moec ({reason}); compile the engine again") from error
    if level == "amx_bf16" and (errno := request_amx()):
        raise UnsupportedProcessor(
            f"{path}: the system refuses AMX tile registers (errno {errno}); recompile with --target cpu:avx512_bf16"
        )
    return library

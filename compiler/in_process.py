"""A lowered model run in this process: no engine directory, weights from memory."""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch import Tensor

from moec.compiler.api import Progress, build_kernels
from moec.compiler.lowering.emit import Lowered
from moec.compiler.lowering.packing import make
from moec.compiler.options import CompileOptions
from moec.passes.ir.weights import Read, Weight
from moec.runtime.executor import Executor
from moec.runtime.format import WEIGHTS_ALIGN_BYTES
from moec.runtime.launch.cpu import load_library
from moec.runtime.loader import available_memory_bytes, to_huge_pages
from moec.runtime.pages import empty_aligned
from moec.runtime.program import Program


def executor_of(lowered: Lowered, read: Read, options: CompileOptions, progress: Progress) -> Executor:
    """The program ready to run. Weights that no kernel packs stay where they are; others are copied once.

    Raises: ToolchainError: no C compiler.  EngineError: the kernels cannot run here.
    """
    built = build_kernels(lowered, options, progress)
    program = Program.from_json(json.loads(json.dumps(lowered.program.to_json())))
    if built.library is None or built.level is None:
        return Executor(program, in_memory(lowered.weights, read), {})
    import tvm_ffi

    library = load_library(built.library, built.level)
    kernels = {symbol: library[symbol] for symbol in built.symbols}
    weights = in_memory(lowered.weights, read)
    packed = {name: t for name, t in weights.items() if lowered.weights[name].op == "pack"}
    return Executor(program, weights | to_huge_pages(packed, available_memory_bytes()), kernels, tvm_ffi.from_dlpack)


def in_memory(weights: Mapping[str, Weight], read: Read) -> dict[str, Tensor]:
    """The weights' tensors, dense and aligned as in an engine's file."""
    return {name: _aligned(make(weight, read)) for name, weight in weights.items()}


def _aligned(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.is_contiguous() and tensor.data_ptr() % WEIGHTS_ALIGN_BYTES == 0:
        return tensor
    block = empty_aligned(tensor.numel() * tensor.element_size(), WEIGHTS_ALIGN_BYTES)
    return block.view(tensor.dtype).view(tensor.shape).copy_(tensor)

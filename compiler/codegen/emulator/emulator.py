"""Runs the device source of a kernel, as nvcc would get it, on the CPU: what a test can know without a GPU.

    kernel = Emulated.build(source, cache_dir)          # source: CudaSource of codegen/cuda.py
    kernel.run({"x": x, "y": y, "n": 5}, grid=(5, 1, 1))

The text of the kernel is compiled by the host's C++ compiler against shim.h, with the PTX in its helpers replaced by
models (ptx.py). It finds wrong indices, lane maps, swizzles, descriptors, phases, missing waits and barriers, reads of
memory that nobody wrote (NaN), and writes outside the tensors. It does not know about speed, caches, or the ordering of
memory between threads that no barrier orders: compute-sanitizer on a GPU does (docs/gpu.md).
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.compiler.codegen.cuda import CudaSource, Parameter
from moec.compiler.codegen.emulator.ptx import replace_assembly
from moec.compiler.errors import CompileError

_HEADERS = tuple(Path(__file__).with_name(name) for name in ("shim.h", "types.h"))
_GUARD_BYTES = 256
_GUARD = 0xFF  # NaN in every float format


class EmulationError(CompileError):
    """A kernel did in emulation what a GPU would not forgive."""


class TensorMap(ctypes.Structure):
    """A matrix, and the box of it that a copy brings, in place of a CUtensorMap. base: address; sizes in elements."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("base", "columns", "rows", "pitch_bytes")),
        *((name, ctypes.c_int32) for name in ("box_columns", "box_rows", "element_bytes")),
    )


@dataclasses.dataclass(frozen=True)
class Emulated:
    """A kernel that runs on the CPU."""

    source: CudaSource
    library: ctypes.CDLL

    @classmethod
    def build(cls, source: CudaSource, cache_dir: Path) -> Emulated:
        """Compiles for the CPU; equal sources are compiled once. Raises: EmulationError: the C++ compiler failed."""
        text = _host_source(source)
        key = hashlib.sha256("".join([text, *(h.read_text() for h in _HEADERS)]).encode()).hexdigest()
        path = cache_dir / key[:2] / f"{key}.emulated.so"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                os.replace(_compile(text, Path(folder), source.name), path)
        return cls(source, ctypes.CDLL(str(path)))

    def run(
        self,
        values: Mapping[str, Tensor | int | float],
        grid: tuple[int, int, int],
        lazy: bool,
        seed: int,
        wave: int = 1,
    ) -> None:
        """Runs the whole grid, `wave` thread blocks together (0: all); tensors change in place.

        lazy: background copies land as late as the program allows, else as early. seed: of the order of threads; an
        even one lets each warp, and each block, run as far as it can before the next.
        Raises: EmulationError: deadlock, an access outside, a launch that does not fit.
        """
        guarded = {name: _Guarded(v) for name, v in values.items() if isinstance(v, Tensor)}
        arguments = [self._argument(p, values, guarded) for p in self.source.parameters]
        pointers = (ctypes.c_void_p * len(arguments))(*[ctypes.addressof(a) for a in arguments])
        launch = self.library.moec_emulate
        launch.restype = ctypes.c_char_p
        if min(grid) < 1:
            raise EmulationError(f"{self.source.name}: grid {grid}, a dimension below 1 is refused by the driver")
        message = launch(
            pointers, (ctypes.c_int * 3)(*grid), self.source.threads, self.source.shared_bytes, int(lazy), seed, wave
        )
        if message:
            raise EmulationError(f"{self.source.name}: {message.decode()}")
        for name, guard in guarded.items():
            guard.give_back(values[name], f"{self.source.name}: {name}")  # type: ignore[arg-type]

    def _argument(
        self, parameter: Parameter, values: Mapping[str, Tensor | int | float], guarded: Mapping[str, _Guarded]
    ) -> Any:
        """The ctypes object that the kernel gets for a parameter."""
        if parameter.box is not None:
            box = parameter.box
            tensor, data = values[box.tensor], guarded[box.tensor].address
            if not isinstance(tensor, Tensor):
                raise EmulationError(f"{self.source.name}: {box.tensor} is not a tensor")
            width = tensor.shape[-1]
            rows = tensor.numel() // width
            size = tensor.element_size()
            return TensorMap(data, width, rows, width * size, box.columns, box.rows, size)
        value = values[parameter.name]
        if isinstance(value, Tensor):
            return ctypes.c_void_p(guarded[parameter.name].address)
        return ctypes.c_float(value) if parameter.kind == "float" else ctypes.c_int(int(value))


class _Guarded:
    """A copy of a tensor between two guards; a write outside is seen, a read outside gives NaN."""

    def __init__(self, tensor: Tensor) -> None:
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise EmulationError("the emulator takes contiguous CPU tensors")
        raw = tensor.reshape(-1).view(torch.uint8)
        self.bytes = torch.full((raw.numel() + 3 * _GUARD_BYTES,), _GUARD, dtype=torch.uint8)
        self.start = _GUARD_BYTES + (-(self.bytes.data_ptr() + _GUARD_BYTES)) % 256
        self.size = raw.numel()
        self.bytes[self.start : self.start + self.size] = raw

    @property
    def address(self) -> int:
        return self.bytes.data_ptr() + self.start

    def give_back(self, tensor: Tensor, what: str) -> None:
        end = self.start + self.size
        for side, guard in (("before", self.bytes[: self.start]), ("past", self.bytes[end:])):
            if (guard != _GUARD).any():
                raise EmulationError(f"{what} was written {side} its {'start' if side == 'before' else 'end'}")
        tensor.reshape(-1).view(torch.uint8).copy_(self.bytes[self.start : end])


def _host_source(source: CudaSource) -> str:
    text = replace_assembly(source.body)
    text = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];", r"\1* \2 = (\1*)emu::now->cta->shared;", text
    )
    slots = iter(range(99))

    def fixed(match: re.Match[str]) -> str:
        place = f"emu::kDynamic + {next(slots)} * emu::kStatic"
        return (
            f"static_assert(sizeof({match[1]}) * ({match[3]}) <= emu::kStatic); "
            f"static_assert({place} < emu::kDynamic + emu::kStatics * emu::kStatic); "
            f"{match[1]}* {match[2]} = ({match[1]}*)(emu::now->cta->shared + {place});"
        )

    text = re.sub(r"__shared__ (?:alignas\(\d+\) )?(\w+) (\w+)\[(\d+)\];", fixed, text)
    casts = ", ".join(f"*({p.c_type}*)a[{i}]" for i, p in enumerate(source.parameters))
    return (
        f'#include "shim.h"\n{text}\nstatic void moec_body(void** a) {{ {source.symbol}({casts}); }}\n'
        'extern "C" const char* moec_emulate(\n'
        "    void** a, const int* grid, int threads, int shared, int lazy, int seed, int wave) {\n"
        "  return emu::launch(moec_body, a, grid, threads, shared, lazy, seed, wave);\n}\n"
    )


def _compile(text: str, folder: Path, name: str) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise EmulationError("no C++ compiler on PATH (looked for c++, g++, clang++); the emulator needs one")
    (folder / "kernel.cc").write_text(text)
    for header in _HEADERS:
        shutil.copyfile(header, folder / header.name)
    flags = [
        "-std=c++17",
        "-O1",
        "-w",
        "-fPIC",
        "-shared",
        "-U_FORTIFY_SOURCE",
        "-fno-strict-aliasing",
        "-ffp-contract=off",
    ]
    result = subprocess.run(
        [compiler, *flags, "kernel.cc", "-o", "kernel.so"], cwd=folder, capture_output=True, text=True
    )
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "error" in line] or ["no message"]
        raise EmulationError(f"{name}: {Path(compiler).name} does not compile its device source: {lines[0]}")
    return folder / "kernel.so"

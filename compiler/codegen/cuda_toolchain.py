"""The compilers that turn CUDA C++ into machine code: nvcc where it is, else NVRTC from the package index.

NVRTC comes with `pip install "moec[cuda]"`: it makes cubins, and needs neither a GPU, a driver nor a toolkit.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.util
import shutil
import subprocess
from pathlib import Path

from moec.compiler.codegen.llvm import ToolchainError

_INSTALL = 'install the CUDA toolkit, or `pip install "moec[cuda]"` for NVRTC; see `moec doctor`'
_DRIVER_STUB = "int cuGetErrorString(int e, const char** s){return e;}\nint cuTensorMapEncodeTiled(void){return 1;}\n"
# cuda.h's type, which NVRTC's own headers lack
_TENSOR_MAP = "struct alignas(64) CUtensorMap { unsigned long long opaque[16]; };\n"


@dataclasses.dataclass(frozen=True)
class Compiler:
    """kind: "nvcc" or "nvrtc". where: the program, or the library. version: part of what decides a cubin's bytes."""

    kind: str
    where: Path
    version: str

    def compile(self, text: str, arch: str, folder: Path, name: str) -> Path:
        """Device text -> cubin in folder. Raises: ToolchainError with the compiler's first error."""
        run = _nvcc_cubin if self.kind == "nvcc" else _nvrtc_cubin
        return run(self, text, arch, folder, name)


def cubin_compiler(prefer: str | None = None) -> Compiler:
    """The compiler that there is, nvcc first; prefer: only that kind. Raises: ToolchainError: none."""
    for kind, find in (("nvcc", _find_nvcc), ("nvrtc", _find_nvrtc)):
        if prefer in (None, kind) and (found := find()):
            return found
    raise ToolchainError(f"no {prefer or 'CUDA compiler'} found (looked for nvcc on PATH and NVRTC): {_INSTALL}")


@functools.cache
def _find_nvcc() -> Compiler | None:
    path = shutil.which("nvcc")
    if path is None:
        return None
    result = subprocess.run([path, "--version"], capture_output=True, text=True)
    return None if result.returncode else Compiler("nvcc", Path(path), "nvcc " + result.stdout.split("release ")[-1])


def package_folder() -> Path | None:
    """Where the CUDA 13 packages of the package index put lib, bin and include."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations if spec else None) or ():
        if (folder := Path(place) / "cu13").is_dir():
            return folder
    return None


@functools.cache
def _find_nvrtc() -> Compiler | None:
    folder = package_folder()
    libraries = sorted((folder / "lib").glob("libnvrtc.so.*")) if folder else []
    if not libraries or not (folder / "include" / "cuda_bf16.h").is_file():  # type: ignore[operator]
        return None
    for helper in (folder / "lib").glob("libnvrtc-builtins.so.*"):  # type: ignore[operator]
        ctypes.CDLL(str(helper))  # NVRTC opens it by name alone, and finds it only where it is open already
    major, minor = ctypes.c_int(), ctypes.c_int()
    ctypes.CDLL(str(libraries[-1])).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return Compiler("nvrtc", libraries[-1], f"nvrtc {major.value}.{minor.value}")


def _gencode(arch: str) -> str:
    return f"-gencode=arch=compute_{arch.removeprefix('sm_')},code={arch}"


def _nvcc_cubin(compiler: Compiler, text: str, arch: str, folder: Path, name: str) -> Path:
    (folder / "kernel.cu").write_text(text)
    command = [str(compiler.where), "-cubin", "-O3", "-std=c++17", _gencode(arch), "kernel.cu", "-o", "kernel.cubin"]
    _run(command, folder, f"kernel {name!r} for {arch}")
    return folder / "kernel.cubin"


def _run(command: list[str], folder: Path, what: str) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        lines = (result.stderr + result.stdout).splitlines()
        first = next((line for line in lines if "error" in line.lower()), "no message")
        raise ToolchainError(f"{Path(command[0]).name} refused {what}: {first.strip()}")


def _nvrtc_cubin(compiler: Compiler, text: str, arch: str, folder: Path, name: str) -> Path:
    library = ctypes.CDLL(str(compiler.where))
    if "CUtensorMap" in text:
        text = _TENSOR_MAP + text
    include = compiler.where.parents[1] / "include"
    options = [f"--gpu-architecture={arch}", "--std=c++17", f"-I{include}", f"-I{include / 'cccl'}", "-default-device"]
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), f"{name}.cu".encode(), 0, None, None)
    try:
        array = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
        if library.nvrtcCompileProgram(program, len(options), array):
            size = ctypes.c_size_t()
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            lines = log.value.decode(errors="replace").splitlines()
            first = next((line for line in lines if "error" in line.lower()), "no message")
            raise ToolchainError(f"NVRTC refused kernel {name!r} for {arch}: {first.strip()}")
        size = ctypes.c_size_t()
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        library.nvrtcGetCUBIN(program, code)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    (folder / "kernel.cubin").write_bytes(code.raw)
    return folder / "kernel.cubin"


def compile_library(text: str, arch: str, folder: Path, name: str) -> Path:
    """Device and host text -> a library for tvm-ffi. Links the CUDA runtime in; libcuda is the machine's own.

    Raises: ToolchainError: no nvcc, or it failed.
    """
    from tvm_ffi import libinfo

    compiler = cubin_compiler("nvcc")
    (folder / "kernel.cu").write_text(text)
    (folder / "driver.c").write_text(_DRIVER_STUB)
    host = shutil.which("cc") or shutil.which("gcc")
    if host is None:
        raise ToolchainError("no C compiler on PATH (looked for cc, gcc): nvcc needs one")
    # libcuda comes with a driver, which a machine without a GPU lacks: a stub of that name satisfies the linker
    _run([host, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "driver.c", "-o", "libcuda.so"], folder, "the stub")
    includes = [f"-I{p}" for p in (libinfo.find_include_path(), libinfo.find_dlpack_include_path())]
    ffi = Path(libinfo.find_libtvm_ffi())
    command = [
        str(compiler.where),
        "-shared",
        "-O3",
        "-std=c++17",
        _gencode(arch),
        "-Xcompiler=-fPIC",
        "-cudart=static",
    ]
    command += [*includes, "kernel.cu", "-o", "kernel.so", f"-L{ffi.parent}", "-ltvm_ffi", "-L.", "-lcuda"]
    _run(command, folder, f"kernel {name!r} for {arch}")
    return folder / "kernel.so"

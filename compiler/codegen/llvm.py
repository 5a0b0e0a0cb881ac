"""Turns TVM functions into one shared library that runs without TVM, and keeps what was built.

How a kernel is made, loaded and called:

    from tvm.script.ir_builder import IRBuilder          # or a function parsed from TVMScript text
    from tvm.tirx.script import builder as T

    def double():                                        # y[i] = 2*x[i] on all threads
        with IRBuilder() as ib, T.prim_func(s_tir=True):
            T.func_name("double")                        # any name; the library exports the key used below
            T.func_attr({"tirx.noalias": True})
            x, y, n = T.arg("x", T.handle()), T.arg("y", T.handle()), T.int64()
            X = T.match_buffer(x, (n,), "float32", align=4)     # align: without it 64 is ASSUMED and never checked
            Y = T.match_buffer(y, (n,), "float32", align=4)
            with T.parallel(n) as i:
                T.buffer_store(Y, X[i] * T.float32(2), [i])
        return ib.get()

    built = build_library({"moec_double": double()}, level="avx2", cache_dir=default_cache_dir())
    library = moec.runtime.launch.cpu.load_library(built.path, built.level)
    library["moec_double"](x, y)                         # torch CPU tensors; TVM's code checks shapes and dtypes

What a kernel may rely on:
  * `T.parallel` runs on torch's OpenMP threads, in chunks that the threads fetch as they get free.
  * `T.call_extern("int32", "moec_num_threads")` is the size of that pool.
  * LLVM-IR text given as a `pragma_import_llvm` attribute is inlined (see kernels/template/intrinsics_text.py).
  * bf16 tensors: load, store and widen by the template's intrinsics. TVM rewrites bf16 arithmetic, and its rewriting
    refuses the processor's own bf16 instructions.
Errors in the IR surface as TVM's own exceptions: they are bugs of a kernel template, not of the user's model.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moec.compiler.errors import CompileError

_SHIM = Path(__file__).with_name("shim.c")

# avx512_bf16 and amx_bf16 share a base processor: AMX machines behind a hypervisor may hide what newer models imply.
_TARGETS: dict[str, dict[str, Any]] = {
    "avx2": {"kind": "llvm", "mcpu": "haswell"},
    "avx512f": {"kind": "llvm", "mcpu": "skylake-avx512"},
    "avx512_bf16": {"kind": "llvm", "mcpu": "cooperlake"},
    "amx_bf16": {
        "kind": "llvm",
        "mcpu": "cooperlake",
        "mattr": ["+amx-tile", "+amx-bf16", "+amx-int8", "+gfni", "+avx512vbmi"],
    },
}


class ToolchainError(CompileError):
    """No C compiler, or it failed."""


@dataclasses.dataclass(frozen=True)
class BuiltLibrary:
    """A library in the cache. key: sha256 of all that it was made from; reused: it was there already."""

    path: Path
    level: str
    key: str
    reused: bool


def default_cache_dir() -> Path:
    """Where built libraries are kept when nothing else is asked for."""
    return Path.home() / ".cache" / "moec" / "kernels"


def build_library(functions: Mapping[str, Any], level: str, cache_dir: Path) -> BuiltLibrary:
    """Compiles functions (exported name -> tirx.PrimFunc) for an instruction-set level into one .so.

    The result depends on the functions, the level, the shim and the tool versions alone, so an equal request is
    answered from cache_dir. The file appears by one rename: a build that is cut off leaves nothing to load.

    Raises: CompileError: unknown level or no function. ToolchainError: no C compiler, or it failed.
    """
    if level not in _TARGETS:
        raise CompileError(f"CPU level {level!r} is unknown, expected one of {', '.join(_TARGETS)}; see `moec doctor`")
    if not functions:
        raise CompileError("a kernel library needs at least one function")
    import tvm

    module = tvm.IRModule({name: f.with_attr("global_symbol", name) for name, f in sorted(functions.items())})
    key = _content_key(module, level)
    path = cache_dir / key[:2] / f"{key}.so"
    if path.is_file():
        return BuiltLibrary(path, level, key, reused=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as temp:
        built = _compile_and_link(module, level, Path(temp))
        os.replace(built, path)
    return BuiltLibrary(path, level, key, reused=False)


def _content_key(module: Any, level: str) -> str:
    """sha256 over the functions' text and everything else that decides the library's bytes."""
    import tvm
    import tvm_ffi

    # show_meta keeps constants that the plain text leaves out
    parts = [module.script(show_meta=True), repr(_TARGETS[level]), _SHIM.read_text(), tvm.__version__]
    parts += [tvm_ffi.__version__, _compiler_version(), repr((_C_FLAGS, _DISABLED_PASSES))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


# Shrinking allocated buffers is of no use to templates, which size their own, and took 9 of 11 seconds per kernel.
_DISABLED_PASSES = ["s_tir.CompactBufferAllocation"]
_C_FLAGS = ("-shared", "-fPIC", "-O2", "-fvisibility=hidden", "-Wl,-Bsymbolic", "-Wl,--build-id=none", "-s")


def _compile_and_link(module: Any, level: str, folder: Path) -> Path:
    import tvm
    from tvm_ffi import libinfo

    target = tvm.target.Target(dict(_TARGETS[level]))
    with tvm.transform.PassContext(disabled_pass=_DISABLED_PASSES):
        built = tvm.tirx.build(module, target=target)
    built.write_to_file(str(folder / "kernels.o"), "o")
    includes = [f"-I{p}" for p in (libinfo.find_include_path(), libinfo.find_dlpack_include_path())]
    # fixed relative names: paths of a temporary folder must not reach the library's bytes
    shutil.copyfile(_SHIM, folder / "shim.c")
    command = [_c_compiler(), *_C_FLAGS, *includes, "-o", "kernels.so", "kernels.o", "shim.c", "-ldl"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise ToolchainError(f"{command[0]} could not link a kernel library: {reason}; see `moec doctor`")
    return folder / "kernels.so"


@functools.cache
def _c_compiler() -> str:
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return found
    raise ToolchainError("no C compiler on PATH (looked for cc, gcc, clang); install one, see `moec doctor`")


@functools.cache
def _compiler_version() -> str:
    result = subprocess.run([_c_compiler(), "--version"], capture_output=True, text=True)
    return (result.stdout.splitlines() or [""])[0]

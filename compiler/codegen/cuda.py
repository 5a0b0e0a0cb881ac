"""Turns TIRx functions into CUDA source, and that into cubins and libraries, on a machine without a GPU.

    source = lower("gate", build(..), "sm_90a")            # PrimFunc -> CUDA text, parameters, launch shape
    cubins = build_cubins([source, ..], default_cache_dir())
    library = build_library(source, default_cache_dir())   # .so with a host launcher; needs nvcc

A cubin needs libcuda alone and says nothing of how it is launched: CudaSource.launch() does, as plain JSON values. A
library checks its arguments itself (shapes, dtypes, device) and is loaded with tvm_ffi.load_module.
Errors in the IR surface as TVM's own exceptions: they are bugs of a kernel template, not of the user's model.
"""

from __future__ import annotations

import ast
import concurrent.futures
import dataclasses
import hashlib
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moec.compiler.codegen.cuda_archs import Architecture, architecture
from moec.compiler.codegen.cuda_toolchain import Compiler, compile_library, cubin_compiler
from moec.compiler.errors import CompileError
from moec.runtime.expressions import evaluate


class SharedMemoryError(CompileError):
    """A kernel asks for more shared memory than a block of the architecture may have."""


@dataclasses.dataclass(frozen=True)
class TensorBox:
    """A tensor map: rows x columns of `tensor` (its last axis against all others) that one TMA load brings."""

    tensor: str
    columns: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a device function. kind: "pointer", "int", "float" or "map"; box: of a map."""

    name: str
    c_type: str
    kind: str
    box: TensorBox | None = None


@dataclasses.dataclass(frozen=True)
class CudaSource:
    """A kernel in CUDA C++.

    text: device code.  host_text: device code and a launcher for tvm-ffi.  symbol: of the device function.
    grid: three expressions over the integer parameters.  shared_bytes: dynamic shared memory of a launch.
    cooperative: its blocks wait for each other, so all must be resident (cuLaunchCooperativeKernel); blocks_per_sm: how
    many it is launched with on each multiprocessor then.
    """

    name: str
    arch: str
    text: str
    host_text: str
    symbol: str
    parameters: tuple[Parameter, ...]
    grid: tuple[str, str, str]
    threads: int
    shared_bytes: int
    cooperative: bool = False
    blocks_per_sm: int = 1

    def needed(self) -> frozenset[str]:
        """What a launch is given by name: the parameters, and the tensors that maps are made of."""
        return frozenset(p.box.tensor if p.box else p.name for p in self.parameters)

    @property
    def body(self) -> str:
        """The device text without TVM's prelude of includes and macros."""
        mark = "#define ushort unsigned short\n#endif\n"
        return self.text[self.text.index(mark) + len(mark) :]

    def grid_of(self, values: Mapping[str, Any]) -> tuple[int, int, int]:
        """The launch grid for values of the integer parameters."""
        integers = {p.name: int(values[p.name]) for p in self.parameters if p.kind == "int"}
        x, y, z = (evaluate(e, integers) for e in self.grid)
        return x, y, z

    def launch(self) -> dict[str, Any]:
        """How to launch the cubin, as JSON values."""
        parameters = [
            {"name": p.name, "kind": p.kind} | ({"box": dataclasses.asdict(p.box)} if p.box else {})
            for p in self.parameters
        ]
        plain = {"symbol": self.symbol, "arch": self.arch, "threads": self.threads, "shared_bytes": self.shared_bytes}
        plain |= {"cooperative": True, "blocks_per_sm": self.blocks_per_sm} if self.cooperative else {}
        return plain | {"grid": list(self.grid), "parameters": parameters}


@dataclasses.dataclass(frozen=True)
class BuiltCubin:
    """A cubin in the cache. key: sha256 of all that it was made from; reused: it was there already."""

    source: CudaSource
    path: Path
    key: str
    reused: bool


def lower(name: str, function: Any, arch: str, boxes: Mapping[str, TensorBox] | None = None) -> CudaSource:
    """TIRx function -> CUDA source. boxes: the tensor maps of the function, by parameter name.

    Raises: ArchitectureError: unknown arch. SharedMemoryError: it does not fit a block.
    """
    import tvm

    target = architecture(arch)
    module = tvm.IRModule({name: function.with_attr("global_symbol", name)})
    with tvm.transform.PassContext(disabled_pass=_DISABLED_PASSES):
        built = tvm.compile(module, target=_tvm_target(target), tir_pipeline="tirx").mod
    text = "\n".join(i.inspect_source("cuda") for i in built.imports)
    host_text = tvm.backend.cuda.export_cuda_host(built)
    symbol, parameters, threads = _signature(text, boxes or {})
    shared_bytes = _shared_bytes(host_text)
    if shared_bytes > target.block_shared_bytes:
        raise SharedMemoryError(
            f"kernel {name!r} needs {shared_bytes} bytes of shared memory, a block on {arch} has "
            f"{target.block_shared_bytes}; choose a smaller tile or fewer stages"
        )
    return CudaSource(name, arch, text, host_text, symbol, parameters, _grid(host_text), threads, shared_bytes)


# it would make parameters of the kernel out of what the launcher can compute before; nvcc finds them anyway
_DISABLED_PASSES = ["tirx.CommonSubexprElim"]


def build_cubins(sources: Sequence[CudaSource], cache_dir: Path, workers: int = 2) -> list[BuiltCubin]:
    """Compiles sources side by side; equal requests are answered from cache_dir.

    A worker takes up to 2 GiB. Raises: ToolchainError: no compiler, or it refused a source (the first in order).
    """
    compiler = cubin_compiler()
    with concurrent.futures.ThreadPoolExecutor(max_workers=workers) as pool:
        return list(pool.map(lambda s: _build_cubin(s, compiler, cache_dir), sources))


def build_library(source: CudaSource, cache_dir: Path) -> Path:
    """One kernel and its launcher as a tvm-ffi library. Raises: ToolchainError: no nvcc, or it failed."""
    key = hashlib.sha256(f"{source.arch}\0{source.host_text}".encode()).hexdigest()
    path = cache_dir / key[:2] / f"{key}.cuda.so"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
            os.replace(compile_library(source.host_text, source.arch, Path(folder), source.name), path)
    return path


def _build_cubin(source: CudaSource, compiler: Compiler, cache_dir: Path) -> BuiltCubin:
    key = hashlib.sha256("\0".join((source.text, source.arch, compiler.version)).encode()).hexdigest()
    path = cache_dir / key[:2] / f"{key}.cubin"
    if path.is_file():
        return BuiltCubin(source, path, key, reused=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        os.replace(compiler.compile(source.text, source.arch, Path(folder), source.name), path)
    return BuiltCubin(source, path, key, reused=False)


def _tvm_target(arch: Architecture) -> Any:
    from tvm.target import Target

    limits = {"max_shared_memory_per_block": 1 << 20, "max_threads_per_block": 1024, "thread_warp_size": 32}
    return Target({"kind": "cuda", "arch": arch.name, **limits}, host={"kind": "cuda_host"})


_PARAMETER = re.compile(r"(const __grid_constant__ CUtensorMap|[\w ]+?\*? ?(?:__restrict__)?) (\w+)$")


def _signature(text: str, boxes: Mapping[str, TensorBox]) -> tuple[str, tuple[Parameter, ...], int]:
    """The device function's symbol, parameters and threads, from its definition."""
    found = re.search(r'extern "C" __global__ void __launch_bounds__\((\d+)\) (\w+)\(([^)]*)\) \{', text)
    if found is None:
        raise CompileError("TVM gave no device function; a kernel needs T.device_entry()")
    parameters = []
    for declared in found[3].split(", "):
        match = _PARAMETER.match(declared)
        if match is None:
            raise CompileError(f"a device parameter that is not understood: {declared!r}")
        c_type, name = match[1].replace("__restrict__", "").strip(), match[2]
        if "CUtensorMap" in c_type:
            parameters.append(Parameter(name, "CUtensorMap", "map", boxes[name]))
        elif "*" in c_type:
            parameters.append(Parameter(name.removesuffix("_ptr"), c_type, "pointer"))
        else:
            parameters.append(Parameter(name, c_type, "float" if c_type == "float" else "int"))
    return found[2], tuple(parameters), int(found[1])


def _shared_bytes(host_text: str) -> int:
    value = _assigned(host_text, re.search(r"cuda_config\.dynamicSmemBytes = (\w+);", host_text)[1])  # type: ignore[index]
    return int(re.sub(r"\(int64_t\)", "", value))


def _grid(host_text: str) -> tuple[str, str, str]:
    """The grid's three expressions in Python's syntax, from the launcher."""
    dims = re.search(r"cuda_config\.gridDim = dim3\((\w+), (\w+), (\w+)\);", host_text)
    assert dims is not None  # every launcher of TVM's has it
    x, y, z = (_python(_assigned(host_text, d)) for d in dims.groups())
    return x, y, z


def _assigned(host_text: str, name: str) -> str:
    """The expression behind a local of the launcher; a number stands for itself."""
    while not name.isdigit():
        found = re.search(rf"(?:auto|size_t) {name} = (?:static_cast<size_t>\()?(.+?)\)?;\n", host_text)
        if found is None:
            return name
        name = found[1] if found[1].count("(") == found[1].count(")") else found[1] + ")"
        if not re.fullmatch(r"cuda_\w+", name):
            return name
    return name


class _Floor(ast.NodeTransformer):
    """x >> k and x / y of whole numbers as floor division, for runtime/expressions.py."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.op, ast.RShift) and isinstance(node.right, ast.Constant):
            return ast.BinOp(node.left, ast.FloorDiv(), ast.Constant(1 << int(node.right.value)))  # type: ignore[arg-type]
        return ast.BinOp(node.left, ast.FloorDiv(), node.right) if isinstance(node.op, ast.Div) else node


def _python(c_expression: str) -> str:
    plain = re.sub(r"\((?:int|int32_t|int64_t)\)", "", c_expression)
    return ast.unparse(_Floor().visit(ast.parse(plain, mode="eval")))

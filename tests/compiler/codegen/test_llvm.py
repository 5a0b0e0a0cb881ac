"""compiler/codegen/llvm.py: build, cache, load, call."""

import hashlib
import subprocess
import sys

import pytest
import torch

from moec.compiler.codegen import llvm
from moec.compiler.errors import CompileError
from moec.runtime.errors import EngineError
from moec.runtime.launch import cpu
from moec.runtime.launch.cpu_features import LEVELS, best_level

pytestmark = pytest.mark.cpu


def _scale(factor: float):
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("scale")
        T.func_attr({"tirx.noalias": True})
        x, y, n = T.arg("x", T.handle()), T.arg("y", T.handle()), T.int64()
        source = T.match_buffer(x, (n,), "float32", align=4)
        target = T.match_buffer(y, (n,), "float32", align=4)
        with T.parallel(n) as i:
            T.buffer_store(target, source[i] * T.float32(factor), [i])
    return ib.get()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return llvm.build_library({"scale": _scale(2.0)}, "avx2", tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("n", [0, 1, 5, 4097])
def test_runs_on_torch_threads(built, n, num_threads):
    library = cpu.load_library(built.path, built.level)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert library["moec_num_threads"]() == num_threads
        x, y = torch.randn(n + 1)[1:], torch.zeros(n)  # x starts 4 bytes off any wider alignment
        library["scale"](x, y)
        assert torch.equal(y, 2 * x)
    finally:
        torch.set_num_threads(before)


def test_same_functions_are_built_once(built):
    again = llvm.build_library({"scale": _scale(2.0)}, "avx2", built.path.parents[1])
    assert again.reused and again.path == built.path
    other = llvm.build_library({"scale": _scale(3.0)}, "avx2", built.path.parents[1])
    assert not other.reused and other.key != built.key


def test_same_functions_give_the_same_bytes(built, tmp_path):
    again = llvm.build_library({"scale": _scale(2.0)}, "avx2", tmp_path)
    assert not again.reused
    digests = [hashlib.sha256(b.path.read_bytes()).hexdigest() for b in (built, again)]
    assert digests[0] == digests[1]


def test_runs_where_tvm_cannot_be_imported(built):
    code = f"""
import sys
sys.modules["tvm"] = None; sys.modules["transformers"] = None
import torch
from pathlib import Path
from moec.runtime.launch.cpu import load_library
x, y = torch.ones(9), torch.zeros(9)
load_library(Path({str(built.path)!r}), "avx2")["scale"](x, y)
assert y.tolist() == [2.0] * 9, y
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_bad_requests(built, tmp_path):
    with pytest.raises(CompileError, match="'mmx' is unknown, expected one of avx2"):
        llvm.build_library({"scale": _scale(2.0)}, "mmx", tmp_path)
    with pytest.raises(CompileError, match="at least one function"):
        llvm.build_library({}, "avx2", tmp_path)
    with pytest.raises(EngineError, match="no such kernel library"):
        cpu.load_library(tmp_path / "absent.so", "avx2")
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not an ELF file")
    with pytest.raises(EngineError, match="not a kernel library"):
        cpu.load_library(broken, "avx2")
    assert [p.name for p in tmp_path.iterdir()] == ["broken.so"]


def test_no_compiler_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    llvm._c_compiler.cache_clear()
    llvm._compiler_version.cache_clear()
    try:
        with pytest.raises(llvm.ToolchainError, match=r"no C compiler on PATH .*; install one"):
            llvm.build_library({"scale": _scale(7.0)}, "avx2", tmp_path)
    finally:
        llvm._c_compiler.cache_clear()


def test_wrong_dtype_raises(built):
    with pytest.raises(TypeError, match="dtype"):
        cpu.load_library(built.path, built.level)["scale"](torch.ones(3, dtype=torch.float64), torch.ones(3))


def test_refuses_a_processor_without_the_features(built, monkeypatch):
    monkeypatch.setattr(cpu, "missing_features", lambda level: ["amx_tile"])
    with pytest.raises(cpu.UnsupportedProcessor, match="lacks amx_tile; recompile on this machine"):
        cpu.load_library(built.path, "amx_bf16")


def test_levels_agree():
    assert list(llvm._TARGETS) == list(LEVELS)
    assert best_level() in (None, *LEVELS)

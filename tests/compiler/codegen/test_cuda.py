"""CUDA code generation without a GPU: what is launched and how, the cache, the compilers, and what they refuse."""

import dataclasses
import hashlib

import pytest
from tvm.tirx.script import builder as T

from moec.compiler.codegen import cuda_toolchain
from moec.compiler.codegen.cubin import cubin_facts, find_disassembler, instructions
from moec.compiler.codegen.cuda import SharedMemoryError, build_cubins, lower
from moec.compiler.codegen.cuda_archs import ArchitectureError, architecture
from moec.compiler.codegen.cuda_toolchain import cubin_compiler
from moec.compiler.codegen.llvm import ToolchainError
from moec.compiler.kernels.cuda import gemm_wgmma, rms_norm
from moec.compiler.kernels.cuda.emit import define, size, tensor
from moec.compiler.kernels.cuda.gemm_problem import GemmProblem
from moec.compiler.kernels.cuda.gemm_wgmma import WgmmaTile
from moec.compiler.kernels.norm.row import NormProblem

pytestmark = pytest.mark.null


def scaled(shared_bytes=0):
    def body():
        n, factor = size("n"), T.arg("factor", T.float32())
        y = tensor("y", (n, 256), "float32")
        T.device_entry()
        row, thread = T.cta_id([T.ceildiv(n, 3)]), T.thread_id([64])
        if shared_bytes:
            shared = T.alloc_buffer((shared_bytes,), "uint8", scope="shared.dyn", align=16)
            T.buffer_store(shared, T.uint8(1), [thread])
        T.buffer_store(y, factor, [row, thread])

    return define(body)


def compiler_or_skip(kind):
    try:
        return cubin_compiler(kind)
    except ToolchainError as error:
        pytest.skip(str(error))


def test_a_source_says_how_it_is_launched():
    source = lower("scaled", scaled(4096), "sm_90a")
    assert (source.threads, source.shared_bytes, source.grid_of({"n": 7})) == (64, 4096, (3, 1, 1))
    assert [(p.name, p.kind) for p in source.parameters] == [("y", "pointer"), ("factor", "float"), ("n", "int")]
    assert [source.grid_of({"n": n})[0] for n in (1, 3, 4, 2**20)] == [1, 1, 2, 349526]
    assert source.launch()["grid"][1:] == ["1", "1"]


def test_tensor_maps_name_their_tensor():
    problem, tile = GemmProblem("down", 256, 256, 4, 2), WgmmaTile(64, 2)
    launch = lower("down", gemm_wgmma.build(problem, tile), "sm_90a", tile.boxes(problem)).launch()
    boxes = {p["name"]: p["box"] for p in launch["parameters"] if p["kind"] == "map"}
    assert boxes["x_map"] == {"tensor": "x", "columns": 64, "rows": 128}
    assert boxes["w_map"] == {"tensor": "w", "columns": 64, "rows": 64}


def test_bad_requests_are_one_clear_line(monkeypatch, tmp_path):
    with pytest.raises(ArchitectureError, match="GPU architecture 'sm_75' is not supported, expected one of sm_80, "):
        lower("scaled", scaled(), "sm_75")
    with pytest.raises(SharedMemoryError, match=r"kernel 'scaled' needs 120000 bytes .* a block on sm_89 has 101376;"):
        lower("scaled", scaled(120000), "sm_89")
    source = lower("scaled", scaled(), "sm_80")
    compiler_or_skip(None)
    with pytest.raises(ToolchainError, match=r"kernel 'scaled' for sm_80: .*error"):
        build_cubins([dataclasses.replace(source, text=source.text + "not C++")], tmp_path)
    assert not list(tmp_path.rglob("*.cubin"))
    monkeypatch.setattr(cuda_toolchain, "_find_nvcc", lambda: None)
    monkeypatch.setattr(cuda_toolchain, "_find_nvrtc", lambda: None)
    with pytest.raises(ToolchainError, match=r"no CUDA compiler found .*: install the CUDA toolkit, or `pip install"):
        build_cubins([source], tmp_path)


@pytest.mark.parametrize("kind", ["nvcc", "nvrtc"])
def test_both_compilers_make_every_architecture(kind, tmp_path):
    compiler = compiler_or_skip(kind)
    problem = NormProblem(512)
    for arch in ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a"):
        source = lower("norm", rms_norm.build(problem), arch)
        facts = cubin_facts(compiler.compile(source.text, arch, tmp_path, "norm"))
        assert 0 < facts.registers <= 64 and facts.stack_bytes == 0


@pytest.mark.parametrize("kind", ["nvcc", "nvrtc"])
def test_both_compilers_make_wgmma_with_tensor_maps(kind, tmp_path):
    compiler = compiler_or_skip(kind)
    problem, tile = GemmProblem("gate_up", 512, 256, 4, 2), WgmmaTile(128, 4)
    source = lower("gate_up", gemm_wgmma.build(problem, tile), "sm_90a", tile.boxes(problem))
    path = compiler.compile(source.text, "sm_90a", tmp_path, "gate_up")
    assert cubin_facts(path).stack_bytes == 0
    if find_disassembler() is None:
        pytest.skip("no nvdisasm to look for HGMMA with")
    counts = instructions(path)
    assert counts["HGMMA"] >= 8 and counts["UTMALDG"] > 0


def test_equal_requests_are_built_once(tmp_path):
    compiler_or_skip(None)
    source = lower("scaled", scaled(), "sm_80")
    first, second = (build_cubins([source], tmp_path)[0] for _ in range(2))
    assert not first.reused and second.reused and first.path == second.path
    other = build_cubins([lower("scaled", scaled(), "sm_89")], tmp_path)[0]
    assert not other.reused and other.key != first.key


def test_the_same_source_gives_the_same_bytes(tmp_path):
    compiler_or_skip(None)
    source = lower("scaled", scaled(), "sm_90a")
    built = [build_cubins([source], tmp_path / name)[0] for name in ("a", "b")]
    assert len({hashlib.sha256(b.path.read_bytes()).hexdigest() for b in built}) == 1


def test_what_is_no_cubin_is_refused(tmp_path):
    (tmp_path / "x.cubin").write_bytes(b"text")
    with pytest.raises(ToolchainError, match="not a cubin"):
        cubin_facts(tmp_path / "x.cubin")


def test_how_many_blocks_fit():
    hopper = architecture("sm_90a")
    assert hopper.blocks_per_sm(384, 168, 196672) == 1
    assert hopper.blocks_per_sm(128, 64, 1024) == 8  # 4 warps of 64 registers: 8192 of 65536
    assert architecture("sm_89").blocks_per_sm(128, 32, 0) == 12  # 1536 threads

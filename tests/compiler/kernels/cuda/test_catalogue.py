"""What holds for every CUDA kernel: what it takes and refuses, that it compiles, and what its machine code is like."""

import pytest
import torch

import moec.passes.ir.ops  # noqa: F401 - registers the ops
from moec.compiler.codegen.cuda import build_cubins
from moec.compiler.codegen.cuda_archs import ARCHITECTURES
from moec.compiler.codegen.cuda_toolchain import cubin_compiler
from moec.compiler.codegen.llvm import ToolchainError
from moec.compiler.kernels.attention.problem import AttentionProblem
from moec.compiler.kernels.cuda.catalogue import SPECS
from moec.compiler.kernels.cuda.combine import CombineProblem
from moec.compiler.kernels.cuda.combine_fast import FinishProblem
from moec.compiler.kernels.cuda.dispatch import DispatchProblem
from moec.compiler.kernels.cuda.gemm_problem import GemmProblem
from moec.compiler.kernels.cuda.moe_decode import DecodeProblem
from moec.compiler.kernels.cuda.rope import RopeProblem
from moec.compiler.kernels.cuda.rows import RowsProblem
from moec.compiler.kernels.cuda.split_activation import SplitActivationProblem
from moec.compiler.kernels.gate.problem import GateProblem
from moec.compiler.kernels.norm.row import NormProblem
from moec.passes.ir.gate import GateSpec

pytestmark = pytest.mark.null

# layers of 64 experts, 6 of them and 2 shared ones for each token
GATE, ROUTER = (GateProblem(GateSpec(6).encode(), 64, hidden=h) for h in (0, 2048))


def up(**changes):
    return GemmProblem("gate_up", 2048, 1408, 66, 8, **changes)


def down(**changes):
    return GemmProblem("down", 1408, 2048, 66, 8, **changes)


INT4, INT8 = {"code_bits": 4, "group": 64}, {"code_bits": 8}
PART = GemmProblem("gate_up_part", 2048, 2816, 66, 8, **INT4)
REDUCED = down(reduce=True, num_shared=2, has_shared_weight=True)
PROBLEMS = {
    "cuda-gate": (GATE,),
    "cuda-gate-linear": (ROUTER, GateProblem(GateSpec(8).encode(), 256, hidden=7168, weight_dtype="float32")),
    "cuda-dispatch": (DispatchProblem(64, 6, 2),),
    "cuda-rows": (
        RowsProblem(2048, 8, weighted=True, num_shared=2),
        RowsProblem(2048, quantise=True, block=128),
        RowsProblem(14336, quantise=True, dtype="int8"),
    ),
    "cuda-gemm-few": (up(**INT4), down(**INT8), PART, REDUCED, up(in_slot_order=True)),
    "cuda-gemm-many": (up(**INT4), down(**INT8, part_dtype="bfloat16"), REDUCED),
    "cuda-split-activation": (SplitActivationProblem(1408, 4, "swigluoai@7.0@1.702", 66, has_bias=True),),
    "cuda-combine": (
        CombineProblem(2048, 64, 6, 2, 4, has_shared_weight=True),
        CombineProblem(2048, 64, 6, weighted=False),
    ),
    "cuda-combine-atomic": (FinishProblem(2048),),
    "cuda-moe-decode": (
        DecodeProblem(ROUTER, up(), down(), 2),
        DecodeProblem(ROUTER, up(**INT4, has_bias=True), down(**INT4, has_bias=True), 2, has_shared_weight=True),
    ),
    "cuda-rms-norm": (NormProblem(2048),),
    "cuda-add-rms-norm": (NormProblem(7168, cast="after_weight"),),
    "cuda-rope": (RopeProblem(32, 128, 128),),
    "cuda-attention": (
        AttentionProblem(32, 8, 128, 128),
        AttentionProblem(64, 8, 64, 64, sinks_dtype="float32"),
        AttentionProblem(16, 8, 256, 256, softcap=True),
        AttentionProblem(16, 16, 192, 128),
    ),
    "torch-attention": (AttentionProblem(32, 8, 128, 128),),
}
ALL = [pytest.param(s, p, id=f"{s.name}-{i}") for s in SPECS for i, p in enumerate(PROBLEMS[s.name])]


def test_names_are_unique_and_ops_exist():
    assert len({spec.name for spec in SPECS}) == len(SPECS) == len(PROBLEMS)
    for spec in SPECS:
        library, op = spec.op.split("::")
        assert hasattr(getattr(torch.ops, library), op), spec.op


@pytest.mark.parametrize("spec", SPECS, ids=[s.name for s in SPECS])
def test_a_kernel_becomes_cuda_or_is_the_librarys(spec):
    """The text alone; compilers are asked below."""
    arch, problem = ARCHITECTURES["sm_80"], PROBLEMS[spec.name][0]
    assert spec.supports(problem, arch) is None
    made = spec.kernels(problem, arch)
    assert bool(made) != bool(spec.library)
    if spec.library:
        _, *path, name = spec.library.split(".")
        module = torch
        for part in path:
            module = getattr(module, part)
        assert callable(getattr(module, name))
    launches = [k.source().launch() for k in made.values()]
    assert all(launch["threads"] % 32 == 0 and launch["parameters"] for launch in launches)
    assert [launch.get("cooperative", False) for launch in launches] == [k.cooperative for k in made.values()]


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    try:
        cubin_compiler()
    except ToolchainError as error:
        pytest.skip(str(error))
    return tmp_path_factory.mktemp("cubins")


def faults(spec, problem, arch, cache_dir):
    assert spec.supports(problem, ARCHITECTURES[arch]) is None
    made = list(spec.kernels(problem, ARCHITECTURES[arch]).values())
    built = build_cubins([k.source() for k in made], cache_dir)
    return [fault for kernel, cubin in zip(made, built, strict=True) for fault in kernel.faults(cubin)]


@pytest.mark.parametrize(("name", "arch"), [("cuda-moe-decode", "sm_90a")])
def test_a_representative_kernel(cache_dir, name, arch):
    spec = next(s for s in SPECS if s.name == name)
    assert faults(spec, PROBLEMS[name][-1], arch, cache_dir) == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("spec", "problem"), ALL)
def test_every_kernel(cache_dir, spec, problem, arch):
    if problem == PROBLEMS["cuda-rows"][1] and arch == "sm_80":
        assert "rounds to e4m3" in spec.supports(problem, ARCHITECTURES[arch])
        return
    assert faults(spec, problem, arch, cache_dir) == []


def test_refusals_name_the_reason():
    specs = {s.name: s for s in SPECS}
    for name, problem, arch, reason in (
        ("cuda-gemm-few", up(dtype="float8_e4m3fn"), "sm_80", "no tile does gate_up of 2048 x 1408: sm_80 has no mma"),
        ("cuda-rows", RowsProblem(2048, 0, True), "sm_80", "sm_80 has no instruction that rounds to e4m3"),
        ("cuda-gemm-many", up(code_bits=5), "sm_80", "codes of 5 bits in groups of 0; 4 or 8"),
        ("cuda-moe-decode", DecodeProblem(GATE, up(), down(), 2), "sm_80", "rows of 0, not a multiple of 8"),
        ("cuda-attention", AttentionProblem(40, 2, 64, 64), "sm_80", "20 query heads for one kv head, at most 16"),
    ):
        assert str(specs[name].supports(problem, ARCHITECTURES[arch])).startswith(reason)

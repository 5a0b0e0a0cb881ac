"""The kernels of whole layers: they compile, without spills, with the right instructions, at the stated occupancy."""

import dataclasses

import pytest

from moec.compiler.codegen.cuda import build_cubins
from moec.compiler.codegen.cuda_archs import ARCHITECTURES
from moec.compiler.codegen.cuda_toolchain import cubin_compiler
from moec.compiler.codegen.llvm import ToolchainError
from moec.compiler.kernels.cuda import gemm_mma
from moec.compiler.kernels.cuda.gemm_problem import GemmProblem, Tile
from moec.compiler.kernels.cuda.kernel import CudaKernel
from moec.compiler.kernels.cuda.layer import LayerError, layer_kernels
from moec.compiler.kernels.cuda.shapes import SHAPES

pytestmark = pytest.mark.null
NO_E4M3 = ("sm_80", "sm_100a")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    try:
        cubin_compiler()
    except ToolchainError as error:
        pytest.skip(str(error))
    return tmp_path_factory.mktemp("cubins")


def faults(shape, arch, size, cache_dir, names=None):
    made = [k for name, k in layer_kernels(SHAPES[shape], arch, size).kernels.items() if names is None or name in names]
    built = build_cubins([k.source() for k in made], cache_dir)
    return [fault for kernel, cubin in zip(made, built, strict=True) for fault in kernel.faults(cubin)]


REPRESENTATIVE = [
    ("deepseek-moe-16b", "sm_80", "large", ("gate_up",)),
    ("mixtral-8x7b-fp8", "sm_89", "small", ("gate_up", "quantise_h")),
    ("mixtral-8x7b", "sm_90a", "large", None),
    ("mixtral-8x7b-fp8", "sm_90a", "large", ("down",)),
    ("qwen3-30b-a3b", "sm_100a", "large", ("gate_up",)),
    ("skywork-moe", "sm_120a", "small", ("down",)),
    ("mixtral-8x7b-int4", "sm_89", "small", ("gate_up",)),
]


@pytest.mark.parametrize(("shape", "arch", "size", "names"), REPRESENTATIVE)
def test_a_representative_layer(cache_dir, shape, arch, size, names):
    assert faults(shape, arch, size, cache_dir, names) == []


@pytest.mark.slow
@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_layer(cache_dir, shape, arch, size):
    if SHAPES[shape].dtype == "float8_e4m3fn" and arch in NO_E4M3:
        with pytest.raises(LayerError, match=f"{arch} has no mma.sync for e4m3"):
            layer_kernels(SHAPES[shape], arch, size)
    else:
        assert faults(shape, arch, size, cache_dir) == []


def test_the_check_of_machine_code_bites(cache_dir):
    """256 accumulators for each of 128 threads do not fit 255 registers."""
    problem, tile = GemmProblem("down", 512, 512, 4, 2), Tile(128, 256, 2, 2, 2)
    kernel = CudaKernel("down", "sm_80", lambda: gemm_mma.build(problem, tile), tensor="HGMMA", blocks_per_sm=3)
    found = " | ".join(kernel.faults(build_cubins([kernel.source()], cache_dir)[0]))
    assert "bytes of each thread's registers lie in local memory" in found
    assert "blocks fit on a multiprocessor, expected 3 (255 registers" in found
    if "machine code" in found:  # where there is an nvdisasm
        assert "no HGMMA in its machine code" in found and "accesses to local memory" in found


def test_a_shape_that_no_tile_does_is_refused():
    shape = dataclasses.replace(SHAPES["deepseek-moe-16b"], inner=1400)
    with pytest.raises(LayerError, match="no wgmma tile does gate_up of 2048 x 1400: 1400 columns, not"):
        layer_kernels(shape, "sm_90a", "large")

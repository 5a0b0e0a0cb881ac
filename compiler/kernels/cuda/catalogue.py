"""Every CUDA kernel there is, by op: what it takes on which architecture, and how it is made. Library ones included.

A spec's kernels are the launches of one way of doing an op, in order where there are several. What a kernel is called
with, and on what its spec relies, its module says. To add a kernel, write its module and list it here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from moec.compiler.codegen.cuda_archs import Architecture
from moec.compiler.kernels.cuda import (
    attention,
    combine,
    combine_fast,
    dispatch,
    gate,
    gate_linear,
    moe_decode,
    rms_norm,
    rope,
    rows,
    split_activation,
)
from moec.compiler.kernels.cuda.gemm_problem import GemmProblem
from moec.compiler.kernels.cuda.gemm_space import gemm_kernel
from moec.compiler.kernels.cuda.kernel import CudaKernel
from moec.compiler.kernels.cuda.layer import LayerError, default_tile
from moec.compiler.kernels.cuda.moe_decode import DecodeProblem
from moec.compiler.kernels.cuda.rows import RowsProblem

Problem = TypeVar("Problem")


@dataclasses.dataclass(frozen=True)
class CudaSpec(Generic[Problem]):
    """A kernel of the catalogue.

    name           unique, kebab-case
    op             the moec op that it implements, or a part of which it is
    supports       None, or the reason in words why the kernel does not take the problem on an architecture
    kernels        problem and architecture -> its launches by role; ask supports first
    deterministic  the same inputs give the same bits
    library        the function of torch that does it; kernels is empty then
    """

    name: str
    op: str
    supports: Callable[[Problem, Architecture], str | None]
    kernels: Callable[[Problem, Architecture], dict[str, CudaKernel]]
    deterministic: bool = True
    library: str = ""


def _gemm_refusal(large: bool, problem: GemmProblem, arch: Architecture) -> str | None:
    if reason := problem.refusal():
        return reason
    try:
        default_tile(problem, arch, large)
    except LayerError as error:
        return str(error)
    return None


def _gemm(large: bool, problem: GemmProblem, arch: Architecture) -> dict[str, CudaKernel]:
    return {problem.mode: gemm_kernel(problem, default_tile(problem, arch, large), arch.name)}


def _rows_refusal(problem: RowsProblem, arch: Architecture) -> str | None:
    if problem.quantise and problem.dtype == "float8_e4m3fn" and not arch.converts_e4m3:
        return f"{arch.name} has no instruction that rounds to e4m3"
    return problem.refusal()


def _decode_refusal(problem: DecodeProblem, arch: Architecture) -> str | None:
    tiles = moe_decode.default_tiles(problem, arch)
    return tiles if isinstance(tiles, str) else None


def _decode(problem: DecodeProblem, arch: Architecture) -> dict[str, CudaKernel]:
    tiles = moe_decode.default_tiles(problem, arch)
    assert not isinstance(tiles, str)  # supports
    return {"moe_decode": moe_decode.decode_kernel(problem, tiles, arch.name)}


def _one(name: str, build: Callable[..., Any], *more: Any) -> Callable[[Any, Architecture], dict[str, CudaKernel]]:
    """A kernel whose build takes the problem."""

    def make(problem: Any, arch: Architecture) -> dict[str, CudaKernel]:
        return {name: CudaKernel(name, arch.name, functools.partial(build, problem, *more))}

    return make


def _dispatch(problem: dispatch.DispatchProblem, arch: Architecture) -> dict[str, CudaKernel]:
    one, several = (_one(f"place_{n}", dispatch.build_place, n == "one") for n in ("one", "chunks"))
    return one(problem, arch) | _one("count", dispatch.build_count)(problem, arch) | several(problem, arch)


def _attention(problem: Any, arch: Architecture) -> dict[str, CudaKernel]:
    decode = CudaKernel("decode", arch.name, functools.partial(attention.build_decode, problem), tensor="HMMA")
    before, after = _one("append", attention.build_append), _one("merge", attention.build_merge)
    return before(problem, arch) | {"decode": decode} | after(problem, arch)


def _anywhere(refusal: Callable[[Any], str | None]) -> Callable[[Any, Architecture], str | None]:
    """A refusal that does not depend on the architecture."""
    return lambda problem, arch: refusal(problem)


def _own(problem: Any) -> str | None:
    reason: str | None = problem.refusal()
    return reason


SPECS: tuple[CudaSpec[Any], ...] = (
    CudaSpec("cuda-gate", "moec::gate", _anywhere(gate.refusal), _one("gate", gate.build)),
    CudaSpec(
        "cuda-gate-linear",
        "moec::gate_linear",
        _anywhere(gate_linear.refusal),
        _one("gate_linear", gate_linear.build),
    ),
    CudaSpec("cuda-dispatch", "moec::dispatch", _anywhere(dispatch.refusal), _dispatch),
    CudaSpec("cuda-rows", "moec::grouped_gemm", _rows_refusal, _one("rows", rows.build)),
    CudaSpec(
        "cuda-gemm-few", "moec::grouped_gemm", functools.partial(_gemm_refusal, False), functools.partial(_gemm, False)
    ),
    CudaSpec(
        "cuda-gemm-many", "moec::grouped_gemm", functools.partial(_gemm_refusal, True), functools.partial(_gemm, True)
    ),
    CudaSpec(
        "cuda-split-activation",
        "moec::grouped_gemm",
        _anywhere(_own),
        _one("split_activation", split_activation.build),
    ),
    CudaSpec("cuda-combine", "moec::combine_gemm", _anywhere(_own), _one("combine", combine.build)),
    CudaSpec(
        "cuda-combine-atomic",
        "moec::combine_gemm",
        _anywhere(_own),
        _one("finish", combine_fast.build),
        deterministic=False,
    ),
    CudaSpec("cuda-moe-decode", "moec::experts", _decode_refusal, _decode),
    CudaSpec("cuda-rms-norm", "moec::rms_norm", _anywhere(rms_norm.refusal), _one("norm", rms_norm.build)),
    CudaSpec(
        "cuda-add-rms-norm", "moec::add_rms_norm", _anywhere(rms_norm.refusal), _one("norm", rms_norm.build, True)
    ),
    CudaSpec("cuda-rope", "moec::rope", _anywhere(_own), _one("rope", rope.build)),
    CudaSpec("cuda-attention", "moec::cached_attention", attention.refusal, _attention),
    CudaSpec(
        "torch-attention",  # a prompt: its keys are read once for all its tokens
        "moec::cached_attention",
        _anywhere(_own),
        lambda problem, arch: {},
        deterministic=False,
        library="torch.nn.functional.scaled_dot_product_attention",
    ),
)

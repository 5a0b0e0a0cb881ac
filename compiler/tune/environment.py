"""The parts of a tuning key that this machine and its tools decide, and the key of a layer of experts."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from moec.compiler.kernels.experts.knobs import source_sha256
from moec.compiler.kernels.spec import ExpertsProblem
from moec.compiler.tune.record import Key, Value, shape_text

OP = "experts"
_CPUINFO = Path("/proc/cpuinfo")
_FIELDS = {"cpu family": "family", "model": "model", "stepping": "stepping"}


@functools.cache
def processor() -> str:
    """Vendor, family, model and stepping: what tells processors apart where virtual machines hide their names."""
    if not _CPUINFO.exists():
        return "unknown"
    found: dict[str, str] = {}
    for line in _CPUINFO.read_text().split("\n\n", 1)[0].splitlines():
        name, _, value = line.partition(":")
        found[name.strip()] = value.strip()
    numbers = "-".join(found.get(name, "0") for name in _FIELDS)
    return f"{found.get('vendor_id', 'cpu')}-{numbers}"


def device_name(level: str, num_threads: int | None = None) -> str:
    """ "cpu:amx_bf16:GenuineIntel-6-143-8:x2": kind, instruction set, processor, threads (default: torch's)."""
    return f"cpu:{level}:{processor()}:x{num_threads or torch.get_num_threads()}"


def sibling_devices(device: str) -> str:
    """What a device shares with its siblings: kind and instruction set."""
    return ":".join(device.split(":")[:2])


@functools.cache
def toolchain() -> str:
    """TVM and tvm-ffi, which make the kernels' code."""
    import tvm
    import tvm_ffi

    return f"tvm-{tvm.__version__},tvm-ffi-{tvm_ffi.__version__}"


def weight_format(problem: ExpertsProblem) -> str:
    """The key's name for how the weights are stored: "bfloat16", "int4-g64", "int4/int8" where the stacks differ."""
    names = [name or problem.dtype for name in (problem.format_up, problem.format_down)]
    return "/".join(dict.fromkeys(names))


def experts_shape(problem: ExpertsProblem) -> str:
    """The key's text of a problem: every field but the formats."""
    p = problem
    sizes: Mapping[str, Value] = {
        "H": p.hidden, "F": p.inner, "E": p.num_experts, "K": p.top_k, "S": p.num_shared,
        "act": re.sub(r"[,=\s]", "_", p.act), "dtype": p.dtype, "bias": p.has_bias,
        "shared_weight": p.has_shared_weight, "weight_on_input": p.weight_on_input,
    }  # fmt: skip
    return shape_text(sizes)


def experts_key(problem: ExpertsProblem, level: str, tokens: int, routing: str, num_threads: int | None = None) -> Key:
    """The key of a layer of experts here and now."""
    return Key(
        source_sha256(), OP, experts_shape(problem), tokens, weight_format(problem), routing,
        device_name(level, num_threads), toolchain(),
    )  # fmt: skip

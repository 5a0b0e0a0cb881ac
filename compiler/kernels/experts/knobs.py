"""What tuning may choose in an experts kernel: the values of each knob, as data, and what they come to for a problem.

A configuration is {"kernel": name, knob: value, ..}, every knob of that kernel named. All of them read the same packed
weights and give the same numbers up to the order of f32 sums, so an engine may use several, each for some T.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moec.compiler.errors import CompileError
from moec.compiler.kernels.experts import call
from moec.compiler.kernels.experts.catalogue import KERNELS
from moec.compiler.kernels.experts.down import MOST_PANELS, TASKS_PER_THREAD
from moec.compiler.kernels.experts.kernel import ExpertsKernel
from moec.compiler.kernels.experts.plan import Plan
from moec.compiler.kernels.spec import ExpertsProblem
from moec.passes.ir import packed
from moec.runtime.launch.cpu_features import LEVELS

_K, _M = 1 << 10, 1 << 20
SHARED_KNOBS: dict[str, tuple[int, ...]] = {
    "task_bytes": (256 * _K, 512 * _K, _M, 2 * _M, 4 * _M, 8 * _M),
    "l2_bytes": (256 * _K, 512 * _K, 768 * _K, _M, 1536 * _K, 1792 * _K),
    "chunk_bytes": (128 * _K, 256 * _K, 512 * _K, _M, 2 * _M, 4 * _M),
    "down_panels": (0, 1, 2, 4, 8, 16, 32, 64),
    "threads": (0, 1),
}
"""Of every kernel."""
AMX_KNOBS: dict[str, tuple[int, ...]] = {"step_rows": (16, 32, 48), "even_rows": (False, True)}
"""Of kernels whose step takes several blocks of rows."""
PLAIN_AMX_KNOBS: dict[str, tuple[int, ...]] = {"ahead_blocks": (1, 2, 4, 8, 16), "ahead_level": (1, 2)}
"""Of kernels whose prefetches can be placed; for steps of more than one block of rows."""
VECTOR_KNOBS: dict[str, tuple[int, ...]] = {"locality_once": (0, 2)}
"""Of kernels on vector registers."""
PLAIN_VECTOR_KNOBS: dict[str, tuple[int, ...]] = {"ahead_blocks": (1, 2, 4, 8, 16)}
"""Of those with plain weights."""
PROMISING: tuple[dict[str, int], ...] = (
    {"threads": 1},  # a layer so small that another thread wakes up too late; of others no candidate
    {"down_panels": 32, "task_bytes": 4 * _M},  # h and x are read less often
    {"down_panels": 32, "task_bytes": 8 * _M, "l2_bytes": 1536 * _K, "chunk_bytes": 512 * _K},  # many rows, wide F
    {"even_rows": True, "down_panels": 16},
    {"ahead_blocks": 8, "down_panels": 32},  # a panel's products take longer than one trip to memory
    {"ahead_blocks": 1, "task_bytes": 512 * _K},  # reading is all there is
    {"down_panels": 32},
    {"task_bytes": 8 * _M, "l2_bytes": 1792 * _K},  # an expert's rows stay, its weights pass by once
    {"chunk_bytes": 512 * _K},
    {"down_panels": 4},
    {"locality_once": 2},  # the first-level cache holds too little of it
)
"""Changes of the catalogue's configuration that belong together, for a search to begin with; knobs that a kernel lacks
are left out."""
VECTOR_ROWS = 12  # rows of an expert up to which a kernel without tiles is worth a try
ONE_THREAD_PRODUCTS = 1 << 26  # multiply-adds above which one thread alone is not worth a try
_BY_NAME = {kernel.name: kernel for kernel in KERNELS}


def kernel_named(name: str) -> ExpertsKernel:
    """A kernel of the catalogue. Raises: CompileError: none has that name."""
    if name not in _BY_NAME:
        raise CompileError(f"experts kernel {name!r} is unknown; known: {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


def knobs_of(kernel: ExpertsKernel) -> dict[str, tuple[int, ...]]:
    """Knob -> values, rising."""
    found = dict(SHARED_KNOBS)
    if kernel.level == "amx_bf16":
        found |= AMX_KNOBS
        if kernel.name == "experts-amx-bf16":
            found |= PLAIN_AMX_KNOBS
    else:
        found |= VECTOR_KNOBS
        if kernel.takes == call.PLAIN:
            found |= PLAIN_VECTOR_KNOBS
    return found


def config_of(kernel: ExpertsKernel) -> dict[str, int | str | bool]:
    """The configuration that a kernel of the catalogue has; without tuning this is what is used."""
    return {"kernel": kernel.name} | {name: getattr(kernel.blocking, name) for name in knobs_of(kernel)}


def configured(config: Mapping[str, Any]) -> ExpertsKernel:
    """The kernel of a configuration; its function has a name of its own unless the configuration is the catalogue's.

    Raises: CompileError: a kernel, knob or value that the space does not have.
    """
    kernel = kernel_named(str(config.get("kernel")))
    values = {name: value for name, value in config.items() if name != "kernel"}
    known = knobs_of(kernel)
    for name, value in values.items():
        if name not in known or value not in known[name]:
            raise CompileError(f"{kernel.name} cannot have {name}={value!r}; see compiler/kernels/experts/knobs.py")
    blocking = dataclasses.replace(kernel.blocking, **values)
    if blocking == kernel.blocking:
        return kernel
    text = ",".join(f"{name}={values[name]}" for name in sorted(values))
    variant = "v" + hashlib.sha256(f"{kernel.name},{text}".encode()).hexdigest()[:8]
    return dataclasses.replace(kernel, blocking=blocking, variant=variant)


def effects(plan: Plan, num_tokens: int) -> dict[str, Any]:
    """Knob -> what its value comes to at num_tokens: two values that come to the same are one candidate."""
    blocking, down = plan.blocking, plan.blocking.down_panels
    most = -(-num_tokens // blocking.block_rows) * blocking.block_rows  # rows of one expert
    placed = plan.level != "amx_bf16" or num_tokens > blocking.block_rows  # the prefetches of plain weights
    distances = tuple(blocking.distance(rows) for rows in range(1, min(num_tokens, blocking.step_rows) + 1))
    usual = min(MOST_PANELS, max(1, plan.panels_down // (torch.get_num_threads() * TASKS_PER_THREAD)))
    return {
        "task_bytes": plan.up_panels_per_task,
        "l2_bytes": (min(plan.unit_rows, most), min(plan.down_rows, most)),
        "chunk_bytes": plan.down_depth_chunk,
        "down_panels": min(down or usual, plan.panels_down),
        "threads": blocking.threads,
        "step_rows": min(blocking.step_rows, most),
        "even_rows": blocking.even_rows and num_tokens > blocking.block_rows,
        "ahead_blocks": distances if placed else 0,
        "ahead_level": blocking.ahead_level if placed else 0,
        "locality_once": blocking.locality_once,
    }


def distinct_values(kernel: ExpertsKernel, problem: ExpertsProblem, num_tokens: int) -> dict[str, tuple[int, ...]]:
    """Knob -> its values without those that come to the same as another; the catalogue's own value is always kept."""
    kept: dict[str, tuple[int, ...]] = {}
    plan = kernel.plan(problem)
    large = num_tokens * plan.slots_per_token * plan.products_per_slot > ONE_THREAD_PRODUCTS
    for name, values in knobs_of(kernel).items():
        own = getattr(kernel.blocking, name)
        if name == "threads" and large:
            values = (own,)
        by_effect: dict[Any, int] = {}
        for value in (own, *values):
            changed = dataclasses.replace(kernel, blocking=dataclasses.replace(kernel.blocking, **{name: value}))
            by_effect.setdefault(effects(changed.plan(problem), num_tokens)[name], value)
        kept[name] = tuple(sorted(by_effect.values()))
    return kept


def promising(kernel: ExpertsKernel) -> list[dict[str, int | str | bool]]:
    """Configurations to begin a search with."""
    known = knobs_of(kernel)
    return [config_of(kernel) | {n: v for n, v in change.items() if n in known} for change in PROMISING]


def alternatives(problem: ExpertsProblem, level: str, num_tokens: int) -> list[ExpertsKernel]:
    """Kernels of the catalogue that do the problem with instructions of `level`, the catalogue's choice first.

    One without tiles is among them where an expert has few rows. They multiply numbers of the same width.
    """
    able = [k for k in KERNELS if k.spec().refusal(problem, LEVELS[level]) is None]
    first = able[:1]
    rows = num_tokens * problem.top_k / problem.num_experts
    close = [k for k in able[1:] if k.level == "avx512_bf16" and k.takes == first[0].takes and rows <= VECTOR_ROWS]
    return first + close


@functools.cache
def source_sha256() -> str:
    """Of the source that decides what a configuration compiles to: the templates and the libraries' own runtime.

    This file is not part of it: which values and hints a search has changes nothing that was measured.
    """
    here = Path(__file__).resolve().parent
    files = [*here.glob("*.py"), *(here.parent / "template").glob("*.py"), here.parent.parent / "codegen" / "shim.c"]
    files.append(Path(packed.__file__))
    digest = hashlib.sha256()
    for file in sorted((f for f in files if f != Path(__file__).resolve()), key=lambda f: (f.parent.name, f.name)):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()

"""CUDA kernels of lowered programs: made once for all ranks, and the programs' launches fitted to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moec.compiler.codegen.cuda import BuiltCubin, CudaSource, build_cubins
from moec.compiler.codegen.cuda_archs import Architecture
from moec.compiler.errors import CompileError
from moec.compiler.export.engine import CudaFile, Target
from moec.compiler.lowering.emit import Lowered
from moec.runtime.program import Step

Build = Callable[[Sequence[CudaSource], Path], list[BuiltCubin]]


def build_target(
    lowered: Sequence[Lowered], arch: Architecture, cache_dir: Path, build: Build | None = None
) -> tuple[list[Lowered], Target]:
    """The programs, their launches naming what the kernels take, and the cubins to ship.

    build: makes cubins of sources; tests put the emulator there.
    Raises: ToolchainError: no CUDA compiler.  SharedMemoryError.  CompileError: a launch lacks an argument.
    """
    kernels: dict[str, Any] = {}
    lowered = [
        dataclasses.replace(one, program=dataclasses.replace(one.program, steps=decided(one.program.steps)))
        for one in lowered
    ]
    for one in lowered:
        for chosen in one.kernels.values():
            if chosen.functions is not None and not kernels.keys() >= set(chosen.symbols):
                kernels |= chosen.functions()
    called = {name for one in lowered for name in _called(one.program.steps)}
    sources = {name: kernels[name].source() for name in sorted(called)}
    built = (build or build_cubins)(list(sources.values()), cache_dir)
    used = {name: source.needed() for name, source in sources.items()}
    fitted = [
        dataclasses.replace(one, program=dataclasses.replace(one.program, steps=_fitted(one.program.steps, used)))
        for one in lowered
    ]
    files = tuple(CudaFile(name, b.path, b.source.launch()) for name, b in zip(sources, built, strict=True))
    return fitted, Target("cuda", arch.name, cubins=files)


def decided(steps: Sequence[Step], above: int = 0, limit: int | None = None) -> tuple[Step, ...]:
    """The steps without choices that are made already: inside a variant for above < T <= limit.

    A choice inside a choice asks for the same symbol (bind_experts.py), and dispatch's is settled by most ranges of T.
    """
    done: list[Step] = []
    for step in steps:
        if not step.variants:
            done.append(step)
            continue
        kept, low = [], above
        for bound, inner in step.variants:
            high = bound if limit is None else limit if bound is None else min(bound, limit)
            if high is None or high > low:
                kept.append((bound, decided(inner, low, high)))
                low = low if high is None else high
            if limit is not None and low >= limit:
                break
        if len(kept) == 1:
            done += kept[0][1]
        else:
            last = (None, kept[-1][1])
            done.append(dataclasses.replace(step, variants=(*kept[:-1], last)))
    return tuple(done)


def _called(steps: Sequence[Step]) -> Iterator[str]:
    for step in steps:
        if step.kind == "kernel":
            yield step.name
        for _, inner in step.variants:
            yield from _called(inner)


def _fitted(steps: Sequence[Step], used: Mapping[str, frozenset[str]]) -> tuple[Step, ...]:
    done = []
    for step in steps:
        variants = tuple((limit, _fitted(inner, used)) for limit, inner in step.variants)
        kwargs = step.kwargs
        if step.kind == "kernel":
            if missing := used[step.name] - kwargs.keys():
                raise CompileError(
                    f"node {step.node}: the launch of {step.name} gives no {', '.join(sorted(missing))}; report it"
                )
            kwargs = {k: v for k, v in kwargs.items() if k in used[step.name]}
        done.append(dataclasses.replace(step, kwargs=kwargs, variants=variants))
    return tuple(done)

"""A kernel that reads memory and does nothing else: the fastest that any kernel can go through the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

TASK_WORDS = 1 << 16  # 256 KiB
_UNROLLED = 8
_AHEAD_WORDS = 1024


def build_stream(cache_dir: Path) -> Callable[..., None]:
    """-> read(words i32[N], parts i32[n], scratch i32[64] of zeros, words of a part): reads the given equal parts."""
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    from moec.compiler.codegen.llvm import build_library
    from moec.compiler.kernels.template import intrinsics as ins
    from moec.compiler.kernels.template.flow import Vector, fetch_tasks, on_threads
    from moec.runtime.launch.cpu import load_library
    from moec.runtime.launch.cpu_features import best_level

    level = best_level() or "avx2"
    lanes = 8 if level == "avx2" else 16
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name("read")
        T.func_attr({"tirx.noalias": True})
        size, count = T.int64(), T.int64()
        words = T.match_buffer(T.arg("words", T.handle()), (size,), "int32", align=4)
        parts = T.match_buffer(T.arg("parts", T.handle()), (count,), "int32", align=4)
        scratch = T.match_buffer(T.arg("scratch", T.handle()), (64,), "int32", align=4)
        part_words = T.arg("part_words", T.int64())
        with ins.intrinsics(level):
            per_part = ins.let(T.floordiv(part_words + (TASK_WORDS - 1), TASK_WORDS))
            num_tasks = ins.let(T.Cast("int32", per_part * count))

            def worker() -> Callable[[], None]:
                totals = [Vector(lanes, "int32") for _ in range(_UNROLLED)]

                def task(number: object) -> None:
                    wide = T.Cast("int64", number)
                    part = ins.let(T.Cast("int64", parts[T.floordiv(wide, per_part)]) * part_words)
                    start = ins.let(T.floormod(wide, per_part) * TASK_WORDS)
                    length = T.min(part_words - start, T.int64(TASK_WORDS))
                    with T.serial(T.floordiv(length, lanes * _UNROLLED)) as i:
                        at = ins.let(part + start + i * (lanes * _UNROLLED))
                        for u, total in enumerate(totals):
                            ins.prefetch(T.address_of(words[at + (_AHEAD_WORDS + u * lanes)]))
                            value = ins.load_i32(T.address_of(words[at + u * lanes]), lanes)
                            total.set(total.value + value)

                def work() -> None:
                    fetch_tasks(T.address_of(scratch[0]), num_tasks, task)
                    for u, total in enumerate(totals):  # a use of what was read, or the loads would be left out
                        T.buffer_store(scratch, ins.total(total.value, lanes, "int32"), [32 + u])

                return work

            on_threads(worker)
    built = build_library({"read": ib.get()}, level, cache_dir)
    return load_library(built.path, built.level)["read"]

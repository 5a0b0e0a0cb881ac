"""What a step on vector registers asks for while it multiplies, so that it is in the cache when it is read.

Lines are asked for in the order in which they lie, whatever the order of the loads: the processor's own prefetchers
follow such a stream, and hardly one that goes to and fro between the halves of a block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.experts.tiles import Step
from moec.compiler.kernels.template import intrinsics as ins
from moec.compiler.kernels.template.flow import when

_NEAR_BLOCKS, _NEAR_ROWS = 2, 3072  # blocks of weights, bytes of rows from use to prefetch into the first-level cache
_LINE_BYTES = 64
FURTHER_ON, NEXT_PANEL, HALF_PANEL = "further on", "next panel", "half panel"  # what a step asks for
_FIRST_LEVEL, _SECOND_LEVEL = 3, 2  # localities (intrinsics.prefetch)


@dataclasses.dataclass(frozen=True)
class Ahead:
    """at: number of a block (i32) -> element to prefetch from while it is multiplied; locality: of the prefetch.

    share: one of so many equal parts of a block is asked for with each.
    """

    at: Callable[[Any], Any]
    locality: int
    share: int = 1


def further_on(step: Step, num_blocks: Any, size: int, distance: int, locality: int = 2) -> Ahead:
    """`distance` blocks of `size` elements further on in the panel, then in the next one."""
    wide = T.int64(size)
    near = ins.let(step.w_at + distance * wide)
    beyond = ins.let(step.next_at + (distance - T.Cast("int64", num_blocks)) * wide)
    bound = ins.let(T.Cast("int32", num_blocks) - distance)
    return Ahead(lambda b: ins.let(T.Select(b < bound, near, beyond) + T.Cast("int64", b) * wide), locality)


def next_panel(step: Step, num_blocks: Any, size: int, near: bool = True, part: int = 0, parts: int = 1) -> Ahead:
    """The panel after this one, of which each step over this one asks for its share, end to end: a block of it with
    every `count`-th block.

    With further_on() the first step waits for memory, and the others, which find the panel in the cache, ask for
    nothing. With its other blocks a step asks for what it reads next, from the second-level cache, where `near` says
    so; else for what it reads anyway.

    part, parts: of a step that goes over this panel several times; there a step alone asks for the next one as well.
    """
    turns, number = ins.let(step.count * parts), ins.let(step.index * parts + part)
    count = T.Cast("int32", num_blocks)
    share = ins.let(T.truncdiv(count, turns))
    first = ins.let(number * share + T.min(number, count - share * turns))
    others = ins.let(step.next_at + T.Cast("int64", first) * T.int64(size))
    own = ins.let(step.w_at + (_NEAR_BLOCKS if near else 0) * T.int64(size))

    def at(b: Any) -> Any:
        block = T.Cast("int32", b)
        turn = ins.let(T.truncdiv(block, turns))
        is_own = T.Bind(block - turn * turns != number)
        return ins.let(T.Select(is_own, own, others) + T.Cast("int64", T.Select(is_own, block, turn)) * T.int64(size))

    return Ahead(at, _FIRST_LEVEL if near else _SECOND_LEVEL)


def half_panel(step: Step, num_blocks: Any, size: int) -> Ahead:
    """Half of the panel after this one, for each of two steps: half a block of it with each block.

    Where the first step asks for all of it memory waits for the second; a block with every other one, as next_panel(),
    was 4 % slower.
    """
    half = ins.let(step.next_at + T.Cast("int64", step.index) * T.Cast("int64", num_blocks) * (size // 2))
    return Ahead(lambda b: ins.let(half + T.Cast("int64", b) * T.int64(size // 2)), _SECOND_LEVEL, 2)


def has_rows_near(rows: int, most: int, asks: str) -> bool:
    """Whether rows_near() helps a step: of the most rows, or one of several that ask for the next panel."""
    return rows == most or asks == NEXT_PANEL


def rows_near(step: Step, at: Any, elements: int, item_bytes: int, count: int, rows: range) -> None:
    """Asks for the packed rows of a later block while one is multiplied that begins at an element of `step.a`.

    elements: of a block, whose lines belong to `count` rows in turn; rows: those that are wanted. Rows of a whole step
    fill the first-level cache or more, and weights pass through it.
    """
    distance = max(1, _NEAR_ROWS // (elements * item_bytes)) * elements
    near, in_line = ins.let(at + T.int64(distance)), _LINE_BYTES // item_bytes
    for offset in range(0, elements, in_line):
        if offset // in_line % count in rows:
            ins.prefetch(T.address_of(step.a[near + offset]), _FIRST_LEVEL)


def by_steps(step: Step, rows: int, least: int, emit: Callable[[str], None]) -> None:
    """emit(what to ask for: FURTHER_ON, NEXT_PANEL or HALF_PANEL) for a step of so many rows.

    least: rows from which one of several steps over a panel shares the next one with the others; 0: none does.
    """

    def several() -> None:
        when(step.count == 2, lambda: emit(HALF_PANEL), lambda: emit(NEXT_PANEL))

    if least and rows >= least:
        when(step.count >= 2, several, lambda: emit(FURTHER_ON))
    else:
        emit(FURTHER_ON)

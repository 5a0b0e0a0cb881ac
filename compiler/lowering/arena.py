"""Places kernel results and scratch memory in one arena, and decides when every other value is dropped.

Sizes are lines in the number of rows T. A buffer of a*T bytes gets a place of ceil(a, 64) units per row: whatever T is,
no two buffers that live at once overlap, and every place is a multiple of 64 bytes. Buffers of a fixed size that
several steps touch lie behind these, and last memory of other sizes (workspaces), which all steps share: it lives for
one step only. Of the variants of a choice one runs, so what lives in one alone may lie where another's lies.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch

from moec.runtime.constants import torch_dtype
from moec.runtime.errors import FormatError
from moec.runtime.expressions import Size, evaluate
from moec.runtime.memory import ALIGN_BYTES
from moec.runtime.program import Buffer, Program, Step, buffers_in

Interval = tuple[int, int]
VIEWS = frozenset(
    f"aten.{name}"
    for name in (
        "view.default", "split_with_sizes.default", "slice.Tensor", "transpose.int", "permute.default", "select.int",
        "unsqueeze.default", "squeeze.dim", "expand.default", "t.default",
    )
)  # fmt: skip


def plan_memory(program: Program, symbol: str | None) -> Program:
    """The program with offsets for its arena buffers, and with `dies` set on its steps.

    symbol: the rows of a batch, "T"; None where all sizes are fixed. An arena buffer that an output of the program may
    share memory with, or whose size depends on another symbol, becomes a "value", allocated by the step that fills it.
    """
    owner = _owners(program)
    lives = _lives(program, owner)
    escaping = {owner[o] for o in program.outputs}
    buffers = list(program.buffers)
    lines: dict[int, tuple[int, Interval]] = {}
    fixed: dict[int, tuple[int, Interval]] = {}
    shared: list[int] = []
    leaves = list(_leaves(program.steps))
    for i, b in enumerate(buffers):
        if b.kind != "arena":
            continue
        rate = _bytes_per_row(b, symbol)
        life = lives.get(i, (0, len(leaves)))
        if i in escaping:
            buffers[i] = dataclasses.replace(b, kind="value")
        elif rate is not None:
            lines[i] = (rate, life)
        elif _is_scratch(i, leaves):
            shared.append(i)
        elif all(isinstance(d, int) for d in b.shape):
            fixed[i] = (_bytes_per_row(b, None) or 0, life)
        else:
            buffers[i] = dataclasses.replace(b, kind="value")
    places, per_row = _place(lines)
    for i, place in places.items():
        buffers[i] = dataclasses.replace(buffers[i], offset=_times(symbol, place))
    front = _times(symbol, per_row)
    places, fixed_bytes = _place(fixed)
    for i, place in places.items():
        buffers[i] = dataclasses.replace(buffers[i], offset=_plus(front, place))
    front = _plus(front, fixed_bytes)
    for i in shared:
        buffers[i] = dataclasses.replace(buffers[i], offset=front)
    sizes = sorted({str(_num_bytes(buffers[i])) for i in shared})
    behind = f" + max({', '.join([*sizes, '0'])})" if sizes else ""
    arena: Size = 0 if not (lines or fixed or shared) else f"{front}{behind}" if behind else front
    steps, views = _hoist_views(_settle_copies(program.steps, buffers), buffers)
    planned = dataclasses.replace(program, buffers=tuple(buffers), arena_bytes=arena, views=tuple(views))
    return dataclasses.replace(planned, steps=free_dead(planned, steps, frozenset(program.outputs)))


def _times(symbol: str | None, count: int) -> Size:
    return count if symbol is None else f"{symbol}*{count}"


def _plus(size: Size, count: int) -> Size:
    return size + count if isinstance(size, int) else f"{size} + {count}" if count else size


def _leaves(steps: Sequence[Step]) -> Iterator[Step]:
    """The steps that do something, the variants of a choice one after the other."""
    for step in steps:
        if step.variants:
            for _, inner in step.variants:
                yield from _leaves(inner)
        else:
            yield step


def _settle_copies(steps: Sequence[Step], buffers: list[Buffer]) -> list[Step]:
    """A copy into a buffer that has no place in the arena becomes another name for what would have been copied."""
    done = []
    for step in steps:
        variants = tuple((limit, tuple(_settle_copies(inner, buffers))) for limit, inner in step.variants)
        step = dataclasses.replace(step, variants=variants)
        if step.name == "copy_into":
            source, target = buffers_in(step.args)
            if buffers[target].kind == "value":
                args = ({"buffer": source},)
                step = Step("aten", "aten.alias.default", step.node, args, outputs=(target,))
        done.append(step)
    return done


def _hoist_views(steps: Sequence[Step], buffers: list[Buffer]) -> tuple[list[Step], list[Step]]:
    """Steps that only look at arena memory in another shape run once per set of sizes -> other steps, views."""
    rest: list[Step] = []
    views: list[Step] = []
    for step in steps:
        read = buffers_in([*step.args, *step.kwargs.values()])
        if step.name not in VIEWS or len(read) != 1 or buffers[read[0]].kind not in ("arena", "view"):
            rest.append(step)
            continue
        views.append(step)
        for o in step.outputs:
            if o is not None:
                buffers[o] = dataclasses.replace(buffers[o], kind="view")
    return rest, views


def _is_scratch(buffer: int, leaves: Sequence[Step]) -> bool:
    """Whether one step alone touches it, so that all such buffers may lie in one place."""
    return sum(buffer in _touched(s) for s in leaves) == 1 and buffer not in _results(leaves)


def _results(steps: Sequence[Step]) -> set[int]:
    inner = {o for s in steps for _, v in s.variants for o in _results(v)}
    return inner | {o for s in steps for o in s.outputs if o is not None}


def _num_bytes(buffer: Buffer) -> Size:
    """A scratch buffer's size, rounded up to a cache line where it is a number; expressions are rounded already."""
    if len(buffer.shape) > 1:  # one step's own result: rows of several symbols
        return "*".join(f"({d})" for d in (*buffer.shape, torch_dtype(buffer.dtype).itemsize))
    (count,) = buffer.shape
    return count + -count % ALIGN_BYTES if isinstance(count, int) else count


def _bytes_per_row(buffer: Buffer, symbol: str | None) -> int | None:
    """a where the buffer has a*T bytes for every T, else None. Without a symbol: its bytes."""
    if symbol is None:
        return math.prod(int(d) for d in buffer.shape) * torch_dtype(buffer.dtype).itemsize
    try:
        sizes = [
            math.prod(evaluate(d, {symbol: t}) for d in buffer.shape) * torch_dtype(buffer.dtype).itemsize
            for t in (1, 2, 3, 64, 1000)
        ]
    except (FormatError, ZeroDivisionError):  # a size of another symbol, or a quotient by it
        return None
    return sizes[0] if sizes == [sizes[0] * t for t in (1, 2, 3, 64, 1000)] else None


def _place(lines: dict[int, tuple[int, Interval]]) -> tuple[dict[int, int], int]:
    """First fit, large buffers first -> (bytes per row in front of each, bytes per row of all)."""
    placed: dict[int, tuple[int, int, Interval]] = {}
    for i, (rate, life) in sorted(lines.items(), key=lambda item: (-item[1][0], item[0])):
        size, at = rate + -rate % ALIGN_BYTES, 0
        for start, end, other in sorted(placed.values()):
            if start < at + size and at < end and life[0] <= other[1] and other[0] <= life[1]:
                at = end
        placed[i] = (at, at + size, life)
    return {i: start for i, (start, _, _) in placed.items()}, max((e for _, e, _ in placed.values()), default=0)


def _lives(program: Program, owner: list[int]) -> dict[int, Interval]:
    """The first and the last leaf that touches each memory owner, through any of its views."""
    lives: dict[int, Interval] = {}
    for at, step in enumerate(_leaves(program.steps)):
        for b in _touched(step):
            first, _ = lives.get(owner[b], (at, at))
            lives[owner[b]] = (first, at)
    return lives


def _owners(program: Program) -> list[int]:
    """For each buffer, the one whose memory it may share: a view's owner is the owner of what it views."""
    owner = list(range(len(program.buffers)))

    def visit(steps: Sequence[Step]) -> None:
        for step in steps:
            for _, inner in step.variants:
                visit(inner)
            if not _may_alias(step):
                continue
            for source in buffers_in(step.args[:1]):
                for o in step.outputs:
                    if o is not None:
                        owner[o] = owner[source]

    visit(program.steps)
    return owner


def _may_alias(step: Step) -> bool:
    """Whether a step's result may share memory with its first argument: by an operator's schema."""
    if step.kind != "aten":
        return step.name == "select_rows"
    _, packet, overload = step.name.split(".")
    schema = getattr(getattr(torch.ops.aten, packet), overload)._schema
    return any(r.alias_info is not None for r in schema.returns)


def free_dead(program: Program, steps: Sequence[Step], kept: frozenset[int]) -> tuple[Step, ...]:
    """The steps with `dies` set: values go after their last use, inside a variant where they live there only."""
    last: dict[int, int] = {}
    for at, step in enumerate(steps):
        for b in _touched(step):
            last[b] = at
    deaths: dict[int, list[int]] = {}
    for b, at in sorted(last.items()):
        if program.buffers[b].kind == "value" and b not in kept:
            deaths.setdefault(at, []).append(b)
    done = []
    for at, step in enumerate(steps):
        dies = deaths.get(at, [])
        inside = {b for b in dies if step.variants and not _bound_by_all(step, b) and not _reads_outside(steps, at, b)}
        outer = frozenset(kept | (set(_touched(step)) - inside))
        variants = tuple((limit, free_dead(program, inner, outer)) for limit, inner in step.variants)
        done.append(dataclasses.replace(step, dies=tuple(b for b in dies if b not in inside), variants=variants))
    return tuple(done)


def _bound_by_all(step: Step, buffer: int) -> bool:
    """Whether each variant of a choice gives this value, or none does because it comes from before."""
    return all(buffer in _results(inner) for _, inner in step.variants)


def _reads_outside(steps: Sequence[Step], at: int, buffer: int) -> bool:
    return any(buffer in _touched(s) for i, s in enumerate(steps) if i != at)


def _touched(step: Step) -> list[int]:
    """The buffers that a step, or a variant of it, reads or gives."""
    inner = [b for _, steps in step.variants for s in steps for b in _touched(s)]
    outputs = [o for o in step.outputs if o is not None]
    return [*buffers_in(step.args), *buffers_in(list(step.kwargs.values())), *outputs, *inner]

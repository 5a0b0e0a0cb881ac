from __future__ import annotations

import dataclasses
import itertools

from moec.compiler.lowering.arena import plan_memory
from moec.runtime.expressions import evaluate
from moec.runtime.program import Buffer, Program, Step


def kernel(name: str, *args: int, outputs: tuple[int, ...] = ()) -> Step:
    return Step("kernel", name, name, tuple({"buffer": a} for a in args), outputs=outputs)


def arena(name: str, *shape: int | str, dtype: str = "float32") -> Buffer:
    return Buffer(name, dtype, shape, "arena")


X = Buffer("x", "float32", ("T", 4), "input")


def overlaps(program: Program, tokens: int) -> list[tuple[str, str]]:
    """Pairs of arena buffers that share bytes at this T although their lives overlap."""
    spans = {}
    for i, b in enumerate(program.buffers):
        if b.kind == "arena":
            start = evaluate(b.offset, {"T": tokens})
            size = 4
            for d in b.shape:
                size *= evaluate(d, {"T": tokens})
            used = [at for at, s in enumerate(program.steps) if i in touched(s)]
            spans[b.name] = (start, start + size, used[0], used[-1])
            assert start % 64 == 0 and start + size <= evaluate(program.arena_bytes, {"T": tokens})
    return [
        (a, b)
        for (a, (s, e, f, l)), (b, (s2, e2, f2, l2)) in itertools.combinations(spans.items(), 2)
        if s < e2 and s2 < e and f <= l2 and f2 <= l
    ]


def touched(step: Step) -> set[int]:
    ids = {a["buffer"] for a in step.args if isinstance(a, dict)} | {o for o in step.outputs if o is not None}
    return ids | {i for _, inner in step.variants for s in inner for i in touched(s)}


def chain(length: int) -> Program:
    """x -> b1 -> b2 .. each from the one before, of different widths; the last is the output."""
    buffers = (X, *(arena(f"b{i}", "T", 5 + 7 * i) for i in range(length)))
    steps = tuple(kernel(f"k{i}", i, i + 1, outputs=(i + 1,)) for i in range(length))
    return Program(("T",), buffers, (0,), (length,), steps)


def test_buffers_that_live_together_do_not_overlap() -> None:
    planned = plan_memory(chain(7), "T")
    for tokens in (0, 1, 3, 1000):
        assert overlaps(planned, tokens) == []


def test_memory_is_reused() -> None:
    planned = plan_memory(chain(7), "T")
    whole = sum(-(-4 * (5 + 7 * i) // 64) * 64 for i in range(6))
    assert evaluate(planned.arena_bytes, {"T": 1}) < whole


def test_outputs_and_what_they_view_are_not_in_the_arena() -> None:
    program = chain(2)
    view = Step("aten", "aten.view.default", "v", ({"buffer": 2}, [-1]), outputs=(3,))
    buffers = (*program.buffers, Buffer("v", "float32", ("T*12",), "value"))
    planned = plan_memory(
        dataclasses.replace(program, buffers=buffers, steps=(*program.steps, view), outputs=(3,)), "T"
    )
    assert [b.kind for b in planned.buffers] == ["input", "arena", "value", "value"]
    assert plan_memory(program, "T").buffers[2].kind == "value"


def test_a_view_keeps_its_memory_alive() -> None:
    """b0 is viewed, then b1 is written, then the view is read: b1 must not lie on b0."""
    buffers = (
        X, arena("b0", "T", 4), Buffer("view", "float32", ("T*4",), "value"), arena("b1", "T", 4), arena("b2", "T", 4),
        Buffer("out", "float32", ("T", 4), "value"),
    )  # fmt: skip
    for name, kind in (("view.default", "view"), ("contiguous.default", "value")):
        looks = Step("aten", f"aten.{name}", "v", ({"buffer": 1}, [-1]), outputs=(2,))
        steps = (
            kernel("k0", 0, 1, outputs=(1,)),
            looks,
            kernel("k1", 0, 3, outputs=(3,)),
            kernel("k2", 2, 3, 4, outputs=(4,)),
            Step("aten", "aten.clone.default", "c", ({"buffer": 4},), outputs=(5,)),
        )
        planned = plan_memory(Program(("T",), buffers, (0,), (5,), steps), "T")
        assert planned.buffers[1].kind == "arena" and planned.buffers[1].offset != planned.buffers[3].offset
        assert planned.buffers[2].kind == kind and planned.views == ((looks,) if kind == "view" else ())


def test_a_copy_to_what_has_no_place_is_dropped() -> None:
    buffers = (X, Buffer("made", "float32", ("T", 4), "value"), arena("y", "T", 4))
    few = kernel("k", 0, 2, outputs=(2,))
    library = Step("aten", "aten.clone.default", "c", ({"buffer": 0},), outputs=(1,))
    copy = Step("library", "copy_into", "c", ({"buffer": 1}, {"buffer": 2}))
    choose = Step("choose", "", "c", symbol="T", variants=((4, (few,)), (None, (library, copy))))
    (planned,) = plan_memory(Program(("T",), buffers, (0,), (2,), (choose,)), "T").steps
    assert planned.variants[1][1][1].name == "aten.alias.default"


def test_workspaces_of_odd_sizes_share_a_place_behind() -> None:
    buffers = (
        X, arena("b0", "T", 4), Buffer("w0", "uint8", ("min(T, 64)*70 + 128",), "arena"),
        Buffer("w1", "uint8", (640,), "arena"), Buffer("out", "float32", ("T", 4), "value"),
    )  # fmt: skip
    steps = (kernel("k0", 0, 2, 1, outputs=(1,)), kernel("k1", 1, 3, 4, outputs=(4,)))
    planned = plan_memory(Program(("T",), buffers, (0,), (4,), steps), "T")
    assert planned.buffers[2].offset == planned.buffers[3].offset
    assert evaluate(planned.arena_bytes, {"T": 1}) == 64 + 640
    assert evaluate(planned.arena_bytes, {"T": 100}) == 6400 + 64 * 70 + 128


def test_values_of_one_variant_die_in_it() -> None:
    buffers = (X, *(Buffer(n, "float32", ("T", 4), "value") for n in ("inner", "joined", "out")))

    def add(a: int, b: int) -> Step:
        return Step("aten", "aten.add.Tensor", f"n{b}", ({"buffer": a}, 1), outputs=(b,))

    choose = Step("choose", "", "c", symbol="T", variants=((4, (add(0, 1), add(1, 2))), (None, (add(0, 2),))))
    planned = plan_memory(Program(("T",), buffers, (0,), (3,), (choose, add(2, 3))), "T")
    first, second = planned.steps
    assert first.dies == () and second.dies == (2,)
    assert [s.dies for s in first.variants[0][1]] == [(), (1,)]

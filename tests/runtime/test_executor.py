from __future__ import annotations

import dataclasses

import pytest
import torch

from moec.runtime.errors import FormatError, InputError, StepError
from moec.runtime.executor import Executor
from moec.runtime.pages import HUGE_PAGE_BYTES
from moec.runtime.program import Buffer, Program, Step


def program(*steps: Step, **changes: object) -> Program:
    buffers = (
        Buffer("x", "float32", ("T", 4), "input"),
        Buffer("w", "float32", (4,), "weight"),
        Buffer("a", "float32", ("T", 4), "value"),
        Buffer("b", "float32", ("T", 4), "value"),
        Buffer("k", "float32", ("T", 4), "arena", 0),
    )
    one = Program(("T",), buffers, (0,), (3,), steps, "T*16")
    return dataclasses.replace(one, **changes)


ADD = Step("aten", "aten.add.Tensor", "add", ({"buffer": 0}, {"buffer": 1}), outputs=(2,))
MUL = Step("aten", "aten.mul.Tensor", "mul", ({"buffer": 2}, 2.0), outputs=(3,), dies=(2,))
W = {"w": torch.arange(4.0)}


def test_runs_steps_in_order() -> None:
    x = torch.randn(3, 4)
    (y,) = Executor(program(ADD, MUL), W, {})([x])
    assert torch.equal(y, (x + W["w"]) * 2)


def test_chooses_a_variant_by_size() -> None:
    few = dataclasses.replace(MUL, args=({"buffer": 2}, 3.0), dies=())
    choose = Step("choose", "", "mul", symbol="T", variants=((2, (few,)), (None, (dataclasses.replace(MUL, dies=()),))))
    run = Executor(program(ADD, dataclasses.replace(choose, dies=(2,))), W, {})
    for tokens, factor in ((1, 3.0), (2, 3.0), (3, 2.0)):
        x = torch.randn(tokens, 4)
        assert torch.equal(run([x])[0], (x + W["w"]) * factor)


def test_kernels_write_arena_and_fresh_buffers() -> None:
    calls = []

    def double(x: torch.Tensor, out: torch.Tensor, n: int) -> None:
        calls.append(n)
        out.copy_(x * 2)

    first = Step("kernel", "double", "d1", ({"buffer": 0}, {"buffer": 4}, {"size": "T*3"}))
    second = Step("kernel", "double", "d2", ({"buffer": 4}, {"buffer": 3}, 7), outputs=(3,))
    run = Executor(program(first, second), W, {"double": double})
    for tokens in (5, 2, 5, 0):
        x = torch.randn(tokens, 4)
        assert torch.equal(run([x])[0], x * 4)
    assert calls == [15, 7, 6, 7, 15, 7, 0, 7]
    assert run.frames.num_bytes == 5 * 16


def test_a_large_arena_begins_on_a_huge_page() -> None:
    """Allocators begin large blocks behind a header, never at a multiple of 2 MiB."""
    copy = Step("kernel", "copy", "copy", ({"buffer": 0}, {"buffer": 4}))
    back = Step("kernel", "copy", "back", ({"buffer": 4}, {"buffer": 3}), outputs=(3,))
    large = dataclasses.replace(program(copy, back), arena_bytes="T*1048576")
    run = Executor(large, W, {"copy": lambda x, out: out.copy_(x)})
    x = torch.randn(3, 4)
    assert torch.equal(run([x])[0], x)
    assert run.frames.num_bytes == 3 << 20 and run.frames.block.data_ptr() % HUGE_PAGE_BYTES == 0


def test_zeros_belong_to_an_executor_and_keep_what_kernels_leave() -> None:
    def count(x: torch.Tensor, counter: torch.Tensor, out: torch.Tensor) -> None:
        counter += 1
        out.copy_(x * counter[0])

    buffers = (*program().buffers, Buffer("counter", "int32", (2,), "zeros"))
    step = Step("kernel", "count", "c", ({"buffer": 0}, {"buffer": 5}, {"buffer": 3}), outputs=(3,))
    run = Executor(program(step, buffers=buffers), W, {"count": count})
    other = Executor.like(run, run.program)
    x = torch.randn(2, 4)
    for times in (1, 2, 3):
        assert torch.equal(run([x])[0], x * times)
    assert torch.equal(other([x])[0], x)


def test_a_failing_step_is_named() -> None:
    wrong = Step("aten", "aten.add.Tensor", "sum_of_it", ({"buffer": 0}, {"buffer": 1}), outputs=(3,))
    with pytest.raises(StepError, match=r"step 0 \(aten aten\.add\.Tensor, node sum_of_it\) failed: .*size"):
        Executor(program(wrong), {"w": torch.ones(3)}, {})([torch.ones(2, 4)])


def test_profile_times_every_step() -> None:
    timed = Executor(program(ADD, MUL), W, {}).profile([torch.ones(2, 4)])
    assert [s.node for s, _ in timed] == ["add", "mul"]
    assert all(us > 0 for _, us in timed)


@pytest.mark.parametrize(
    "step",
    [
        Step("aten", "aten.from_file.default", "f", ("/etc/passwd",), outputs=(3,)),
        Step("aten", "aten.add_.Tensor", "f", ({"buffer": 0}, 1), outputs=(3,)),
        Step("aten", "aten.add.out", "f", ({"buffer": 0}, 1), outputs=(3,)),
        Step("aten", "os.system.x", "f", ("true",), outputs=(3,)),
        Step("aten", "aten.add.Missing", "f", ({"buffer": 0}, 1), {"alpha": 1}, outputs=(3,)),
        Step("library", "shell", "f", (), outputs=(3,)),
        Step("library", "rope", "f", (), {"pairs": 1}, outputs=(3,)),
        Step("kernel", "absent", "f", ()),
        Step("aten", "aten.mul.Tensor", "f", ({"buffer": 0}, {"code": "1"}), outputs=(3,)),
        Step("aten", "aten.mul.Tensor", "f", ({"buffer": 0}, {"device": "cuda"}), outputs=(3,)),
        Step("aten", "aten.add.Tensor", "f", ({"buffer": 0}, 1), {"alpha=1) + f(": 1}, outputs=(3,)),
        Step("choose", "", "f", symbol="Q", variants=((None, ()),)),
    ],
)
def test_refuses_what_the_runtime_does_not_have(step: Step) -> None:
    with pytest.raises(FormatError):
        Executor(program(step), W, {})


def test_refuses_a_missing_weight_and_an_unbound_size() -> None:
    with pytest.raises(FormatError, match="weight w"):
        Executor(program(ADD, MUL), {}, {})
    with pytest.raises(FormatError, match="no input has the size U"):
        Executor(program(ADD, MUL, symbols=("T", "U")), W, {})
    with pytest.raises(FormatError, match="no name for a size"):
        Executor(program(ADD, MUL, symbols=("import os",)), W, {})


@pytest.mark.parametrize(
    "x", [torch.ones(2, 5), torch.ones(4), torch.ones(2, 4, dtype=torch.float64)], ids=["size", "rank", "dtype"]
)
def test_inputs_are_checked(x: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"input x: expected float32\[T, 4\]"):
        Executor(program(ADD, MUL), W, {}).check_inputs([x])
    with pytest.raises(InputError, match="takes 1 inputs"):
        Executor(program(ADD, MUL), W, {}).check_inputs([])


def test_arena_outside_of_its_block_is_refused() -> None:
    far = dataclasses.replace(program(), arena_bytes="T*8")
    with pytest.raises(FormatError, match="buffer k lies outside"):
        Executor(far, W, {}).frames.at((3,))


def test_a_failing_step_is_named_after_a_profile_too() -> None:
    run = Executor(program(ADD, MUL), W, {})
    run.profile([torch.ones(2, 4)])
    with pytest.raises(StepError, match="node add"):
        run([torch.ones(2, 5)])


def test_kernels_get_weights_and_arena_in_their_own_form() -> None:
    class Wrapped:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    def scale(x: torch.Tensor, w: Wrapped, out: Wrapped) -> None:
        torch.mul(x, w.tensor, out=out.tensor)

    first = Step("kernel", "scale", "s", ({"buffer": 0}, {"buffer": 1}, {"buffer": 4}))
    second = Step("aten", "aten.clone.default", "c", ({"buffer": 4},), outputs=(3,))
    x = torch.randn(3, 4)
    assert torch.equal(Executor(program(first, second), W, {"scale": scale}, Wrapped)([x])[0], x * W["w"])


def test_views_of_the_arena_are_made_once_per_size() -> None:
    calls = []

    def triple(x: torch.Tensor, out: torch.Tensor) -> None:
        calls.append(out.data_ptr())
        torch.mul(x, 3.0, out=out)

    view = Step("aten", "aten.view.default", "v", ({"buffer": 4}, [{"size": "T*2"}, 2]), outputs=(5,))
    steps = (
        Step("kernel", "triple", "t", ({"buffer": 0}, {"buffer": 4})),
        Step("aten", "aten.view.default", "w", ({"buffer": 5}, [-1, 4]), outputs=(2,)),
        Step("aten", "aten.clone.default", "c", ({"buffer": 2},), outputs=(3,)),
    )
    one = program(*steps, views=(view,))
    one = dataclasses.replace(one, buffers=(*one.buffers, Buffer("v", "float32", ("T*2", 2), "view")))
    run = Executor(one, W, {"triple": triple})
    for tokens in (3, 1, 3):
        x = torch.randn(tokens, 4)
        assert torch.equal(run([x])[0], x * 3)
    assert len(set(calls)) == 1
    wrong = dataclasses.replace(one, views=(dataclasses.replace(view, outputs=(3,)),))
    with pytest.raises(FormatError, match="v is no view of the arena"):
        Executor(wrong, W, {"triple": triple})

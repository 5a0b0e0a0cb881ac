from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moec.compiler.errors import CheckpointError
from moec.compiler.export.weights_file import write_weights
from moec.compiler.kernels.experts.call import pack as experts_pack
from moec.compiler.kernels.spec import ExpertsProblem
from moec.compiler.lowering.packing import (
    cuda_codes,
    cuda_scales,
    e4m3_codes,
    e4m3_scales,
    make,
    packed_bias_down,
    packed_bias_gate_up,
    packed_down,
    packed_gate_up,
)
from moec.passes.ir.formats import parse_format
from moec.passes.ir.quantised import quantised
from moec.passes.ir.weights import cast, source, stack
from moec.runtime.loader import map_weights

SOURCES = {
    "a": torch.arange(15.0).view(3, 5),
    "b": torch.randn(3, 5),
    "mask": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5),
    "none": torch.zeros(0, 4),
}
A, B = (source(n, (3, 5), torch.float32) for n in "ab")
WEIGHTS = {
    "first": A,
    "both": cast(stack([A, B]), torch.bfloat16),
    "mask": source("mask", (3,), torch.bool),
    "scalar": source("scalar", (), torch.float32),
    "none": source("none", (0, 4), torch.float32),
}


def test_reads_back_with_the_official_reader_and_mapped(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_weights(path, WEIGHTS, SOURCES.__getitem__)
    mapped, official = map_weights(path), load_file(path)
    assert list(WEIGHTS) == [n for n in official if not n.startswith(".")] or set(WEIGHTS) <= set(official)
    assert set(mapped) == set(WEIGHTS)
    for name, weight in WEIGHTS.items():
        expected = weight.materialise(SOURCES.__getitem__)
        for found in (mapped[name], official[name]):
            assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_tensors_lie_on_cache_lines(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_weights(path, WEIGHTS, SOURCES.__getitem__)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    starts = [8 + length + header[n]["data_offsets"][0] for n in WEIGHTS]
    assert all(s % 64 == 0 for s in starts)


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_weights(tmp_path / name, WEIGHTS, SOURCES.__getitem__)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_one_weight_is_in_memory_at_a_time(tmp_path: Path) -> None:
    order: list[str] = []

    def read(name: str) -> torch.Tensor:
        order.append(name)
        return SOURCES[name]

    seen: list[tuple[int, int]] = []
    write_weights(tmp_path / "w", WEIGHTS, read, progress=lambda done, total: seen.append((done, total)))
    assert order == ["a", "a", "b", "mask", "scalar", "none"]
    assert seen[-1] == (60 + 60 + 3 + 4, 127)


@pytest.mark.parametrize("act", ["silu", "!relu2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_stacks_are_made_expert_by_expert(tmp_path: Path, act: str, dtype: str) -> None:
    """The same bytes as the kernels' own packing of the whole stack, for sizes that need padding."""
    problem = ExpertsProblem(hidden=20, inner=12, num_experts=3, top_k=1, act=act, dtype=dtype, has_bias=True)
    rows = 12 if act.startswith("!") else 24
    shapes = {"up": (rows, 20), "down": (20, 12), "b_up": (rows,), "b_down": (20,)}
    kind = getattr(torch, dtype)
    tensors = {f"{n}{e}": torch.randn(s).to(kind) for n, s in shapes.items() for e in range(3)}
    stacks = {n: stack([source(f"{n}{e}", s, kind) for e in range(3)]) for n, s in shapes.items()}
    packed = {
        "up": packed_gate_up(problem, stacks["up"]),
        "down": packed_down(problem, stacks["down"]),
        "b_up": packed_bias_gate_up(problem, stacks["b_up"]),
        "b_down": packed_bias_down(stacks["b_down"]),
    }
    write_weights(tmp_path / "w", packed, tensors.__getitem__)
    expected = experts_pack(problem, *(s.materialise(tensors.__getitem__) for s in stacks.values()))
    found = map_weights(tmp_path / "w")
    for name, tensor in zip(
        packed, (expected.w_gate_up, expected.w_down, expected.b_gate_up, expected.b_down), strict=True
    ):
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize(
    ("weight", "message"),
    [(source("gone", (3,), torch.float32), "gone"), (source("a", (5, 3), torch.float32), r"expected shape \[5, 3\]")],
)
def test_a_source_that_does_not_fit_is_named(tmp_path: Path, weight: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"weight w cannot be made .*{message}"):
        write_weights(tmp_path / "w", {"w": weight}, SOURCES.__getitem__)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_tensor_that_is_not_finite_is_named(tmp_path: Path, bad: float) -> None:
    damaged = SOURCES | {"b": torch.where(SOURCES["b"] == SOURCES["b"].max(), bad, SOURCES["b"])}
    with pytest.raises(CheckpointError, match="tensor b holds NaN or infinity"):
        write_weights(tmp_path / "w", WEIGHTS, damaged.__getitem__)


def test_what_the_compiler_computes_itself_may_be_infinite(tmp_path: Path) -> None:
    mask = source("computed:mask", (2,), torch.float32)
    write_weights(tmp_path / "w", {"mask": mask}, lambda name: torch.tensor([0.0, -float("inf")]))
    assert map_weights(tmp_path / "w")["mask"].tolist() == [0.0, -float("inf")]


def test_numbers_too_large_for_the_dtype(tmp_path: Path) -> None:
    large = {"a": torch.full((2,), 1e6)}
    with pytest.raises(CheckpointError, match="numbers are too large"):
        write_weights(tmp_path / "w", {"w": cast(source("a", (2,), torch.float32), torch.float16)}, large.__getitem__)


@pytest.mark.parametrize(
    ("format", "codes", "scales"), [("fp8-w8a8", e4m3_codes, e4m3_scales), ("int4-g64", cuda_codes, cuda_scales)]
)
def test_codes_and_scales_of_a_stack_are_read_once(tmp_path: Path, format, codes, scales) -> None:
    """Whichever comes first in the file, they are what each is when made alone."""
    torch.manual_seed(0)
    experts = {f"e{i}": torch.randn(32, 128) for i in range(3)}
    inner = stack([quantised(source(name, (32, 128), torch.float32), parse_format(format), name) for name in experts])
    pair = {"w": codes(inner), "w_scale": scales(inner)}
    expected = {name: make(weight, experts.__getitem__) for name, weight in pair.items()}
    for order, reads in ((("w", "w_scale"), 1), (("w_scale", "w"), 2)):
        count: Counter[str] = Counter()

        def read(name: str, count: Counter[str] = count) -> torch.Tensor:
            count[name] += 1
            return experts[name]

        write_weights(tmp_path / order[0], {name: pair[name] for name in order}, read)
        assert count == dict.fromkeys(experts, reads)
        for name, tensor in map_weights(tmp_path / order[0]).items():
            same = tensor.view(torch.uint8) == expected[name].view(torch.uint8)
            assert tensor.dtype == expected[name].dtype and bool(same.all())

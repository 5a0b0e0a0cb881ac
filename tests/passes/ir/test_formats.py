"""Weight formats: names, bytes, what codes mean, and the parts of quantised weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moec.passes.ir.formats import NAMES, FormatError, parse_format
from moec.passes.ir.quantise import dequantise_parts, quantise
from moec.passes.ir.quantised import quantised, quantised_parts, refusal, stored_format, unstacked
from moec.passes.ir.weights import (
    Weight,
    cast,
    concat,
    dequantised,
    reshape,
    slice_,
    source,
    stack,
    transpose,
    unpacked,
)

pytestmark = pytest.mark.null

RMS_OF_NORMAL = {
    "f32": 0.0, "bf16": 0.0018, "bf16-packed": 0.0018, "f16": 0.0003,
    "fp8": 0.028, "fp8-tensor": 0.028, "fp8-block128": 0.028,
    "int8": 0.009, "int8-w8a8": 0.009, "int4": 0.105, "int4-g32": 0.085, "int4-g64": 0.095, "int4-g128": 0.105,
    "int4-g32-asym": 0.08, "int4-g64-asym": 0.09, "int4-g128-asym": 0.1, "nf4": 0.09, "nf4-g32": 0.083,
    "nf4-g64": 0.09, "nf4-g128": 0.094, "mxfp4": 0.115, "int3-g32": 0.17, "int3-g64": 0.185, "int2-g16": 0.31,
    "int2-g32": 0.34, "int2-g64": 0.37, "ternary": 0.45,
}  # fmt: skip
"""Relative RMS error on normal weights: about 5 % above what each format reached when it was written."""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize("name", NAMES)
def test_every_format_is_within_its_error(name: str) -> None:
    w = normal(2, 128, 256)
    parts = quantise(w, parse_format(name))
    error = (dequantise_parts(parts) - w).square().mean().sqrt() / w.square().mean().sqrt()
    assert error <= RMS_OF_NORMAL[name]
    if not parts.format.is_plain:
        low, high = (0, 255) if parts.format.kind != "int" else parts.format.code_range
        assert low <= int(parts.codes.min()) and int(parts.codes.max()) <= high


@pytest.mark.parametrize("name", [*NAMES, "int4-a8", "int4-g64-asym-f16-a8", "int8-g64", "int3", "int8-g32-f32"])
def test_names_are_canonical(name: str) -> None:
    format = parse_format(name)
    assert parse_format(format.name) == format
    fitted = format.fitted(256)
    assert parse_format(fitted.name) == fitted and not fitted.wider


def test_quantising_what_is_quantised_changes_nothing() -> None:
    """Codes and scales of numbers that a format holds exactly give the same numbers again."""
    for name in ("int8", "int4-g32", "int4-g32-asym", "int2-g16", "mxfp4", "nf4-g64", "fp8-block128"):
        first = dequantise_parts(quantise(normal(64, 256), parse_format(name)))
        again = dequantise_parts(quantise(first, parse_format(name)))
        # one rounding of the scale, which here is a float32 or a bfloat16 of 8 bits
        assert (again - first).square().mean() <= 1e-3 * first.square().mean(), name


@pytest.mark.parametrize(
    "name, bits", [("int4-g128", 4.125), ("int4-g32-asym", 4.75), ("mxfp4", 4.25), ("int2-g16", 3)]
)
def test_bits_of_a_value(name: str, bits: float) -> None:
    assert 8 * parse_format(name).matrix_bytes(4096, 14336) / (4096 * 14336) == bits


def test_ternary_stores_five_in_a_byte() -> None:
    assert parse_format("ternary").matrix_bytes(7, 12) == 7 * 3 + 7 * 4


def test_int4_takes_the_first_group_that_divides() -> None:
    assert [parse_format("int4").fitted(k).name for k in (256, 64, 96)] == ["int4-g128", "int4-g64", "int4-g32"]
    assert parse_format("int4-asym-a8").fitted(64).name == "int4-g64-asym-a8"


@pytest.mark.parametrize(
    "name, shape, message",
    [("int4", (8, 40), "128 or 64 or 32"), ("mxfp4", (8, 48), "no multiple of mxfp4's groups of 32")],
)
def test_a_group_must_divide(name: str, shape: tuple[int, int], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        quantise(normal(*shape), parse_format(name), "layers.0.down")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_must_be_finite(bad: float) -> None:
    w = normal(8, 64)
    w[3, 5] = bad
    with pytest.raises(FormatError, match=r"layers.0.down: holds NaN or infinity"):
        quantise(w, parse_format("int8"), "layers.0.down")


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(FormatError, match="'int5' is unknown; known: f32, bf16"):
        parse_format("int5")


def test_groups_of_zeros_stay_zero() -> None:
    w = normal(8, 256)
    w[2] = 0
    for name in NAMES:
        parts = quantise(w, parse_format(name))
        assert not dequantise_parts(parts)[2].any(), name
        assert parts.scales is None or bool((parts.scales != 0).all()), name


def test_quantised_weights_mean_their_codes() -> None:
    tensors = {f"e{i}": normal(32, 64, seed=i) for i in range(3)}
    whole = stack([source(n, (32, 64), torch.float32) for n in tensors])
    w = quantised(whole, parse_format("int4-g32"), "experts")
    assert stored_format(w) == parse_format("int4-g32") and w.op == "stack"
    parts = quantised_parts(w, tensors.__getitem__)
    assert parts.codes.shape == (3, 32, 64)
    assert torch.equal(dequantise_parts(parts), w.materialise(tensors.__getitem__))
    assert torch.equal(cast(w, torch.bfloat16).materialise(tensors.__getitem__), dequantise_parts(parts).bfloat16())


def test_joined_stacks_are_quantised_expert_by_expert() -> None:
    """Gate and up stacks joined, turned, sliced and cast: each expert is made of its own tensors."""
    tensors = {f"{n}{e}": normal(32, 64, seed=8 * e + ord(n)) for e in range(3) for n in "gu"}
    halves = [stack([source(f"{n}{e}", (32, 64), torch.float32) for e in range(3)]) for n in "gu"]
    whole = slice_(transpose(transpose(concat(halves, 1), 1, 2), 1, 2), 1, 0, 64, 2)
    whole = cast(cast(whole, torch.bfloat16), torch.float32)
    w = quantised(whole, parse_format("int8"), "experts")
    assert w.op == "stack" and len(w.inputs) == 3 and w.shape == whole.shape == (3, 32, 64)
    assert set(w.inputs[1].sources()) == {"g1", "u1"}
    expected = dequantise_parts(quantise(whole.materialise(tensors.__getitem__), parse_format("int8")))
    assert torch.equal(w.materialise(tensors.__getitem__), expected)


def test_experts_chosen_from_stacks_and_joined_are_quantised_one_by_one() -> None:
    """A rank's experts, and shared ones behind them; not where one tensor holds several."""
    tensors = {f"e{e}": normal(32, 64, seed=e) for e in range(4)} | {"s": normal(32, 64, seed=9)}
    sources = [source(n, (32, 64), torch.float32) for n in tensors]
    routed = slice_(slice_(stack(sources[:4]), 0, 1, 4), 0, 0, 3, 2)
    whole = concat([routed, reshape(sources[4], (1, 32, 64))], 0)
    w = quantised(whole, parse_format("int8"), "experts")
    assert [list(part.sources()) for part in w.inputs] == [["e1"], ["e3"], ["s"]]
    expected = dequantise_parts(quantise(whole.materialise(tensors.__getitem__), parse_format("int8")))
    assert torch.equal(w.materialise(tensors.__getitem__), expected)
    one_tensor = source("all", (4, 32, 64), torch.float32)
    assert unstacked(concat([whole, one_tensor], 0)) is None and unstacked(transpose(whole, 0, 1)) is None


def test_mixed_formats_have_no_common_parts() -> None:
    sources = [source(n, (32, 64), torch.float32) for n in "ab"]
    w = stack([quantised(s, parse_format(f), "w") for s, f in zip(sources, ("int8", "int4"), strict=True)])
    assert stored_format(w) is None and "different formats: int4-g64, int8" in refusal(w)


def gptq(k: int = 64, n: int = 16, group: int = 32) -> tuple[Weight, dict[str, torch.Tensor]]:
    """[n, k] as GPTQ stores it: words along K, zeros one less."""
    g = torch.Generator().manual_seed(0)
    tensors = {
        "q": torch.randint(-(2**31), 2**31, (k // 8, n), generator=g, dtype=torch.int64).to(torch.int32),
        "s": (torch.rand(k // group, n, generator=g) + 0.5).half(),
        "z": torch.randint(-(2**31), 2**31, (k // group, n // 8), generator=g, dtype=torch.int64).to(torch.int32),
    }
    codes, scales, zeros = (source(name, tuple(t.shape), t.dtype) for name, t in tensors.items())
    w = dequantised(unpacked(codes, 4, 0), scales, unpacked(zeros, 4, 1), (group, 1), 1)
    return transpose(w, 0, 1), tensors


def int8_rows(n: int = 16, k: int = 64) -> tuple[Weight, dict[str, torch.Tensor]]:
    tensors = {"q": torch.randint(-128, 128, (n, k), dtype=torch.int8), "s": torch.rand(n, 1).bfloat16() + 1}
    codes, scales = (source(name, tuple(t.shape), t.dtype) for name, t in tensors.items())
    return dequantised(codes, scales, None, (1, k)), tensors


def mxfp4(n: int = 16, k: int = 64) -> tuple[Weight, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    tensors = {
        "q": torch.randint(0, 256, (2, n, k // 32, 16), generator=g).to(torch.uint8),
        "s": torch.randint(100, 140, (2, n, k // 32), generator=g).to(torch.uint8),
    }
    blocks, scales = (source(name, tuple(t.shape), t.dtype) for name, t in tensors.items())
    codes = reshape(unpacked(blocks, 4, 3), (2, n, k))
    return dequantised(codes, scales, None, (1, 32), kind="e2m1"), tensors


def fp8_blocks(n: int = 256, k: int = 384) -> tuple[Weight, dict[str, torch.Tensor]]:
    tensors = {"q": normal(n, k).to(torch.float8_e4m3fn), "s": torch.rand(n // 128, k // 128) + 0.5}
    codes, scales = (source(name, tuple(t.shape), t.dtype) for name, t in tensors.items())
    return dequantised(codes, scales, None, (128, 128)), tensors


def rows_in_turn(w: Weight) -> Weight:
    """Even rows before odd ones, as interleaved gate and up halves are brought into order."""
    return concat([slice_(w, -2 % len(w.shape), s, w.shape[-2], 2) for s in (0, 1)], -2 % len(w.shape))


def fp8_tensor_pair() -> tuple[Weight, dict[str, torch.Tensor]]:
    """Two matrices with one scale each, joined: one scale for each row."""
    tensors = {n: normal(16, 64, seed=ord(n)).to(torch.float8_e4m3fn) for n in "ab"}
    tensors |= {"sa": torch.rand(1, 1) + 0.5, "sb": torch.rand(1, 1) + 0.5}
    parts = [
        dequantised(source(n, (16, 64), torch.float8_e4m3fn), source(f"s{n}", (1, 1), torch.float32), None, (16, 64))
        for n in "ab"
    ]
    return concat(parts, 0), tensors


STORED = {
    "gptq": (lambda: gptq(), "int4-g32-asym-f16"),
    "int8": (lambda: int8_rows(), "int8"),
    "mxfp4": (lambda: mxfp4(), "mxfp4"),
    "mxfp4 transposed twice, rows in turn": (
        lambda: (rows_in_turn(transpose(transpose(mxfp4()[0], 1, 2), 1, 2)), mxfp4()[1]),
        "mxfp4",
    ),
    "fp8 blocks": (lambda: fp8_blocks(), "fp8-block128"),
    "fp8 per tensor, joined": (fp8_tensor_pair, "fp8"),
}


@pytest.mark.parametrize("case", STORED)
def test_checkpoint_weights_keep_their_codes(case: str) -> None:
    make, name = STORED[case]
    w, tensors = make()
    assert refusal(w) == ""
    format = stored_format(w)
    assert format is not None and format.name == name
    parts = quantised_parts(w, tensors.__getitem__)
    assert parts.format == format
    # exact: the same codes, the same scales, one float32 product each
    assert torch.equal(dequantise_parts(parts), w.materialise(tensors.__getitem__))
    stacked = stack([cast(w, torch.bfloat16)] * 2)
    assert quantised_parts(stacked, tensors.__getitem__).codes.shape == (2, *w.shape)


def test_slices_of_stored_weights() -> None:
    w, tensors = fp8_blocks()
    part = slice_(slice_(w, 0, 128, 256), 1, 128, 384)
    parts = quantised_parts(part, tensors.__getitem__)
    assert torch.equal(dequantise_parts(parts), part.materialise(tensors.__getitem__))
    assert "cuts through blocks of 128" in refusal(slice_(w, 0, 64, 192))
    assert stored_format(source("x", (4, 4), torch.float32)) is None


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_damaged_scales_are_refused(scale: float) -> None:
    w, tensors = int8_rows()
    tensors["s"][3] = scale
    with pytest.raises(FormatError, match=f"a scale is {scale:g}, expected a finite number other than 0"):
        quantised_parts(w, tensors.__getitem__)


def test_other_forms_say_why() -> None:
    w, _ = fp8_blocks()
    odd = dataclasses.replace(w, args=(64, 64, 0, "number"))
    assert refusal(odd) == "8-bit floats with scales for blocks of 64 x 64"

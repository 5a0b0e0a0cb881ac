"""Stored weights: the runtime reads what passes/ir/stored.py writes, and its library functions compute with it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from moec.compiler.lowering.writer import format_fields
from moec.passes.ir.formats import NAMES, WeightFormat, parse_format
from moec.passes.ir.quantise import Parts, dequantise_parts, quantise
from moec.passes.ir.stored import store, stored_matrix_bytes
from moec.runtime.errors import FormatError
from moec.runtime.launch.experts import experts, stored_experts
from moec.runtime.launch.stored import ROWS_BY_BYTES, StoredMatrix, stored_embedding, stored_linear, stored_weight

pytestmark = pytest.mark.cpu
ALL = (*NAMES, "int3-g32-asym", "int2-g16-asym", "int8-asym", "int4-g32-f16", "int8-g64")


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def parts_of(name: str, *shape: int, seed: int = 0) -> Parts:
    return quantise(normal(*shape, seed=seed, scale=0.1), parse_format(name))


@pytest.mark.parametrize("name", ALL)
def test_the_runtime_reads_what_is_written(name: str) -> None:
    """Exact: the same codes and the same float32 product. 200 rows end within a block of 128."""
    parts = parts_of(name, 3, 200, 256)
    stored = store(parts)
    assert stored.numel() == 3 * stored_matrix_bytes(parts.format, 200, 256)
    found = stored_weight([format_fields(parts.format)], [3, 200, 256], "float32")(stored)
    assert torch.equal(found, dequantise_parts(parts))


@pytest.mark.parametrize(
    "name", ("int8", "int4-g32", "int3-g64-asym", "ternary", "mxfp4", "fp8-block128", "fp8-tensor")
)
def test_embedding_reads_the_wanted_rows(name: str) -> None:
    parts = parts_of(name, 200, 256)
    index = torch.tensor([[3, 199], [0, 130]])
    found = stored_embedding(format_fields(parts.format), 200, 256, "float32")(store(parts), index)
    assert torch.equal(found, dequantise_parts(parts)[index])


def int8_rows(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def test_linear_rounds_activations_where_the_format_says_so() -> None:
    parts, x, bias = parts_of("int8-w8a8", 96, 128), normal(7, 128, seed=1), normal(96, seed=2)
    expected = F.linear(int8_rows(x.double()), dequantise_parts(parts).double(), bias.double())
    found = stored_linear(format_fields(parts.format), 96, 128)(x, store(parts), bias)
    assert torch.allclose(found.double(), expected, atol=1e-5)  # float32 sums of 128
    plain = F.linear(x.double(), dequantise_parts(parts).double(), bias.double())
    assert (found - plain).abs().max() > 1e-3  # rounding activations is seen


@pytest.mark.parametrize("rows", [0, 1, ROWS_BY_BYTES, ROWS_BY_BYTES + 1])
def test_int8_linear_in_bf16(rows: int) -> None:
    """Few rows multiply the bytes, many make the matrix first: both are within bfloat16's rounding."""
    parts, x = parts_of("int8", 96, 128), normal(rows, 128, seed=1).bfloat16()
    found = stored_linear(format_fields(parts.format), 96, 128)(x, store(parts), None)
    expected = F.linear(x.double(), dequantise_parts(parts).double())
    assert found.dtype == torch.bfloat16 and found.shape == (rows, 96)
    # weights, scales and the result are rounded to 8 bits each: 3 * 2 ** -9 of the largest
    assert not rows or (found.double() - expected).abs().max() <= 6e-3 * expected.abs().max()


def layer(formats: list[str], act: str = "silu") -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "x": normal(9, 64, seed=1),
        "weights": torch.rand(9, 2, generator=g),
        "index": torch.rand(9, len(formats) - 1, generator=g).argsort(-1)[:, :2],
        "w_in": normal(len(formats), 128, 64, seed=2, scale=0.1),
        "w_out": normal(len(formats), 64, 64, seed=3, scale=0.1),
    }


@pytest.mark.parametrize("on_input", [False, True])
def test_experts_in_mixed_formats(on_input: bool) -> None:
    """Each expert in its own format, the last one shared: as the library on the numbers. Exact but for sums' order."""
    names = ["int4-g32", "int8", "f32", "ternary", "int2-g16", "mxfp4"]
    t = layer(names)
    formats = [parse_format(n) for n in names]
    stored, numbers = zip(*(_per_expert(t[n], formats) for n in ("w_in", "w_out")), strict=True)
    fields = [format_fields(f) for f in formats]
    shapes = [list(t[n].shape) for n in ("w_in", "w_out")]
    made = stored_experts("silu", fields, fields, shapes, num_shared=1, weight_on_input=on_input)
    found = made(t["x"], t["weights"], t["index"], *stored)
    expected = experts("silu", 1, on_input)(t["x"], t["weights"], t["index"], *numbers)
    assert torch.allclose(found, expected, atol=1e-6)
    assert made(t["x"][:0], t["weights"][:0], t["index"][:0], *stored).shape == (0, 64)


def _per_expert(w: torch.Tensor, formats: list[WeightFormat]) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [quantise(one, f) for one, f in zip(w, formats, strict=True)]
    return torch.cat([store(p) for p in parts]), torch.stack([dequantise_parts(p) for p in parts])


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(FormatError, match="unknown to this runtime"):
        StoredMatrix({**format_fields(parse_format("int8")), "scale": "f8"}, 4, 4)
    fields = format_fields(parse_format("int8"))
    with pytest.raises(FormatError, match="2 formats for 3 experts"):
        stored_weight([fields, fields], [3, 4, 4], "float32")

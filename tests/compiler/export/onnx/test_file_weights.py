"""--weights of ONNX files: what it says, files that hold it, answers on the rounded numbers, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from stacked_block import Block, E, H
from torch import nn

import moec
from moec.compiler.errors import CompileError
from moec.compiler.export.onnx.codes import CodedStack, format_of, laid_out
from moec.compiler.export.onnx.errors import ExportError
from moec.compiler.export.onnx.file_weights import FileWeights, parse_file_weights
from moec.compiler.export.onnx.session import open_session
from moec.passes.ir.formats import parse_format
from moec.passes.ir.quantise import dequantise_parts, quantise
from moec.passes.ir.quantised import quantised
from moec.passes.ir.weights import source, stack

pytestmark = pytest.mark.cpu
TOLERANCE = 5e-6  # float32 sums in another order; QMoE's weights go through log and exp


def rounded(format: str, block: Block, experts_only: bool = True) -> Block:
    """The block with the numbers that the file holds."""
    made = Block(block.act, block.w_out.shape[2])
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.startswith("w_") or (not experts_only and p.dim() > 1):
                p.copy_(dequantise_parts(quantise(p, parse_format(format))))
    return made


def written(folder: Path, block: Block, **options: Any) -> moec.compiler.export.onnx.publish.ExportReport:
    return moec.export_onnx(block, folder / "m.onnx", (torch.randn(5, H),), **options)


def error_of(path: Path, block: Block) -> float:
    """ONNX Runtime's answer on new tokens against a module's."""
    x = torch.randn(11, H)
    (found,) = open_session(path, threads=1).run(None, {"x": x.numpy()})
    with torch.no_grad():
        expected = block(x)
    return float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", ["portable", "com.microsoft"])
@pytest.mark.parametrize(("asked", "format"), [("int4", "int4-g32"), ("experts=int8", "int8"), ("int4-g16-asym", "")])
def test_experts_as_codes(tmp_path: Path, kind: str, asked: str, format: str) -> None:
    report = written(tmp_path, Block(), experts=kind, weights=asked)
    (layer,) = report.record["coverage"]
    assert layer["stored"] == (format or asked) and len(set(layer["sha256"])) == E
    assert (
        layer["op"] == "com.microsoft.QMoE" if kind == "com.microsoft" else layer["op"].startswith("moec.Experts_silu_")
    )
    assert 1e-4 < report.record["rounding"]["max_rel_change"] < 0.5
    assert report.record["verified"]["max_rel_err"] <= TOLERANCE
    assert error_of(report.path, rounded(layer["stored"], Block())) <= TOLERANCE
    metadata = {p.key: p.value for p in onnx.load(report.path, load_external_data=False).metadata_props}
    assert metadata["moec.expert_weights"] == layer["stored"]


@pytest.mark.parametrize("kind", ["portable", "com.microsoft"])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_matrices_of_half_the_width(tmp_path: Path, kind: str, dtype: str) -> None:
    report = written(tmp_path, Block(), experts=kind, weights=dtype)
    assert report.record["coverage"][0]["stored"] == dtype
    assert error_of(report.path, rounded(dtype, Block(), experts_only=False)) <= TOLERANCE
    tensors = onnx.load(report.path, load_external_data=False).graph.initializer
    wide = {tuple(t.dims) for t in tensors if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1}
    assert not wide
    numbers = sum(p.numel() for p in Block().parameters() if p.dim() > 1)
    assert (tmp_path / "m.onnx.data").stat().st_size < 2 * numbers + (1 << 16)


def test_both(tmp_path: Path) -> None:
    report = written(tmp_path, Block(), weights="model=bf16,experts=int4-g32", experts="com.microsoft")
    types = {t.name: t.data_type for t in onnx.load(report.path, load_external_data=False).graph.initializer}
    assert types["head.weight.transposed"] == onnx.TensorProto.BFLOAT16
    assert report.record["coverage"][0]["stored"] == "int4-g32"


def test_a_changed_scale_is_found(tmp_path: Path, monkeypatch) -> None:
    from moec.compiler.export.onnx import publish

    plain = publish.write_model

    def write(model, path, recipes, read, progress):
        plain(model, path, recipes, read, progress)
        name, place = next(
            (t.name, {e.key: e.value for e in t.external_data})
            for t in onnx.load(path, load_external_data=False).graph.initializer
            if t.name.endswith("s_out")
        )
        data = np.memmap(path.with_name(place["location"]), np.uint8, "r+")
        data[int(place["offset"]) + int(place["length"]) - 4] ^= 1  # the last expert's last scale, its lowest bit
        data.flush()
        assert name

    monkeypatch.setattr(publish, "write_model", write)
    with pytest.raises(ExportError, match=f"expert {E - 1} in m.onnx is not the checkpoint's"):
        written(tmp_path, Block(), weights="int8", experts="com.microsoft")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int8-g32", "experts": "com.microsoft"}, "rounds activations to 8 bits; choose such a format"),
        ({"weights": "int2-g16", "experts": "com.microsoft"}, "int4 in groups of 16 to 256 and with int8 by rows"),
        ({"weights": "int4-g64"}, "groups of 64 do not divide all widths of the experts, 64, 96"),
        ({"weights": "mxfp4"}, "mxfp4 has no codes in ONNX files; known: "),
        ({"weights": "int8-w8a8"}, "int8-w8a8 has no codes in ONNX files"),
        ({"weights": "bf16-packed"}, "bf16-packed has no codes in ONNX files"),
        ({"weights": "attention=int8"}, "attention=int8: an ONNX file has codes for experts alone"),
        ({"weights": "auto:3.0bits"}, "formats for a size: an ONNX file has codes for experts alone"),
        ({"weights": "int5"}, "weight format 'int5' is unknown"),
    ],
)
def test_what_a_file_cannot_hold_is_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        written(tmp_path, Block(), **options)
    assert not os.listdir(tmp_path)


def test_qmoe_without_the_activation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"activation gelu: .*use --experts portable"):
        written(tmp_path, Block("gelu"), weights="int8", experts="com.microsoft")
    assert written(tmp_path, Block("gelu"), weights="int8").record["coverage"][0]["stored"] == "int8"


def test_codes_without_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no layer with experts was found; leave it out"):
        moec.export_onnx(nn.Linear(64, 64), tmp_path / "m.onnx", (torch.randn(3, 64),), weights="int4")


def test_numbers_too_large_for_float16_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    with torch.no_grad():
        model.weight[3, 4] = 1e6
    with pytest.raises(CompileError, match="too large for f16; choose bf16 or f32"):
        moec.export_onnx(model, tmp_path / "m.onnx", (torch.randn(3, 64),), weights="f16")
    assert not os.listdir(tmp_path)


def test_what_the_option_says() -> None:
    assert parse_file_weights(None) == parse_file_weights("f32") == FileWeights()
    assert parse_file_weights("f16") == FileWeights("f16")
    assert parse_file_weights("int4-g64") == FileWeights("f32", parse_format("int4-g64"))
    assert str(parse_file_weights("model=bf16,experts=int8")) == "model=bf16,experts=int8"
    assert not FileWeights().rounds and FileWeights("bf16").rounds


@pytest.mark.parametrize("name", ["int8", "int8-asym", "int4-g32", "int4-g32-asym", "int2-g16"])
def test_the_layout_of_a_stack(name: str) -> None:
    """Parts that are asked for in any order are those of each expert; the zeros of 4 bits fill one byte and a half."""
    matrices = {f"e{e}": torch.randn(8, 96, generator=torch.Generator().manual_seed(e)) for e in range(3)}
    weight = stack([quantised(source(n, (8, 96), torch.float32), parse_format(name), n) for n in matrices])
    assert format_of(weight) == parse_format(name)
    coded = CodedStack(weight, in_turn=True)
    for part, tensor in reversed(coded.parts().items()):
        made = tensor.make(matrices.__getitem__)
        assert made.shape == tensor.shape and made.dtype == tensor.dtype
        for e, matrix in enumerate(matrices.values()):
            one = laid_out(quantise(matrix, parse_format(name)), False)[part]
            assert torch.equal(made[e][0::2], one[:4]) and torch.equal(made[e][1::2], one[4:])


def test_the_record_says_what_rounding_changed(tmp_path: Path) -> None:
    report = written(tmp_path, Block(), weights="bf16")
    record = json.loads((tmp_path / "m.onnx.json").read_text())
    assert record["rounding"] == {"weights": "model=bf16", **{"max_rel_change": record["rounding"]["max_rel_change"]}}
    assert record["rounding"]["max_rel_change"] == report.record["rounding"]["max_rel_change"] > 0


def program(dtype: torch.dtype) -> torch.export.ExportedProgram:
    tokens = torch.export.Dim("T", min=1, max=1 << 20)
    with torch.no_grad():
        given = (torch.randn(5, H).to(dtype),)
        return torch.export.export(Block().to(dtype).eval(), given, dynamic_shapes=({0: tokens},))


@pytest.mark.parametrize(("kind", "weights"), [("portable", None), ("com.microsoft", None), ("com.microsoft", "int8")])
def test_arithmetic_in_float16_runs(tmp_path: Path, kind: str, weights: str | None) -> None:
    """ONNX Runtime widens where it has no kernel, and so does the graph around com.microsoft's node."""
    report = moec.export_onnx(program(torch.float16), tmp_path / "m.onnx", experts=kind, weights=weights)
    assert report.record["verified"]["tolerance"] == 2e-2
    assert report.record["verified"]["max_rel_err"] < 4e-3  # a few roundings of 2 ** -11
    assert report.record["coverage"][0]["stored"] == (weights or "f16")


def test_arithmetic_in_bfloat16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"computes in bfloat16, .* export a float32 model .* with --weights bf16"):
        moec.export_onnx(program(torch.bfloat16), tmp_path / "m.onnx")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_modules_of_half_the_width_are_computed_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    narrow, x = Block().to(dtype), torch.randn(5, H).to(dtype)
    report = moec.export_onnx(narrow, tmp_path / "m.onnx", (x,), weights="bf16" if dtype is torch.bfloat16 else "f16")
    assert report.record["rounding"]["max_rel_change"] == 0
    assert error_of(report.path, Block().to(dtype).float()) <= TOLERANCE


def test_narrow_matrices_are_not_narrowed_otherwise(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"float16; only float32 is narrowed: leave --weights out"):
        moec.export_onnx(program(torch.float16), tmp_path / "m.onnx", weights="bf16")

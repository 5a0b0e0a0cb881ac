"""What `moec export-onnx` writes is read again, whatever its weights are stored as: same answers, same codes."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_files as files
import pytest
import torch
from stacked_block import Block, H

import moec
from moec.compiler.capture import capture
from moec.compiler.errors import UnsupportedModel
from moec.passes.ir.evaluate import evaluate

pytestmark = pytest.mark.cpu
TOLERANCE = 5e-6  # float32 sums in another order; com.microsoft's weights go through log and exp
WEIGHTS = (None, "bf16", "int8", "int8-asym", "int4-g32", "int4-g32-asym", "model=bf16,experts=int4")


@pytest.mark.parametrize("kind", ["portable", "com.microsoft"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_round_trip(tmp_path: Path, kind: str, weights: str | None) -> None:
    moec.export_onnx(Block(), tmp_path / "m.onnx", (torch.randn(5, H),), experts=kind, weights=weights)
    captured = capture(tmp_path / "m.onnx")
    calls = captured.graph_module.graph.find_nodes(op="call_function", target=torch.ops.moec.experts.default)
    assert len(calls) == 1 and captured.moe_layers == (0,)
    x = torch.randn(11, H)
    found = evaluate(captured.graph_module, [x], captured.read)
    assert files.relative_error(found, files.run(tmp_path / "m.onnx", x)[0]) <= TOLERANCE
    sources = {n for w in captured.graph_module.meta["weights"].values() for n in w.sources()}
    assert {n for n in sources if ".s_" in n or ".z_" in n} == _scales(tmp_path / "m.onnx")


def _scales(path: Path) -> set[str]:
    """The file's scales and zeros: an engine made from it stores its codes as they are."""
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    return {t.name for t in tensors if ".s_" in t.name or ".z_" in t.name}


def test_a_file_becomes_one_with_codes(tmp_path: Path) -> None:
    moec.export_onnx(Block(), tmp_path / "wide.onnx", (torch.randn(5, H),))
    report = moec.export_onnx(
        tmp_path / "wide.onnx", tmp_path / "small.onnx", experts="com.microsoft", weights="model=bf16,experts=int4"
    )
    assert report.record["coverage"][0]["stored"] == "int4-g32"
    assert (tmp_path / "small.onnx.data").stat().st_size < (tmp_path / "wide.onnx.data").stat().st_size / 5


def test_codes_of_a_file_are_kept(tmp_path: Path) -> None:
    """No second rounding, and no option: QMoE's codes as a portable node's."""
    moec.export_onnx(
        Block(), tmp_path / "q.onnx", (torch.randn(5, H),), experts="com.microsoft", weights="int4-g32-asym"
    )
    report = moec.export_onnx(tmp_path / "q.onnx", tmp_path / "p.onnx", experts="portable")
    assert report.record["coverage"][0]["stored"] == "int4-g32-asym-f32"
    assert "rounding" not in report.record
    x = torch.randn(11, H)
    both = [files.run(tmp_path / name, x)[0] for name in ("q.onnx", "p.onnx")]
    assert files.relative_error(both[1], both[0]) <= TOLERANCE


@pytest.mark.parametrize(
    ("value", "said"), [("int5", "weight format 'int5' is unknown"), ("int4-g32-asym", "7 inputs")]
)
def test_an_experts_node_that_is_not_what_it_says_is_refused(tmp_path: Path, value: str, said: str) -> None:
    moec.export_onnx(Block(), tmp_path / "m.onnx", (torch.randn(5, H),), weights="int4-g32")
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    (node,) = [n for n in model.graph.node if n.domain == "moec"]
    (attribute,) = [a for a in node.attribute if a.name == "format"]
    attribute.s = value.encode()
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedModel, match=said):
        capture(tmp_path / "m.onnx")

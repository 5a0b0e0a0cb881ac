"""Models through the whole path: ONNX Runtime gives the library's own logits, in one call and in several, with padding.

benchmarks/onnx_sweep.py does this for every family; here are those that differ most: plain top-k; latents, groups and
a selection bias; biases, sinks, windows and clamps; weights on the input and chunks; winner by winner.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from zoo import model_of

from moec.compiler.capture import capture
from moec.compiler.export.onnx.file_weights import FileWeights
from moec.compiler.export.onnx.publish import prepare, publish
from moec.compiler.export.onnx.session import open_session
from moec.passes.ir.formats import parse_format

pytestmark = pytest.mark.cpu
FAMILIES = ("mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "phimoe")
TOLERANCE = 1e-5  # of the largest logit: float32 sums in another order


def no_progress(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The library's model, and the reports of both forms."""
    model = model_of(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    prepared = prepare(capture(model), None, no_progress)
    forms = ("portable", "com.microsoft")
    return model, {kind: publish(prepared, folder / f"{kind}.onnx", kind, 21, no_progress) for kind in forms}


def call(session: Any, ids: torch.Tensor, mask: torch.Tensor, pasts: list[np.ndarray]) -> list[np.ndarray]:
    names = [i.name for i in session.get_inputs()]
    return session.run(None, dict(zip(names, [ids.numpy(), mask.numpy(), *pasts], strict=True)))


def nothing(session: Any, rows: int) -> list[np.ndarray]:
    shapes = [i.shape for i in session.get_inputs()[2:]]
    return [np.zeros([rows, *(d if isinstance(d, int) else 0 for d in s[1:])], np.float32) for s in shapes]


@pytest.mark.parametrize("kind", ["portable", "com.microsoft"])
def test_logits_equal_the_librarys(case, kind: str) -> None:
    model, reports = case
    session = open_session(reports[kind].path, threads=1)
    torch.manual_seed(5)
    ids = torch.randint(2, 128, (2, 12))
    with torch.no_grad():
        expected = model(ids).logits
    scale = float(expected.abs().max())
    ones = torch.ones_like(ids)
    whole = call(session, ids, ones, nothing(session, 2))
    assert float((torch.from_numpy(whole[0]) - expected).abs().max()) <= TOLERANCE * scale
    first = call(session, ids[:, :7], ones[:, :7], nothing(session, 2))
    then = call(session, ids[:, 7:], ones, first[1:])
    assert float((torch.from_numpy(then[0]) - expected[:, 7:]).abs().max()) <= TOLERANCE * scale
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros_like(padded[:, :3]), ones], 1)
    left = call(session, padded, mask, nothing(session, 2))[0][:, 3:]
    assert float((torch.from_numpy(left) - expected).abs().max()) <= TOLERANCE * scale


@pytest.mark.parametrize("kind", ["portable", "com.microsoft"])
def test_one_node_for_the_experts_of_a_layer_and_all_of_them_covered(case, kind: str) -> None:
    _, reports = case
    record = reports[kind].record
    proto = onnx.load(str(reports[kind].path), load_external_data=False)
    onnx.checker.check_model(str(reports[kind].path))
    nodes = [n for n in proto.graph.node if n.domain in ("moec", "com.microsoft")]
    assert len(nodes) == len(record["coverage"]) > 0
    for row in record["coverage"]:
        assert len(set(row["sha256"])) == row["experts"] > 1
    assert record["verified"]["max_rel_err"] <= 1e-5
    metadata = {p.key: p.value for p in proto.metadata_props}
    assert metadata["moec.experts"] == kind
    assert ("moec.min_onnxruntime" in metadata) == (kind == "com.microsoft")
    assert not any("/" in (n.doc_string or "") for n in proto.graph.node)


def test_the_file_names_no_other_file_than_its_own_data(case) -> None:
    path = case[1]["portable"].path
    tensors = onnx.load(str(path), load_external_data=False).graph.initializer
    locations = {e.value for t in tensors for e in t.external_data if e.key == "location"}
    assert locations == {Path(path).name + ".data"}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_model_with_its_experts_as_qmoe(family: str, tmp_path: Path) -> None:
    """int8 by rows; GPT-OSS with its own activation and with biases. The reference has the numbers of the codes."""
    prepared = prepare(capture(model_of(family)), None, no_progress, FileWeights(experts=parse_format("int8")))
    report = publish(prepared, tmp_path / "q.onnx", "com.microsoft", 21, no_progress)
    assert {row["op"] for row in report.record["coverage"]} == {"com.microsoft.QMoE"}
    assert report.record["verified"]["max_rel_err"] <= TOLERANCE
    assert 1e-4 < report.record["rounding"]["max_rel_change"] < 0.2

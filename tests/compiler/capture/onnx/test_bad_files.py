"""Damaged and hostile files: one clear line each, and nothing is written."""

from __future__ import annotations

import os

import numpy as np
import onnx
import onnx_files as files
import pytest
from onnx import helper

import moec
from moec.compiler.capture import capture
from moec.compiler.capture.onnx.file import MOST_BYTES, read_graph
from moec.compiler.errors import CheckpointError, CompileError, UnsupportedModel

X = files.port("x", "float32", ["t", 4])
W = np.arange(16, dtype=np.float32).reshape(4, 4)


def file_of(path, *nodes, constants=None, outputs=("y",), inputs=(X,)):
    return files.write(path, list(nodes), list(inputs), list(outputs), constants)


def external(tmp_path, **entries):
    """A file whose weight lies elsewhere."""
    path = file_of(tmp_path / "m.onnx", helper.make_node("MatMul", ["x", "w"], ["y"]), constants={"w": W})
    return files.externalised(path, **entries)


def test_external_data_is_read_at_its_offset(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "w.bin").write_bytes(b"\0" * 6 + W.tobytes() + b"more")
    path = external(tmp_path, location="data/w.bin", offset=6, length=64)
    assert read_graph(path).constants["w"].tolist() == W.tolist()


@pytest.mark.parametrize("location", ["../w.bin", "/etc/passwd", "a/../../w.bin", "", "a\\b", "c:w.bin", "."])
def test_a_path_out_of_the_folder_is_refused(tmp_path, location):
    (tmp_path / "inner").mkdir()
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    with pytest.raises(CheckpointError, match=r"external data of w: .*no path inside the folder"):
        read_graph(external(tmp_path / "inner", location=location))


@pytest.mark.parametrize("make", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_a_link_is_refused(tmp_path, make):
    (tmp_path / "inner").mkdir()
    (tmp_path / "secret").write_bytes(W.tobytes())
    make(tmp_path / "secret", tmp_path / "inner" / "w.bin")
    with pytest.raises(CheckpointError, match=r"w\.bin.*link"):
        read_graph(external(tmp_path / "inner", location="w.bin"))


def test_a_folder_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    os.symlink(tmp_path, tmp_path / "inner" / "up")
    with pytest.raises(CheckpointError, match="up is a symbolic link"):
        read_graph(external(tmp_path / "inner", location="up/w.bin"))


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"location": "none.bin"}, "no such file"),
        ({"location": "w.bin", "offset": 8}, "64 bytes, the tensor ends at 72"),
        ({"location": "w.bin", "length": 60}, "takes 64 bytes, the file says 60"),
        ({"location": "w.bin", "offset": "-4"}, "offset is '-4'"),
        ({"location": "folder"}, "folder is no regular file"),
    ],
)
def test_external_data_of_another_size_is_refused(tmp_path, entries, said):
    (tmp_path / "w.bin").write_bytes(W.tobytes())
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=said):
        read_graph(external(tmp_path, **entries))


def test_a_cyclic_graph_is_refused(tmp_path):
    nodes = [helper.make_node("Add", ["x", "b"], ["a"], "one"), helper.make_node("Relu", ["a"], ["b"], "two")]
    with pytest.raises(CheckpointError, match=r"cyclic: node one \(Add\)"):
        read_graph(file_of(tmp_path / "m.onnx", *nodes, outputs=["b"]))


def test_nodes_in_any_order_are_sorted(tmp_path):
    nodes = [helper.make_node("Relu", ["a"], ["b"], "two"), helper.make_node("Neg", ["x"], ["a"], "one")]
    graph = read_graph(file_of(tmp_path / "m.onnx", *nodes, outputs=["b"]))
    assert [n.name for n in graph.nodes] == ["one", "two"]


def test_a_value_that_nothing_makes_or_two_make_is_refused(tmp_path):
    add = helper.make_node("Add", ["x", "lost"], ["y"])
    with pytest.raises(CheckpointError, match="reads lost, which nothing makes"):
        read_graph(file_of(tmp_path / "a.onnx", add))
    twice = helper.make_node("Relu", ["x"], ["y"])
    with pytest.raises(CheckpointError, match="makes y, which something else makes already"):
        read_graph(file_of(tmp_path / "b.onnx", twice, twice))


def test_every_unknown_operator_is_named(tmp_path):
    nodes = [
        helper.make_node("Fancy", ["x"], ["a"], "first", domain="com.acme"),
        helper.make_node("MatMulInteger", ["a", "a"], ["y"], "second"),
    ]
    with pytest.raises(UnsupportedModel, match=r"MatMulInteger \(node second\), com\.acme\.Fancy \(node first\)"):
        capture(file_of(tmp_path / "m.onnx", *nodes))


def test_an_unknown_attribute_is_named(tmp_path):
    node = helper.make_node("Relu", ["x"], ["y"], "r", slope=1.0)
    with pytest.raises(UnsupportedModel, match=r"node r \(Relu\): attribute slope is not read"):
        capture(file_of(tmp_path / "m.onnx", node))


@pytest.mark.parametrize("op", ["Add", "MatMul"])
def test_mixed_dtypes_are_refused(tmp_path, op):
    node = helper.make_node(op, ["x", "w"], ["y"], "mix")
    with pytest.raises(UnsupportedModel, match=r"node mix \(.*\): reads torch.float32 and torch.float16"):
        capture(file_of(tmp_path / "m.onnx", node, constants={"w": W.astype(np.float16)}))


def test_a_file_of_two_gigabytes_is_refused_unread(tmp_path):
    path = tmp_path / "m.onnx"
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)  # takes no room on the disk
    with pytest.raises(CheckpointError, match="holds at most 2147483647, so save its tensors as external data"):
        read_graph(path)


def test_a_tensor_that_is_not_all_there_is_refused(tmp_path):
    path = file_of(tmp_path / "m.onnx", helper.make_node("MatMul", ["x", "w"], ["y"]), constants={"w": W})
    model = onnx.load(path)
    model.graph.initializer[0].dims[:] = [1 << 20, 1 << 20]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match="takes 4398046511104 bytes, 64 are there"):
        read_graph(path)


def test_a_truncated_file_is_refused_and_nothing_is_written(tmp_path):
    path = file_of(tmp_path / "m.onnx", helper.make_node("MatMul", ["x", "w"], ["y"]), constants={"w": W})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="no ONNX file, or a truncated one"):
        moec.compile(path, output=tmp_path / "out.engine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"]


@pytest.mark.parametrize("content", [b"", b"\x08\x0a", b"not a model at all"])
def test_what_is_no_model_is_refused(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"m\.onnx: no ONNX"):
        read_graph(tmp_path / "m.onnx")


def test_an_old_opset_is_refused(tmp_path):
    path = files.write(tmp_path / "m.onnx", [helper.make_node("Relu", ["x"], ["y"])], [X], ["y"], opset=11)
    with pytest.raises(UnsupportedModel, match="opset 11; 13 or newer"):
        read_graph(path)


def test_options_of_directories_are_refused(tmp_path):
    path = file_of(tmp_path / "m.onnx", helper.make_node("Relu", ["x"], ["y"]))
    with pytest.raises(CompileError, match="not to an ONNX file"):
        capture(path, layers=2)
    with pytest.raises(CheckpointError, match="no such file"):
        capture(tmp_path / "other.onnx")


def test_other_example_inputs_are_refused(tmp_path):
    path = file_of(tmp_path / "m.onnx", helper.make_node("Relu", ["x"], ["y"]))
    with pytest.raises(CompileError, match="0 example inputs; expected 1: x"):
        capture(path, ())

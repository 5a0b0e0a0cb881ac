"""Publishing: all files or none, nothing replaced, no links."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moec.compiler.export.onnx.errors import ExportError
from moec.compiler.export.onnx.write import check_output, data_name, publishing, record_name

pytestmark = pytest.mark.null


def test_all_files_appear_together(tmp_path: Path) -> None:
    output = tmp_path / "m.onnx"
    with publishing(output) as folder:
        for name in (output.name, data_name(output), record_name(output)):
            (folder / name).write_text(name)
        assert os.listdir(tmp_path) == [folder.name]
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data", "m.onnx.json"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="broken"), publishing(tmp_path / "m.onnx") as folder:
        (folder / "m.onnx").write_text("half")
        raise RuntimeError("broken")
    assert not os.listdir(tmp_path)


def test_a_name_taken_meanwhile_is_kept_and_the_rest_taken_back(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="nothing was written"), publishing(tmp_path / "m.onnx") as folder:
        (folder / "m.onnx").write_text("model")
        (folder / "m.onnx.data").write_text("data")
        (tmp_path / "m.onnx").write_text("other")
    assert os.listdir(tmp_path) == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_text() == "other"


@pytest.mark.parametrize("name", ["m.onnx", "m.onnx.data", "m.onnx.json"])
def test_existing_files_and_dangling_links_are_refused(tmp_path: Path, name: str) -> None:
    os.symlink(tmp_path / "elsewhere", tmp_path / name)
    with pytest.raises(ExportError, match="exists and is kept"):
        check_output(tmp_path / "m.onnx")
    assert not (tmp_path / "elsewhere").exists()


def test_a_data_file_with_a_second_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="hard link"), publishing(tmp_path / "m.onnx") as folder:
        (folder / "m.onnx.data").write_text("data")
        os.link(folder / "m.onnx.data", tmp_path / "second")
    assert os.listdir(tmp_path) == ["second"]


def test_a_link_among_the_written_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(ExportError), publishing(tmp_path / "m.onnx") as folder:
        os.symlink(tmp_path / "secret", folder / "m.onnx.data")
    assert os.listdir(tmp_path) == ["secret"]


def test_no_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not exist; make it first"):
        check_output(tmp_path / "no" / "m.onnx")


def test_a_linked_folder_becomes_its_real_path(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "link")
    assert check_output(tmp_path / "link" / "m.onnx") == tmp_path.resolve() / "real" / "m.onnx"

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from moec.runtime import format as engine_format
from moec.runtime.errors import OutputError
from moec.runtime.format import publish, read_json, write_json


def write_two(folder: Path) -> None:
    (folder / "a").write_text("1")
    (folder / "b").write_text("2")


def test_publishes_everything_by_one_rename(tmp_path: Path) -> None:
    publish(tmp_path / "out", write_two)
    assert sorted(os.listdir(tmp_path / "out")) == ["a", "b"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link"])
def test_keeps_an_output_that_exists(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "dangling link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "kept").write_text("mine")
    with pytest.raises(OutputError, match="exists and is kept as it is"):
        publish(out, write_two)
    assert os.listdir(tmp_path) == ["out"]
    if kind == "folder":
        assert (out / "kept").read_text() == "mine" and os.listdir(out) == ["kept"]


def test_keeps_an_output_that_appears_meanwhile(tmp_path: Path) -> None:
    def slow(folder: Path) -> None:
        write_two(folder)
        (tmp_path / "out").mkdir()

    with pytest.raises(OutputError, match="nothing was written"):
        publish(tmp_path / "out", slow)
    assert os.listdir(tmp_path) == ["out"] and not os.listdir(tmp_path / "out")


@pytest.mark.parametrize("when", ["filling", "flushing", "renaming"])
def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(folder: Path) -> None:
        write_two(folder)
        if when == "filling":
            full()

    if when == "flushing":
        monkeypatch.setattr(engine_format, "_flush", full)
    if when == "renaming":
        monkeypatch.setattr(engine_format, "rename_new", full)
    with pytest.raises(OutputError, match=r"No space left on device; nothing was written"):
        publish(tmp_path / "out", fill)
    assert os.listdir(tmp_path) == []


def test_any_failure_leaves_nothing(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        write_two(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "out", fails)
    assert os.listdir(tmp_path) == []


def test_a_parent_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"the folder .*/no does not exist"):
        publish(tmp_path / "no" / "out", write_two)


def test_json_is_canonical(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"b": 1, "a": [1.5, None]})
    write_json(tmp_path / "b", {"a": [1.5, None], "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_json(tmp_path / "a") == {"a": [1.5, None], "b": 1}

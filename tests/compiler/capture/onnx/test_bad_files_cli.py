"""Bad ONNX files through `moec compile` and `moec export-onnx`: exit code 1, one line, and nothing written or lost."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_files as files
import pytest
from onnx import helper

from moec import cli
from moec.compiler.capture.onnx.file import MOST_BYTES

pytestmark = pytest.mark.cpu
W = np.arange(16, dtype=np.float32).reshape(4, 4)
COMMANDS = {"compile": "out.engine", "export-onnx": "out.onnx"}
PRODUCT = helper.make_node("MatMul", ["x", "w"], ["y"], "product")


def made(path: Path, *nodes: onnx.NodeProto, outputs: tuple[str, ...] = ("y",), w: np.ndarray = W) -> Path:
    return files.write(path, list(nodes), [files.port("x", "float32", ["t", 4])], list(outputs), {"w": w})


def traversal(path: Path) -> str:
    (path.parent.parent / "w.bin").write_bytes(W.tobytes())
    files.externalised(made(path, PRODUCT), location="../w.bin")
    return "external data of w: location '../w.bin' is no path inside the folder of the ONNX file"


def absolute(path: Path) -> str:
    files.externalised(made(path, PRODUCT), location="/etc/hostname")
    return "external data of w: location '/etc/hostname' is no path inside the folder"


def symbolic_link(path: Path) -> str:
    (path.parent.parent / "w.bin").write_bytes(W.tobytes())
    os.symlink(path.parent.parent / "w.bin", path.with_name("w.bin"))
    files.externalised(made(path, PRODUCT), location="w.bin")
    return "w.bin is a symbolic link; copy what it points to"


def hard_link(path: Path) -> str:
    (path.parent.parent / "w.bin").write_bytes(W.tobytes())
    os.link(path.parent.parent / "w.bin", path.with_name("w.bin"))
    files.externalised(made(path, PRODUCT), location="w.bin")
    return "w.bin is a hard link to a file that has another name too; copy it"


def missing_data(path: Path) -> str:
    files.externalised(made(path, PRODUCT), location="w.bin")
    return "w.bin: there is no such file; put it beside the ONNX file"


def short_data(path: Path) -> str:
    path.with_name("w.bin").write_bytes(W.tobytes()[:-1])
    files.externalised(made(path, PRODUCT), location="w.bin")
    return "w.bin has 63 bytes, the tensor ends at 64"


def cycle(path: Path) -> str:
    made(path, helper.make_node("Add", ["x", "b"], ["a"], "one"), helper.make_node("Relu", ["a"], ["b"], "two"),
         outputs=("b",))  # fmt: skip
    return "the graph is cyclic: node one (Add) needs its own result"


def unknown_operator(path: Path) -> str:
    made(path, helper.make_node("Fancy", ["x"], ["y"], "strange", domain="com.acme"))
    return "com.acme.Fancy (node strange)"


def mixed_dtypes(path: Path) -> str:
    made(path, PRODUCT, w=W.astype(np.float16))
    return "node product (MatMul): reads torch.float32 and torch.float16"


def two_gigabytes_inline(path: Path) -> str:
    made(path, PRODUCT)
    with path.open("r+b") as file:
        file.truncate(MOST_BYTES + 1)  # takes no room on the disk
    return "an ONNX file holds at most 2147483647, so save its tensors as external data"


def more_than_is_there(path: Path) -> str:
    model = onnx.load(made(path, PRODUCT))
    model.graph.initializer[0].dims[:] = [1 << 15, 1 << 14]  # 2 GiB of float32
    path.write_bytes(model.SerializeToString())
    return "tensor w of shape [32768, 16384] takes 2147483648 bytes, 64 are there"


def truncated(path: Path) -> str:
    made(path, PRODUCT)
    path.write_bytes(path.read_bytes()[:-9])
    return "no ONNX file, or a truncated one"


BAD: tuple[Callable[[Path], str], ...] = (
    traversal, absolute, symbolic_link, hard_link, missing_data, short_data, cycle, unknown_operator, mixed_dtypes,
    two_gigabytes_inline, more_than_is_there, truncated,
)  # fmt: skip


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`moec ARGUMENTS` in this process -> exit code and standard error."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["moec", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), capsys.readouterr().err

    return call


def content(folder: Path) -> dict[str, str]:
    """Every file below a folder, links too, with a digest of what it holds (of its size where it is huge)."""
    found = {}
    for path in sorted(folder.rglob("*")):
        small = path.is_file() and path.stat().st_size < 1 << 20
        data = path.read_bytes() if small else str(path.lstat().st_size if path.is_file() else "").encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("bad", BAD, ids=lambda f: f.__name__)
def test_one_line_and_nothing_written(tmp_path: Path, run, command: str, bad: Callable[[Path], str]) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    said = bad(folder / "bad.onnx")
    before = content(tmp_path)
    code, error = run(command, folder / "bad.onnx", "-o", folder / COMMANDS[command])
    assert code == 1
    (line,) = error.strip().splitlines()
    assert line.startswith("error:") and said in line
    assert content(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_an_existing_output_is_kept(tmp_path: Path, run, command: str) -> None:
    output = tmp_path / COMMANDS[command]
    if command == "compile":
        output.mkdir()
        (output / "program.json").write_text("mine")
    else:
        output.write_text("mine")
    for name, make in (("good.onnx", lambda p: made(p, PRODUCT)), ("bad.onnx", cycle)):
        make(tmp_path / name)
        before = content(tmp_path)
        code, error = run(command, tmp_path / name, "-o", output)
        assert code == 1 and error.startswith("error:") and "exists" in error
        assert content(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_without_experts_is_taken_and_it_is_said(tmp_path: Path, run, command: str, caplog) -> None:
    made(tmp_path / "plain.onnx", PRODUCT)
    code, error = run(command, tmp_path / "plain.onnx", "-o", tmp_path / COMMANDS[command])
    assert code == 0 and "error" not in error
    assert (tmp_path / COMMANDS[command]).exists()
    assert "plain.onnx: no layer with experts was found; it is compiled as it is" in caplog.text

"""Which ONNX Runtime is used: one package, on the provider that was asked for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from moec.compiler.export.onnx import session

pytestmark = pytest.mark.cpu


def test_both_packages_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(session, "installed", lambda: {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"})
    with pytest.raises(
        session.OnnxRuntimeError, match=r"both installed .* pip uninstall -y onnxruntime onnxruntime-gpu"
    ):
        session.onnxruntime()


def test_none_is_said(monkeypatch) -> None:
    monkeypatch.setattr(session, "installed", dict)
    with pytest.raises(session.OnnxRuntimeError, match=r"pip install 'moec\[onnx\]'"):
        session.onnxruntime()


def test_a_silent_fallback_is_an_error(monkeypatch, tmp_path: Path) -> None:
    fallback = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    module = SimpleNamespace(
        SessionOptions=SimpleNamespace, InferenceSession=lambda *a, **k: fallback, __version__="1.31.1"
    )
    monkeypatch.setattr(session, "onnxruntime", lambda: module)
    with pytest.raises(session.OnnxRuntimeError, match=r"asked for CUDAExecutionProvider, .* runs on CPUExecution"):
        session.open_session(tmp_path / "m.onnx", "cuda")


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(session.OnnxRuntimeError, match="cannot load it") as error:
        session.open_session(path)
    assert "\n" not in str(error.value)


def test_the_processor_works() -> None:
    assert session.working_providers()[-1] == "CPUExecutionProvider"

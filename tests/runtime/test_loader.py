from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import moec
from moec.runtime import loader
from moec.runtime.errors import EngineError, FormatError, TargetError
from moec.runtime.launch import cpu_features
from moec.runtime.loader import manifest_text, read_manifest
from moec.runtime.pages import HUGE_PAGE_BYTES

FILES = ["manifest.json", "program.json", "weights-0.safetensors", "ledger.json", "evidence.json", "tuning.json"]


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 400
    return text


def rewrite_manifest(engine: Path, **changes: object) -> None:
    """Changes fields of the manifest and signs it again, as another moec would have written it."""
    manifest = read_manifest(engine)
    (engine / "manifest.json").write_text(manifest_text({**manifest, **changes}))


def test_has_the_files_of_the_format(engine_path: Path) -> None:
    assert {p.name for p in engine_path.iterdir()} >= set(FILES)


def test_one_changed_byte_in_any_file_is_found(copied: Path) -> None:
    for path in sorted(copied.iterdir()):
        whole = path.read_bytes()
        places = {0, len(whole) // 2, len(whole) - 1}
        for place in places:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(FormatError) as error:
                moec.load(copied)
            assert path.name in one_line(error)
        path.write_bytes(whole)
    moec.load(copied)


def test_truncated_weights(copied: Path) -> None:
    path = copied / "weights-0.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    with pytest.raises(FormatError) as error:
        moec.load(copied)
    text = one_line(error)
    assert f"{size // 2} bytes, the manifest says {size}" in text and "weights-0" in text


def test_missing_file(copied: Path) -> None:
    (copied / "evidence.json").unlink()
    with pytest.raises(FormatError, match=r"evidence\.json: listed in the manifest but not there"):
        moec.load(copied)


def test_unknown_format_version(copied: Path) -> None:
    rewrite_manifest(copied, format_version=99)
    with pytest.raises(FormatError) as error:
        moec.load(copied)
    assert "format version 99, this moec reads 1" in one_line(error)


def test_another_cpu_is_named_before_anything_is_opened(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = {**read_manifest(copied)["target"], "level": "amx_bf16"}
    rewrite_manifest(copied, target=target)
    (copied / "program.json").write_text("no longer readable")
    monkeypatch.setattr(cpu_features, "detect_features", lambda: cpu_features.LEVELS["avx512_bf16"])
    with pytest.raises(TargetError) as error:
        moec.load(copied)
    assert "lacks amx_bf16, amx_int8, amx_tile, avx512vbmi, gfni" in one_line(error)


@pytest.mark.parametrize("change", [{"kind": "cuda:sm_90a"}, {"kind": "cpu", "level": "avx1024"}])
def test_another_target_is_refused(copied: Path, change: dict) -> None:
    rewrite_manifest(copied, target={**read_manifest(copied)["target"], **change})
    with pytest.raises(TargetError):
        moec.load(copied)


def test_not_an_engine(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such engine directory"):
        moec.load(tmp_path / "none")
    with pytest.raises(FormatError, match=r"manifest\.json: no such file"):
        moec.load(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(FormatError, match="not the manifest of an engine"):
        moec.load(tmp_path)


def test_a_path_out_of_the_directory_is_refused(copied: Path) -> None:
    files = read_manifest(copied)["files"]
    rewrite_manifest(copied, files={**files, "../copy.engine/program.json": files["program.json"]})
    with pytest.raises(EngineError, match="listed in the manifest but not there"):
        moec.load(copied)


def test_large_weights_go_to_huge_pages_as_far_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers at addresses of 2 MiB; small ones, and those beyond half of the memory, stay where they are."""
    monkeypatch.setattr(loader, "HUGE_WEIGHT_BYTES", 1000)
    weights = {
        "a": torch.randn(40, 10),
        "small": torch.randn(10),
        "b": torch.randn(300).bfloat16(),
        "c": torch.randn(500),
    }
    moved = loader.to_huge_pages(weights, available_bytes=2 * 2000)
    assert list(moved) == list(weights)
    assert moved["a"].data_ptr() % HUGE_PAGE_BYTES == 0
    assert all(torch.equal(moved[name], weights[name]) for name in weights)
    assert all(moved[name] is weights[name] for name in ("small", "b", "c"))  # below the limit, or past half of 4000 B

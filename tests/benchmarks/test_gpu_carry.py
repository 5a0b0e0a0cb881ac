"""Engines carried without their random weights: packed, made again elsewhere, loaded with the manifest's digests."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from moec.compiler import api
from moec.compiler.codegen.cuda import BuiltCubin
from moec.compiler.lowering.cuda import build
from moec.runtime.errors import FormatError
from moec.runtime.format import check_files
from moec.runtime.loader import read_manifest

pytestmark = pytest.mark.null
FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
CONFIG = {
    "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "vocab_size": 512, "hidden_size": 128,
    "moe_intermediate_size": 128, "shared_expert_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 256,
    "dtype": "bfloat16", "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def carry(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "carry", raising=False)
    return importlib.import_module("carry")


def without_code(sources, cache_dir):
    """In the place of build_cubins: empty files."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    paths = [cache_dir / f"{source.name}.cubin" for source in sources]
    for path in paths:
        path.write_bytes(b"no code")
    return [BuiltCubin(s, p, p.stem, False) for s, p in zip(sources, paths, strict=True)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """An engine for a GPU, beside the folder of its model."""
    place = tmp_path_factory.mktemp("carried")
    (place / "model").mkdir()
    (place / "model" / "config.json").write_text(json.dumps(CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "build_cubins", without_code)
        patch.setenv("MOEC_CACHE_DIR", str(place / "cache"))
        api.compile_to(place / "model", place / "gpu.engine", target="cuda:sm_90a", random_weights=0, verify="off")
    return place / "gpu.engine"


def test_an_engine_is_made_again_bit_for_bit(carry, engine, tmp_path):
    told = carry.pack(engine, engine.parent / "model", tmp_path / "packed")
    literal, weights = (
        (folder / name).stat().st_size
        for folder, name in ((tmp_path / "packed", carry.LITERAL), (engine, carry.WEIGHTS))
    )
    assert literal < weights / 50, told
    assert not (tmp_path / "packed" / carry.WEIGHTS).exists()
    carry.unpack(tmp_path / "packed", tmp_path / "made.engine")
    manifest = read_manifest(tmp_path / "made.engine")
    check_files(tmp_path / "made.engine", manifest["files"])
    assert (tmp_path / "made.engine" / carry.WEIGHTS).read_bytes() == (engine / carry.WEIGHTS).read_bytes()


def test_a_machine_that_makes_other_numbers_is_found_out(carry, engine, tmp_path, monkeypatch):
    carry.pack(engine, engine.parent / "model", tmp_path / "packed")
    monkeypatch.setattr(carry, "SEED", 1)
    carry.unpack(tmp_path / "packed", tmp_path / "made.engine")
    with pytest.raises(FormatError, match="the file was changed"):
        check_files(tmp_path / "made.engine", read_manifest(tmp_path / "made.engine")["files"])

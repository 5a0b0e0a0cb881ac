"""What is wrong in a directory is one line that names the tensor, the file or the key."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from zoo import model_of, save, tiny

import moec
from moec.compiler.capture import capture
from moec.compiler.capture.checkpoint import DTYPES, Checkpoint
from moec.compiler.errors import CheckpointError, CompileError

pytestmark = pytest.mark.null
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model_of("mixtral"), tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def sharded(directory: Path) -> Path:
    """The same checkpoint in two files with an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    for file, part in (("a.safetensors", False), ("b.safetensors", True)):
        save_file({n: t for n, t in tensors.items() if (n == FIRST) == part}, directory / file, {"format": "pt"})
    places = {n: "b.safetensors" if n == FIRST else "a.safetensors" for n in tensors}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return directory


def edit_index(directory: Path, **places: Any) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] |= places
    (directory / INDEX).write_text(json.dumps(index))


def refusal(directory: Path, **options: Any) -> str:
    with pytest.raises(CompileError) as caught:
        capture(directory, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_the_two_shards_are_whole(sharded: Path) -> None:
    assert capture(sharded).info.layers == 3


def test_a_shard_that_is_not_there(sharded: Path) -> None:
    edit_index(sharded, **{SECOND: "c.safetensors"})
    assert "shard c.safetensors is missing" in refusal(sharded)


def test_a_tensor_that_is_not_where_the_index_says(sharded: Path) -> None:
    edit_index(sharded, **{SECOND: "b.safetensors"})
    assert SECOND in refusal(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    tensors = load_file(sharded / "b.safetensors")
    save_file(tensors | {SECOND: torch.zeros(16, 32)}, sharded / "b.safetensors", {"format": "pt"})
    text = refusal(sharded)
    assert SECOND in text and "a.safetensors" in text and "b.safetensors" in text


@pytest.mark.parametrize("place", ["../b.safetensors", "/b.safetensors", "sub/b.safetensors", "..", "", 7, None])
def test_a_place_outside_of_the_directory(sharded: Path, place: Any) -> None:
    shutil.copy(sharded / "b.safetensors", sharded.parent / "b.safetensors")  # what must not be read
    edit_index(sharded, **{FIRST: place})
    text = refusal(sharded)
    assert FIRST in text and repr(place) in text


def test_an_index_without_places(sharded: Path) -> None:
    (sharded / INDEX).write_text('{"weight_map": ["a.safetensors"]}')
    assert "weight_map" in refusal(sharded)


@pytest.mark.parametrize("bytes_left", [0, 4, 100, -1])
def test_a_truncated_shard(sharded: Path, bytes_left: int) -> None:
    data = (sharded / "a.safetensors").read_bytes()
    (sharded / "a.safetensors").write_bytes(data[:bytes_left])
    assert "a.safetensors" in refusal(sharded)


def test_a_place_of_another_size(directory: Path) -> None:
    file = directory / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[FIRST]["shape"] = [32, 16]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    file.write_bytes(data[:8] + text + data[8 + length :])
    assert f"{FIRST}: torch.float32 [32, 16] takes 2048 bytes, its place has 4096" in refusal(directory)


def test_a_file_cut_after_it_was_opened(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    last = max(checkpoint.tensors, key=lambda n: checkpoint.tensors[n].start)
    os.truncate(directory / "model.safetensors", checkpoint.tensors[last].start + 5)
    with pytest.raises(CheckpointError, match=f"{last} ends before its last byte"):
        checkpoint.read(last)


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_every_dtype_is_read_as_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    numbers = torch.arange(6).reshape(2, 3) % 2 if dtype == torch.bool else torch.arange(1, 7).reshape(2, 3)
    tensors = {"odd": torch.ones(3, dtype=torch.uint8), "it": numbers.to(dtype), "none": torch.empty(0, 4, dtype=dtype)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    for name, tensor in tensors.items():
        found = checkpoint.read(name)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.cpu
def test_a_weight_that_is_no_number(directory: Path, tmp_path: Path) -> None:
    name = "model.layers.1.block_sparse_moe.experts.5.w2.weight"
    tensors = load_file(directory / "model.safetensors")
    tensors[name][3, 4] = float("nan")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"tensor {name} holds NaN or infinity") as caught:
        moec.compile(directory, layers=2, verify="off", output=tmp_path / "engine")
    assert "\n" not in str(caught.value) and not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("family", "key", "value", "said"),
    [
        ("mixtral", "hidden_size", "32", "expected a number, got the string '32'"),
        ("mixtral", "rms_norm_eps", "1e-5", "expected a number, got the string '1e-5'"),
        ("mixtral", "num_local_experts", "8", "expected a number, got the string '8'"),
        ("deepseek", "rope_theta", "1e4", "expected a number, got the string '1e4'"),
        ("deepseek", "num_key_value_heads", "4", "expected a number, got the string '4'"),
        ("xverse", "moe_top_k", True, "expected a number, got True"),
        ("mixtral", "num_hidden_layers", None, "expected int, got NoneType"),
        ("mixtral", "num_hidden_layers", 0, "expected at least 1, got 0"),
        ("mixtral", "hidden_size", -32, "expected at least 1, got -32"),
        ("mixtral", "num_experts_per_tok", 9, "is 9, more than the 8 experts of num_local_experts"),
        ("deepseek_v3", "num_experts_per_tok", 9, "is 9, more than the 8 experts of n_routed_experts"),
        ("xverse", "moe_top_k", 9, "is 9, more than the 8 experts of num_experts"),
        ("skywork_moe", "num_experts_per_tok", 9, "is 9, more than the 8 experts of num_experts"),
        ("mixtral", "num_experts_per_tok", 0, "is 0, though there are 8 experts"),
        ("deepseek_v3", "n_group", 3, "is 3, which does not divide the 8 experts"),
        ("mixtral", "num_key_value_heads", 3, "is 3, which does not divide the 4"),
        ("mixtral", "dtype", "bf17", "torch has no dtype 'bf17'"),
        ("mixtral", "model_type", ["mixtral"], "expected a string, got ['mixtral']"),
        ("gpt_oss", "layer_types", ["full_attention"], "must be equal to the number of `layer_types`"),
    ],
)
def test_a_setting_without_a_meaning(family: str, key: str, value: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**tiny(family).to_dict(), key: value}))
    text = refusal(tmp_path, random_weights=0)
    assert key in text and said in text and "config.json" in text


@pytest.mark.parametrize("content", ["", "{", "[1]", '"x"', "\x00\xff"])
def test_a_configuration_that_is_no_json_object(directory: Path, content: str) -> None:
    (directory / "config.json").write_text(content, encoding="latin-1")
    assert "config.json" in refusal(directory)

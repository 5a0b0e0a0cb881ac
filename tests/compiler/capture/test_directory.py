import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from serve import greedy_single
from zoo import build, greedy, model_of, prompts, save, tiny

from moec.compiler.capture import capture
from moec.compiler.errors import CheckpointError, CompileError, UnsupportedModel
from moec.passes.infra.rewrite import argument
from moec.passes.ir.weights import weights_of

pytestmark = pytest.mark.null
EXPERT = "model.layers.1.block_sparse_moe.experts.5.w1.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save(model_of("mixtral"), tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_tensors(directory: Path, **changes) -> None:
    """Rewrites the checkpoint; a change is a tensor, or None to drop it."""
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def edit_config(directory: Path, **changes) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(directory: Path, error: type[Exception] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        capture(directory)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_shards_with_an_index(tmp_path: Path):
    model = model_of("mixtral")
    directory = save(model, tmp_path, max_shard_size="20KB")
    assert (directory / "model.safetensors.index.json").exists()
    captured = capture(directory)
    assert greedy_single(captured, prompts()[0], 3)[0] == greedy(model, prompts()[0], 3)[0]


def test_a_missing_shard(tmp_path: Path):
    directory = save(model_of("mixtral"), tmp_path, max_shard_size="20KB")
    lost = sorted(directory.glob("model-00002-*"))[0]
    lost.unlink()
    assert lost.name in refused(directory)


def test_a_truncated_shard(directory: Path):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    text = refused(directory)
    assert "truncated" in text
    assert str(file.stat().st_size) in text


def test_not_safetensors(directory: Path):
    (directory / "model.safetensors").write_bytes(b"PK\x03\x04 something else entirely" * 9)
    assert "not a whole safetensors file" in refused(directory)


def test_a_damaged_header(directory: Path):
    file = directory / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = b"?" * 32
    file.write_bytes(data)
    assert "damaged safetensors header" in refused(directory)


def test_no_config(directory: Path):
    (directory / "config.json").unlink()
    assert "no config.json" in refused(directory)


def test_no_directory(tmp_path: Path):
    assert "no such directory" in refused(tmp_path / "nowhere")


def test_a_damaged_config(directory: Path):
    (directory / "config.json").write_text("{")
    assert "not readable as JSON" in refused(directory)


def test_no_weights(directory: Path):
    (directory / "model.safetensors").unlink()
    assert "no weights" in refused(directory)


def test_pickled_weights_are_not_loaded(directory: Path):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert "convert its .bin files" in refused(directory)


def test_a_missing_tensor(directory: Path):
    edit_tensors(directory, **{"model.layers.2.self_attn.q_proj.weight": None})
    assert "model.layers.2.self_attn.q_proj.weight" in refused(directory)


def test_a_missing_expert(directory: Path):
    edit_tensors(directory, **{EXPERT: None})
    assert EXPERT in refused(directory)


def test_an_extra_tensor(directory: Path):
    edit_tensors(directory, **{"model.layers.1.self_attn.q_proj.bias": torch.zeros(32)})
    assert "model.layers.1.self_attn.q_proj.bias" in refused(directory)


def test_a_wrong_shape(directory: Path):
    edit_tensors(directory, **{"model.layers.0.self_attn.k_proj.weight": torch.zeros(8, 32)})
    text = refused(directory)
    assert "model.layers.0.self_attn.k_proj.weight" in text
    assert "[16, 32]" in text
    assert "[8, 32]" in text


def test_an_expert_of_a_wrong_shape(directory: Path):
    edit_tensors(directory, **{EXPERT: torch.zeros(24, 32)})
    assert EXPERT in refused(directory)


def test_an_unknown_architecture(directory: Path):
    edit_config(directory, model_type="no_such_model")
    assert "unknown architecture 'no_such_model'" in refused(directory, UnsupportedModel)


def test_remote_code_is_refused_and_not_run(directory: Path):
    (directory / "modeling_evil.py").write_text("raise SystemExit('this must never run')")
    edit_config(directory, model_type="evil", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    assert "auto_map" in refused(directory, UnsupportedModel)


def test_remote_code_beside_a_known_architecture_is_ignored(directory: Path):
    (directory / "modeling_evil.py").write_text("raise SystemExit('this must never run')")
    edit_config(directory, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    assert capture(directory).info.model_type == "mixtral"


def test_an_unknown_quantisation_is_refused(directory: Path):
    edit_config(directory, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert "quantization_config.quant_method: 'bitsandbytes'" in refused(directory, UnsupportedModel)


def test_a_tie_of_two_different_tensors(directory: Path):
    edit_config(directory, tie_word_embeddings=True)
    assert "tie_word_embeddings" in refused(directory)


def test_stop_tokens_of_the_generation_settings(directory: Path):
    (directory / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert capture(directory).info.eos_token_ids == (5, 7)


def test_fewer_layers(directory: Path):
    captured = capture(directory, layers=1)
    assert captured.info.layers == 1
    assert captured.moe_layers == (0,)
    assert not any("layers_1" in name for name in weights_of(captured.graph_module))
    expected = build(tiny("mixtral", num_hidden_layers=1))
    state = {k: v for k, v in model_of("mixtral").state_dict().items() if k in expected.state_dict()}
    expected.load_state_dict(state)
    assert greedy_single(captured, prompts()[0], 3)[0] == greedy(expected, prompts()[0], 3)[0]


@pytest.mark.parametrize("layers", [0, 4])
def test_layers_out_of_range(directory: Path, layers: int):
    with pytest.raises(CompileError, match="expected 1 to 3"):
        capture(directory, layers=layers)


def test_per_layer_lists_are_cut_with_the_depth(tmp_path: Path):
    captured = capture(save(model_of("gpt_oss"), tmp_path), layers=2)
    calls = captured.graph_module.graph.find_nodes(op="call_function", target=torch.ops.moec.cached_attention.default)
    assert [argument(c, 9, "window", 0) for c in calls] == [8, 0]


def test_random_weights_need_no_safetensors(directory: Path):
    (directory / "model.safetensors").unlink()
    one, same, other = (capture(directory, random_weights=s) for s in (7, 7, 8))
    name = "model_layers_0_mlp_experts_gate_up_proj"
    first, second, third = (weights_of(c.graph_module)[name].materialise(c.read) for c in (one, same, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert len(greedy_single(one, prompts()[0], 2)[0]) == 2


def test_half_precision_keeps_what_the_library_keeps_in_float32(tmp_path: Path):
    model = build(tiny("deepseek_v3"), dtype=torch.bfloat16)
    captured = capture(save(model, tmp_path))
    dtypes = {w.dtype for n, w in weights_of(captured.graph_module).items() if n.endswith("e_score_correction_bias")}
    assert captured.info.dtype == torch.bfloat16
    assert dtypes == {torch.float32}
    assert {c.dtype for c in captured.info.caches} == {torch.bfloat16}


def test_a_dtype_of_our_own(directory: Path):
    captured = capture(directory, dtype=torch.bfloat16)
    weight = weights_of(captured.graph_module)["lm_head_weight"]
    assert torch.equal(weight.materialise(captured.read), model_of("mixtral").lm_head.weight.to(torch.bfloat16))

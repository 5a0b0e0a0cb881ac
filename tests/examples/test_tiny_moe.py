"""examples/data/tiny-moe is the model that the README says it is, and examples/train_tiny_moe.py makes such a model."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = EXAMPLES / "data"
CHECKPOINT = DATA / "tiny-moe"
NUM_TOKENS = 4088  # eight windows of the held-out text


@pytest.fixture(scope="module")
def example():
    """The training script as a module. It imports its neighbours, as it does when it is run as a script."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import train_tiny_moe
    finally:
        sys.path.remove(str(EXAMPLES))
    return train_tiny_moe


@pytest.fixture(scope="module")
def evaluation(example):
    return example.evaluate_checkpoint(CHECKPOINT, DATA / "heldout.txt", max_tokens=NUM_TOKENS)


def test_checkpoint_is_complete_and_within_limits():
    model, info = AutoModelForCausalLM.from_pretrained(CHECKPOINT, local_files_only=True, output_loading_info=True)
    assert not any(info.values()), "every tensor of the checkpoint has its parameter, and every parameter its tensor"
    config = model.config
    assert config.model_type == "qwen3_moe" and config.norm_topk_prob and model.dtype == torch.bfloat16
    assert config.num_experts >= 8 and config.num_hidden_layers >= 4
    assert config.num_key_value_heads < config.num_attention_heads
    assert 1_000_000 <= model.num_parameters() <= 4_000_000
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) <= 8_000_000
    shards = json.loads((CHECKPOINT / "model.safetensors.index.json").read_text())["weight_map"].values()
    assert set(shards) == {path.name for path in CHECKPOINT.glob("*.safetensors")} and len(set(shards)) == 2


def test_tokenizer_gives_the_text_back():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True)
    text = 'The "with" statement\n\n   with EXPRESSION as TARGET:  # naïve ☃\n'
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert max(tokens) < 1536


def test_model_predicts_held_out_text_better_than_word_frequencies(evaluation):
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True)
    text = (DATA / "heldout.txt").read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer.encode(text, verbose=False)[:NUM_TOKENS])
    shares = tokens.bincount()[tokens.unique()] / len(tokens)
    # The frequencies in these very tokens: no model without context can do better than this.
    unigram_perplexity = math.exp(-(shares * shares.log()).sum())
    assert evaluation.perplexity < 40
    assert evaluation.perplexity < unigram_perplexity / 5


def test_routing_is_skewed_and_no_expert_is_dead(evaluation):
    load = evaluation.expert_load
    assert load.shape == (5, 16)
    torch.testing.assert_close(load.sum(1), torch.ones(5, dtype=torch.float64))
    # Were the 8,176 slots of a layer dealt evenly at random, the largest load would lie within 4 standard deviations
    # of the mean: below 1 + 4 / sqrt(8176 / 16) = 1.18 of it.
    assert (load.amax(1) * 16 > 1.2).all()
    assert (load.amin(1) > 0).all()


def test_held_out_paragraphs_are_not_in_the_training_text(example):
    from documentation_text import MIN_REPEATED_CHARS, paragraph_key, read_documentation

    text = read_documentation()
    keys = [{paragraph_key(p) for d in part for p in re.split(r"\n\s*\n", d)} for part in (text.train, text.held_out)]
    assert not [key for key in keys[0] & keys[1] if len(key) >= MIN_REPEATED_CHARS]
    assert 10_000 < sum(map(len, text.held_out)) <= 60_000 < sum(map(len, text.train))


def test_three_steps_write_the_same_layout_and_never_overwrite(example, tmp_path, monkeypatch, capsys):
    from documentation_text import DocumentationText

    text = (DATA / "heldout.txt").read_text(encoding="utf-8")
    documents = DocumentationText(train=(text[:30_000],), held_out=(text[30_000:33_000],))
    monkeypatch.setattr(example, "read_documentation", lambda: documents)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # other tests keep their threads
    assert example.main(["--out", str(tmp_path), "--steps", "3"]) == 0
    assert "held-out perplexity" in capsys.readouterr().out
    assert (tmp_path / "heldout.txt").read_text(encoding="utf-8") == text[30_000:33_000] + "\n"
    names = {path.name for path in CHECKPOINT.iterdir()}
    written = tmp_path / "tiny-moe"
    assert {path.name for path in written.iterdir()} == names
    config, committed = (json.loads((folder / "config.json").read_text()) for folder in (written, CHECKPOINT))
    assert config.pop("transformers_version") and committed.pop("transformers_version")
    assert config == committed

    before = (written / "model-00001-of-00002.safetensors").read_bytes()
    assert example.main(["--out", str(tmp_path), "--steps", "3"]) == 1
    assert "kept as it is" in " ".join(capsys.readouterr().out.split())
    assert (written / "model-00001-of-00002.safetensors").read_bytes() == before


def test_evaluating_a_folder_without_a_model_is_one_clear_error(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert example.main(["--evaluate", str(tmp_path)]) == 1
    assert "has no config.json" in " ".join(capsys.readouterr().out.split())


def test_orthogonalize_keeps_directions_and_evens_lengths(example):
    from muon import orthogonalize

    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, 24, 40, generator=generator)
    for batch in (matrices, matrices.mT):
        result = orthogonalize(batch)
        singular_values = torch.linalg.svdvals(result)
        # The published polynomial after five iterations ends between 0.68 and 1.14 for well-conditioned input.
        assert singular_values.min() > 0.6 and singular_values.max() < 1.25
        u, _, vh = torch.linalg.svd(batch, full_matrices=False)
        aligned = (u.mT @ result @ vh.mT).diagonal(dim1=-2, dim2=-1)
        assert (aligned > 0.6).all()

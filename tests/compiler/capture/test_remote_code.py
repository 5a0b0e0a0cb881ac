"""Code in a model's directory runs only when it is trusted, and then it is what is compiled."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.dynamic_module_utils as dynamic
from safetensors.torch import save_file
from serve import greedy_single, relative_error
from zoo import greedy, model_of, prompts, save, tiny

from moec import cli
from moec.compiler.capture import capture
from moec.compiler.errors import CompileError, UnsupportedModel
from moec.compiler.inspect_model import inspect_model
from moec.compiler.plan.inputs import read_model

pytestmark = pytest.mark.null
STEPS = 3
REL_TOLERANCE = 1e-5  # float32 sums in another order
AUTO_MAP = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"}
CODE = """
from pathlib import Path

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

Path({mark!r}).touch()


class OwnConfig(MixtralConfig):
    model_type = "own_moe"


class OwnForCausalLM(MixtralForCausalLM):
    config_class = OwnConfig
"""
PLAIN_PYTHON = """

class Expert(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.router = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.members = nn.ModuleList(Expert(config) for _ in range(config.num_local_experts))

    def forward(self, x):
        flat = x.view(-1, x.shape[-1])
        weights, chosen = self.router(flat).softmax(-1).topk(self.top_k)
        y = torch.zeros_like(flat)
        for e in chosen.unique().tolist():
            rows, k = (chosen == e).nonzero(as_tuple=True)
            y.index_add_(0, rows, self.members[e](flat[rows]) * weights[rows, k, None])
        return y.view(x.shape)


def own_init(self, config):
    MixtralForCausalLM.__init__(self, config)
    for layer in self.model.layers:
        layer.mlp = Block(config)


OwnForCausalLM.__init__ = own_init
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library copies such code into a cache and imports it from there: here, one for each test."""
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [n for n in sys.modules if n.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)


def written(directory: Path, code: str = CODE, **settings: Any) -> Path:
    """Puts code into a saved model's directory -> the file that exists once the code has run."""
    mark = directory.parent / "the code ran"
    (directory / "own_code.py").write_text(code.replace("{mark!r}", repr(str(mark))))
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": AUTO_MAP} | settings))
    return mark


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save(model_of("mixtral"), tmp_path / "model")


def test_an_unknown_architecture_is_refused_and_not_run(directory: Path) -> None:
    mark = written(directory, model_type="own_moe")
    with pytest.raises(UnsupportedModel, match=r"'own_moe' comes with its own code .*--trust-remote-code"):
        capture(directory)
    for ask in (capture, inspect_model):
        with pytest.raises(UnsupportedModel, match="auto_map"):
            ask(str(directory))
    assert read_model(str(directory)).num_layers == 3  # a plan needs the sizes of config.json alone
    assert not mark.exists()


def test_a_known_architecture_ignores_it_and_says_so(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    mark = written(directory)
    with caplog.at_level(logging.WARNING):
        captured = capture(directory)
    assert captured.info.model_type == "mixtral" and not mark.exists()
    assert any("auto_map: the directory's own code is ignored" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize(("code", "lifted"), [(CODE, False), (CODE + PLAIN_PYTHON, True)], ids=["as is", "lifted"])
def test_trusted_code_is_what_is_compiled(code: str, lifted: bool, tmp_path: Path) -> None:
    """The second one loops over experts in Python, so it is loaded with its weights and lifted."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(tiny("mixtral", num_hidden_layers=1).to_dict()))
    mark = written(directory, code, model_type="own_moe")
    model = build_own(directory)
    save_file(model.state_dict(), directory / "model.safetensors", {"format": "pt"})
    mark.unlink()
    for name in [n for n in sys.modules if n.startswith("transformers_modules")]:
        del sys.modules[name]
    captured = capture(directory, trust_remote_code=True)
    assert mark.exists() and captured.info.model_type == "own_moe" and captured.info.directory == directory
    assert captured.moe_layers == (0,) and bool(captured.certificates) == lifted
    expected, expected_logits = greedy(model, prompts()[0], STEPS)
    tokens, logits = greedy_single(captured, prompts()[0], STEPS)
    assert tokens == expected and relative_error(logits, expected_logits) < REL_TOLERANCE


def build_own(directory: Path) -> Any:
    """The model of a directory's code, with random weights."""
    config_class, model_class = (
        dynamic.get_class_from_dynamic_module(AUTO_MAP[k], str(directory))
        for k in ("AutoConfig", "AutoModelForCausalLM")
    )
    model = model_class(config_class.from_pretrained(directory)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.15 + (p.dim() == 1))
    return model


@pytest.mark.parametrize("reference", ["someone/model--own_code.OwnForCausalLM", "../own_code.Own", "own_code", 7])
def test_code_from_elsewhere_is_refused(directory: Path, reference: Any) -> None:
    mark = written(directory, auto_map={"AutoModelForCausalLM": reference}, model_type="own_moe")
    with pytest.raises(UnsupportedModel, match=r"auto_map.AutoModelForCausalLM: expected FILE.CLASS"):
        capture(directory, trust_remote_code=True)
    assert not mark.exists()


def test_code_that_fails_is_one_line(directory: Path) -> None:
    written(directory, "raise OSError('first\\nsecond')", model_type="own_moe")
    with pytest.raises(CompileError, match="OwnConfig cannot be imported: OSError: first second"):
        capture(directory, trust_remote_code=True)


def test_the_flag_of_the_command_line(directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    mark = written(directory, model_type="own_moe")
    commands = (["inspect", str(directory), "--json"], ["plan", str(directory), "--mesh", "h100x8", "--json"])
    for command in commands:
        mark.unlink(missing_ok=True)
        monkeypatch.setattr(sys, "argv", ["moec", *command, "--trust-remote-code"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code and json.loads(capsys.readouterr().out)
        for name in [n for n in sys.modules if n.startswith("transformers_modules")]:
            del sys.modules[name]
        assert mark.exists(), command

"""From a model to an engine that answers: isolation from the compiler, equal bytes, kept outputs, plain modules."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from zoo import build, save, tiny

import moec
from moec.compiler.errors import CompileError
from moec.compiler.export import engine as export
from moec.runtime.errors import OutputError

RUNNER = """
    import json, sys
    BANNED = ("transformers", "tvm", "moec.compiler", "moec.passes")

    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name in BANNED or name.startswith(tuple(b + "." for b in BANNED)):
                raise ImportError(f"{name} must not be imported")

    sys.meta_path.insert(0, Refuse())
    import moec
    engine = moec.load(sys.argv[1])
    print(json.dumps(engine.generate(json.loads(sys.argv[2]), 8)))
"""


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build(tiny("qwen3_moe"))


@pytest.mark.parametrize("weights", ["f32", "bf16"])
def test_runs_where_there_is_no_compiler(model: nn.Module, tmp_path: Path, weights: str) -> None:
    engine = moec.compile(model, weights=weights, verify="off", output=tmp_path / "e")
    asked = [[5, 6, 7], [9]]
    command = [sys.executable, "-c", textwrap.dedent(RUNNER), str(tmp_path / "e"), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == engine.generate(asked, 8)


def test_an_engine_for_a_lesser_cpu(model: nn.Module, tmp_path: Path) -> None:
    """Built here for AVX2 alone: the same tokens, and no kernel of a higher level."""
    engine = moec.compile(model, target="cpu:avx2", verify="off", output=tmp_path / "e")
    report = engine.inspect()
    assert report["target"]["level"] == "avx2" and (tmp_path / "e" / "kernels-avx2.so").is_file()
    assert not any("avx512" in k["kernel"] or "amx" in k["kernel"] for k in report["kernels"])
    prompt = [5, 6, 7]
    with torch.no_grad():
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
    assert engine.generate(prompt, 16)[0] == whole[0, 3:].tolist()


def test_the_same_model_gives_the_same_bytes(model: nn.Module, tmp_path: Path) -> None:
    for name in ("one", "two"):
        moec.compile(model, verify="sampled", output=tmp_path / name)
    names = sorted(os.listdir(tmp_path / "one"))
    assert names == sorted(os.listdir(tmp_path / "two"))
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_evidence_and_dumps_are_kept(model: nn.Module, tmp_path: Path) -> None:
    seen: list[str] = []
    engine = moec.compile(
        model,
        dump=tmp_path / "dump",
        progress=lambda stage, done, total: seen.append(stage),
        output=tmp_path / "e",
    )
    assert {"capture", "passes", "lower", "weights"} <= set(seen)
    report = engine.verify()
    assert report["passed"] and report["evidence"] > report["not_evaluated"]
    assert sorted(os.listdir(tmp_path / "dump"))[0] == "00-captured.txt"
    facts = engine.inspect()
    rows = {k["node"]: k for k in facts["kernels"]}
    assert rows and all(k["predicted_us"] > 0 and k["rejected"] for k in rows.values())
    assert facts["gate"]["top_k"] == 2 and facts["ledger"]["lift-gate"]["matched"] == 3
    buffers = sum(b.numel() for b in model.buffers() if b.is_floating_point())  # tables such as inverse frequencies
    assert 0 <= facts["total_params"] - sum(p.numel() for p in model.parameters()) <= buffers


def test_an_output_that_exists_is_kept(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("kept")
    with pytest.raises(OutputError, match="exists and is kept as it is"):
        moec.compile(model, output=tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["file"] and os.listdir(tmp_path) == ["mine"]


def test_a_full_disk_leaves_nothing(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = export.write_weights

    def full(path: Path, *rest: object) -> None:
        real(path, *rest)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export, "write_weights", full)
    with pytest.raises(OutputError, match="No space left on device; nothing was written there"):
        moec.compile(model, verify="off", output=tmp_path / "e")
    assert os.listdir(tmp_path) == []


def test_an_engine_without_output_lives_in_a_temporary_folder(model: nn.Module, tmp_path: Path) -> None:
    engine = moec.compile(model, verify="off")
    folder = engine.directory
    assert folder.is_dir()
    engine.save(tmp_path / "kept")
    del engine
    assert not folder.exists()
    assert moec.load(tmp_path / "kept").generate([[1, 2]], 2)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"weights": "f8"}, "weights='f8': weight format 'f8' is unknown; known: f32, bf16"),
        ({"target": "tpu"}, "target='tpu'; known: cpu"),
        ({"target": "cpu:amx9"}, "known CPU levels"),
        ({"verify": "maybe"}, "verify='maybe'; known: off, sampled, full"),
    ],
)
def test_options_without_a_meaning(option: dict, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        moec.compile(nn.Linear(2, 2), (torch.ones(1, 2),), **option)


def test_a_directory_in_bf16_is_as_near_as_transformers_own(model: nn.Module, tmp_path: Path) -> None:
    """Weights are cast as they are read; the result is compared with the f32 model, beside transformers in bf16."""
    save(model, tmp_path / "hf")
    engine = moec.compile(tmp_path / "hf", weights="bf16", verify="off", output=tmp_path / "e")
    assert engine.inspect()["weights"] == "bfloat16"
    tokens = torch.randint(1, 128, (1, 40), generator=torch.Generator().manual_seed(2))
    half = type(model).from_pretrained(tmp_path / "hf", dtype=torch.bfloat16).eval()
    with torch.no_grad():
        exact, theirs = model(tokens).logits, half(tokens).logits.float()

    def median_error(found: torch.Tensor) -> float:
        """Per token, relative; the median, because a flipped expert changes a token altogether in either engine."""
        return float(((found - exact).abs().amax(-1) / exact.abs().amax(-1)).median())

    # both round at the same kinds of places: twice transformers' own error is the level, not a fit
    assert median_error(engine(tokens).float()) <= 2 * median_error(theirs)


class TinyMoE(nn.Module):
    """A plain module with routed experts in the bmm form."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4, bias=False)
        self.up = nn.Parameter(torch.randn(4, 16, 24) / 4)
        self.down = nn.Parameter(torch.randn(4, 24, 16) / 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, experts = torch.topk(self.gate(x).softmax(-1), 2)
        h = torch.nn.functional.silu(torch.einsum("th,tkhf->tkf", x, self.up[experts]))
        return (torch.einsum("tkf,tkfh->tkh", h, self.down[experts]) * weights[..., None]).sum(1)


def test_a_plain_module(tmp_path: Path) -> None:
    module = TinyMoE()
    engine = moec.compile(module, (torch.randn(6, 16),), output=tmp_path / "e")
    assert engine.kind == "module"
    for rows in (1, 6, 33):
        x = torch.randn(rows, 16)
        torch.testing.assert_close(engine(x), module(x), rtol=1e-4, atol=1e-5)  # float32 sums in another order

"""Weight formats end to end: goals of quality, sizes of engines, and checkpoints that stay as they are stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import format_quality
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moec
from moec.compiler.errors import CompileError
from moec.runtime.engine import Engine
from moec.runtime.format import weights_name

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "data" / "tiny-moe"
pytestmark = pytest.mark.cpu


def test_goals_of_quality() -> None:
    """Perplexity on the first 1,500 held-out tokens; make formats measures all formats on all of them."""
    rows = format_quality.measure(["fp8", "int8-w8a8", "int4-g32", "int2-g64", "int4-g128"], tokens=1500)
    assert not format_quality.missed(rows)
    by_name = {r.name: r for r in rows}
    assert abs(by_name["int8-w8a8"].rise) <= 0.5 and by_name["int8-w8a8"].routing >= 0.99
    # worse formats are seen to be worse: the measurement measures
    assert by_name["int4-g32"].rise < by_name["int2-g64"].rise and by_name["int2-g64"].rise > 4
    assert by_name["int4-g32"].logits < by_name["int2-g64"].logits < 0.3
    assert by_name["int4-g128"].note


def file_bytes(engine: Engine) -> int:
    return (engine.directory / weights_name(0)).stat().st_size


def test_an_engine_in_int4_is_as_small_as_inspect_says(tmp_path: Path) -> None:
    engine = moec.compile(MODEL, weights="int4-g32", verify="off", output=tmp_path / "e")
    report = engine.inspect()
    expected = report["weight_bytes"]["int4-g32"]
    # beside them: tables that the model computes, the header, and the filling up to 64 bytes
    assert expected <= file_bytes(engine) <= 1.05 * expected
    assert file_bytes(engine) < 0.45 * report["weight_bytes"]["bf16"]
    assert report["stored_bytes"]["int4-g32"] >= 4.5 / 8 * 2_949_120
    assert report["ledger"]["quantise-weights"]["matched"] == 10
    assert len(engine.generate([[1, 2, 3]], 4)[0]) == 4


def test_what_does_not_fit_is_one_short_line(tmp_path: Path) -> None:
    with pytest.raises(
        CompileError, match=r"^weights cannot be stored as asked: layer 0, .*no multiple of int4-g128's"
    ) as found:
        moec.compile(MODEL, weights="int4-g128", verify="off", output=tmp_path / "e")
    assert "\n" not in str(found.value) and len(str(found.value)) < 250
    assert not (tmp_path / "e").exists()


def test_other_weights_when_asked(tmp_path: Path) -> None:
    """The tied embedding and output in one format are stored once; attention is narrower too."""
    asked = "experts=int8,attention=int8,lm_head=int8,embedding=int8"
    engine = moec.compile(MODEL, weights=asked, verify="off", output=tmp_path / "e")
    assert file_bytes(engine) < 1.1 * engine.inspect()["total_params"]
    plain = moec.compile(MODEL, verify="off", output=tmp_path / "plain")
    tokens = torch.tensor([[5, 9, 300, 12, 44, 7]])
    error = (engine(tokens).float() - plain(tokens).float()).abs().max() / plain(tokens).float().abs().max()
    assert 0 < error < 0.05  # 8 bits everywhere; measured 0.02


def test_packed_experts_are_bf16_in_three_quarters_of_the_bytes(tmp_path: Path) -> None:
    """The same logits; a layer with a pruned expert stays bf16, and the report says why."""
    directory = tmp_path / "model"
    shutil.copytree(MODEL, directory)
    for shard in directory.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in (n for n in tensors if ".layers.2.mlp.experts.3.down" in n):
            tensors[name][:, ::2] = 0
        save_file(tensors, shard)
    plain = moec.compile(directory, weights="model=bf16", verify="off", output=tmp_path / "plain")
    packed = moec.compile(directory, weights="model=bf16,experts=bf16-packed", verify="off", output=tmp_path / "packed")
    tokens = torch.arange(3, 60)[None]
    wanted, found = plain(tokens).float(), packed(tokens).float()
    assert (found - wanted).norm() < 0.01 * wanted.norm()  # bf16 sums in another order on some processors; else 0
    assert packed.generate([[1, 2, 3]], 12) == plain.generate([[1, 2, 3]], 12)
    ledger = packed.inspect()["ledger"]["quantise-weights"]
    assert ledger["matched"] == 8 and [r["layer"] for r in ledger["refused"]] == [2, 2]
    assert all("bf16-packed has room for" in r["reason"] for r in ledger["refused"])
    experts = 2_949_120 * 4 // 5
    assert 0.75 < packed.inspect()["stored_bytes"]["bf16-packed"] / (2 * experts) < 0.8


def gptq(w: Tensor, group: int) -> dict[str, Tensor]:
    """[N, K] in GPTQ's layout: words along K, zeros one less, groups in order."""
    n, k = w.shape
    grouped = w.float().view(n, k // group, group)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-6).half()
    zero = (-low / scale.float()).round().clamp(1, 15)
    code = (grouped / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15).view(n, k).long()
    return {
        "qweight": _words(code.t()),
        "scales": scale.t().contiguous(),
        "qzeros": _words((zero - 1).long()).t().contiguous(),
        "g_idx": (torch.arange(k) // group).int(),
    }


def _words(codes: Tensor) -> Tensor:
    """[8 n, m] -> i32[n, m], eight codes in a word."""
    wide = sum(codes[i::8] << (4 * i) for i in range(8))
    return torch.where(wide >= 2**31, wide - 2**32, wide).to(torch.int32).contiguous()


def test_a_gptq_checkpoint_stays_in_its_codes(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    for file in MODEL.iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            (directory / file.name).write_bytes(file.read_bytes())
    tensors = {n: t for shard in sorted(MODEL.glob("*.safetensors")) for n, t in load_file(shard).items()}
    for name in [n for n in tensors if ".experts." in n]:
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{kind}": t for kind, t in gptq(tensors.pop(name), 32).items()}
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": False,
    }
    (directory / "config.json").write_text(json.dumps(config))
    engine = moec.compile(directory, weights="f32", verify="off", output=tmp_path / "e")
    report = engine.inspect()
    assert report["ledger"]["quantise-weights"]["matched"] == 10
    assert set(report["stored_bytes"]) >= {"int4-g32-asym-f16"}
    # 4 bits, and for 32 values a byte and two for zero and scale; four where a kernel keeps 16-bit scales as float32
    assert report["stored_bytes"]["int4-g32-asym-f16"] <= 5.25 / 8 * 2_949_120
    # the same numbers as the plain model whose weights are those of the codes
    exact = moec.compile(MODEL, weights="f32", verify="off", output=tmp_path / "plain")
    tokens = torch.tensor([[5, 9, 300, 12, 44, 7]])
    error = (engine(tokens) - exact(tokens)).square().mean().sqrt() / exact(tokens).square().mean().sqrt()
    assert 0.005 < error < 0.2


def test_a_budget(tmp_path: Path) -> None:
    engine = moec.compile(MODEL, weights="auto:3.0bits", verify="off", output=tmp_path / "e")
    sizes = engine.inspect()["stored_bytes"]
    formats = {n: b for n, b in sizes.items() if n not in ("bfloat16", "float32")}
    assert len(formats) > 1 and sum(formats.values()) <= 3.0 / 8 * 2_949_120
    assert len(engine.generate([[1, 2, 3]], 4)[0]) == 4

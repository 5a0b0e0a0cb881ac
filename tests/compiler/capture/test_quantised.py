"""Quantised checkpoints, written here in their published layouts, load as the numbers that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from zoo import build, greedy, prompts, save, tiny

import moec
from moec.compiler.capture import capture
from moec.compiler.capture.checkpoint import Checkpoint
from moec.compiler.capture.configuration import load_config
from moec.compiler.capture.directory import stored_weights
from moec.compiler.capture.quantisation import quantisation_of
from moec.compiler.capture.skeleton import build_skeleton
from moec.compiler.errors import CheckpointError, UnsupportedModel
from moec.passes.ir.weights import Weight

pytestmark = pytest.mark.null
Stored = dict[str, torch.Tensor]
"""What a quantiser gives: the stored tensors of one weight, beside the float64 numbers that they stand for."""


def int32(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def pack_rows(numbers: np.ndarray, bits: int) -> np.ndarray:
    """[n, m] -> [n * bits / 32, m], lowest bits first."""
    parts = numbers.astype(np.uint64).reshape(-1, 32 // bits, numbers.shape[1])
    return sum(parts[:, i] << np.uint64(bits * i) for i in range(32 // bits))


def fp8_block(name: str, w: torch.Tensor) -> tuple[Stored, np.ndarray]:
    """Blocks of 16 x 16, the last ones cut off; scales as float32."""
    rows, columns = w.shape
    grid = torch.zeros(-(-rows // 16), -(-columns // 16))
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            grid[i, j] = w[16 * i : 16 * i + 16, 16 * j : 16 * j + 16].abs().max() / 448
    wide = np.kron(grid.double().numpy(), np.ones((16, 16)))[:rows, :columns]
    codes = (w.double() / torch.from_numpy(wide)).float().to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": grid}, codes.double().numpy() * wide


def fp8_tensor(name: str, w: torch.Tensor) -> tuple[Stored, np.ndarray]:
    scale = w.abs().max() / 448
    codes = (w / scale).to(torch.float8_e4m3fn)
    stored = {name: codes, f"{name}_scale_inv": scale, name.replace(".weight", ".activation_scale"): torch.ones(())}
    return stored, codes.double().numpy() * scale.double().numpy()


def fp8_channel(name: str, w: torch.Tensor) -> tuple[Stored, np.ndarray]:
    scales = (w.abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
    codes = (w / scales.float()).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale": scales}, codes.double().numpy() * scales.double().numpy()


def int8_channel(name: str, w: torch.Tensor) -> tuple[Stored, np.ndarray]:
    """Asymmetric: (code - zero point) * scale."""
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    scales = (high - low) / 255
    zeros = (-128 - low / scales).round().clamp(-128, 127).to(torch.int8)
    codes = ((w / scales).round() + zeros).clamp(-128, 127).to(torch.int8)
    meant = (codes.numpy().astype(np.int64) - zeros.numpy().astype(np.int64)) * scales.double().numpy()
    return {name: codes, f"{name}_scale": scales, f"{name}_zero_point": zeros}, meant


def packed_int4(name: str, w: torch.Tensor, symmetric: bool = True) -> tuple[Stored, np.ndarray]:
    """compressed-tensors' pack-quantized: groups of 8 columns, codes and zero points stored plus 8."""
    groups = w.reshape(len(w), -1, 8)
    scales = (groups.abs().amax(2) / 7).to(torch.bfloat16)
    shift = torch.zeros_like(scales) if symmetric else (groups.sum(2) / 8 / scales.float()).round().clamp(-8, 7)
    codes = (groups / scales.float()[..., None]).round().add(shift[..., None]).clamp(-8, 7).reshape(w.shape)
    packed = pack_rows(codes.numpy().T + 8, 4).T
    stored = {
        f"{name}_packed": int32(packed),
        f"{name}_scale": scales,
        f"{name}_shape": torch.tensor(w.shape),
    }
    if not symmetric:
        stored[f"{name}_zero_point"] = int32(pack_rows(shift.numpy() + 8, 4))
    wide, zero = (np.repeat(t.double().numpy(), 8, 1) for t in (scales, shift))
    return stored, (codes.double().numpy() - zero) * wide


def packed_int4_asymmetric(name: str, w: torch.Tensor) -> tuple[Stored, np.ndarray]:
    return packed_int4(name, w, symmetric=False)


def packed_int8_any_order(name: str, w: torch.Tensor) -> tuple[Stored, np.ndarray]:
    """The same with 8 bits, codes plus 128, and columns that name their group of 8 in any order (weight_g_idx)."""
    groups = np.random.default_rng(w.shape[1]).permutation(np.arange(w.shape[1]) // 8)
    numbers = w.double().numpy()
    scales = np.stack([np.abs(numbers[:, groups == g]).max(1) for g in range(groups.max() + 1)], 1) / 127
    scales = torch.from_numpy(scales).to(torch.bfloat16)
    wide = scales.double().numpy()[:, groups]
    codes = np.clip(np.round(numbers / wide), -128, 127)
    stored = {
        f"{name}_packed": int32(pack_rows(codes.T + 128, 8).T),
        f"{name}_scale": scales,
        f"{name}_shape": torch.tensor(w.shape),
        f"{name}_g_idx": torch.from_numpy(groups.astype(np.int32)),
    }
    return stored, codes * wide


def fp8_blocks_of_powers(name: str, w: torch.Tensor) -> tuple[Stored, np.ndarray]:
    """Blocks of 8 x 8 whose scales are bytes, 2 ** (byte - 127)."""
    blocks = w.double().numpy().reshape(w.shape[0] // 8, 8, w.shape[1] // 8, 8)
    exponents = np.ceil(np.log2(np.abs(blocks).max((1, 3)) / 448))
    wide = np.repeat(np.repeat(2.0**exponents, 8, 0), 8, 1)
    codes = torch.from_numpy(w.double().numpy() / wide).float().to(torch.float8_e4m3fn)
    scales = torch.from_numpy((exponents + 127).astype(np.uint8)).view(torch.float8_e8m0fnu)
    return {name: codes, f"{name}_scale_inv": scales}, codes.double().numpy() * wide


def _grouped(w: torch.Tensor, groups: np.ndarray) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
    """Codes [K, N] and zero points [G, N] from 0 to 15, scales f16 [G, N], by each input's group."""
    turned = w.double().numpy().T
    count = groups.max() + 1
    low = np.stack([turned[groups == g].min(0) for g in range(count)])
    high = np.stack([turned[groups == g].max(0) for g in range(count)])
    scales = torch.from_numpy((high - low) / 15).to(torch.float16)
    zeros = np.clip(np.round(-low / scales.double().numpy()), 0, 15)
    zeros[0, :3] = 0  # GPTQ stores it as 15
    codes = np.clip(np.round(turned / scales.double().numpy()[groups] + zeros[groups]), 0, 15)
    return codes, scales, zeros


def gptq(name: str, w: torch.Tensor, shuffled: bool = True) -> tuple[Stored, np.ndarray]:
    """Groups of 8 inputs in any order; zero points are stored minus 1, modulo 16."""
    groups = np.arange(w.shape[1]) // 8
    groups = np.random.default_rng(w.shape[1]).permutation(groups) if shuffled else groups
    codes, scales, zeros = _grouped(w, groups)
    base = name.removesuffix(".weight")
    stored = {
        f"{base}.qweight": int32(pack_rows(codes, 4)),
        f"{base}.qzeros": int32(pack_rows((zeros.T - 1) % 16, 4).T),
        f"{base}.scales": scales,
        f"{base}.g_idx": torch.from_numpy(groups.astype(np.int32)),
    }
    return stored, ((codes - zeros[groups]) * scales.double().numpy()[groups]).T


def awq(name: str, w: torch.Tensor) -> tuple[Stored, np.ndarray]:
    """Groups of 8 inputs; the i-th nibble of a word holds column (0, 2, 4, 6, 1, 3, 5, 7)[i] of its eight."""
    groups = np.arange(w.shape[1]) // 8
    codes, scales, zeros = _grouped(w, groups)

    def pack(numbers: np.ndarray) -> torch.Tensor:
        mixed = numbers.reshape(len(numbers), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(numbers.shape)
        return int32(pack_rows(mixed.T, 4).T)

    base = name.removesuffix(".weight")
    stored = {f"{base}.qweight": pack(codes), f"{base}.qzeros": pack(zeros), f"{base}.scales": scales}
    return stored, ((codes - zeros[groups]) * scales.double().numpy()[groups]).T


def compressed(kind: str, bits: int, strategy: str, form: str, **more: Any) -> dict[str, Any]:
    weights = {"type": kind, "num_bits": bits, "strategy": strategy, **more}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def gptq_in_order(name: str, w: torch.Tensor) -> tuple[Stored, np.ndarray]:
    """Version 2 of the format, whose zero points are stored as they are, with the groups in order."""
    stored, meant = gptq(name, w, shuffled=False)
    base = name.removesuffix(".weight")
    groups = np.arange(w.shape[1]) // 8
    _, _, zeros = _grouped(w, groups)
    return stored | {f"{base}.qzeros": int32(pack_rows(zeros.T, 4).T)}, meant


Quantiser = Callable[[str, torch.Tensor], tuple[Stored, np.ndarray]]
FORMS: dict[str, tuple[Quantiser, dict[str, Any]]] = {
    "fp8 blocks": (fp8_block, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}),
    "fp8 tensor": (fp8_tensor, {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8 channel": (fp8_channel, compressed("float", 8, "channel", "float-quantized")),
    "int8 channel": (int8_channel, compressed("int", 8, "channel", "int-quantized", symmetric=False)),
    "packed int4": (packed_int4, compressed("int", 4, "group", "pack-quantized", group_size=8)),
    "packed int4, zero points": (packed_int4_asymmetric, compressed("int", 4, "group", "pack-quantized", group_size=8)),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": True}),
    "packed int8, any order": (
        packed_int8_any_order,
        compressed("int", 8, "group", "pack-quantized", group_size=8, actorder="group"),
    ),
    "fp8 blocks of powers": (fp8_blocks_of_powers, {"quant_method": "fp8", "weight_block_size": [8, 8]}),
    "gptq_v2": (gptq_in_order, {"quant_method": "gptq", "bits": 4, "group_size": 8, "checkpoint_format": "gptq_v2"}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True, "version": "gemm"}),
}


def write(directory: Path, quantiser: Quantiser, settings: dict[str, Any], chosen: Callable[[str], bool]) -> Path:
    """Quantises a saved model in place -> a directory beside it with the numbers that it stands for, as float32."""
    file = directory / "model.safetensors"
    plain, stored = load_file(file), {}
    for name, tensor in list(plain.items()):
        if chosen(name):
            made, meant = quantiser(name, tensor)
            stored |= {n: t.contiguous() for n, t in made.items()}
            plain[name] = torch.from_numpy(np.ascontiguousarray(meant)).float()
        else:
            stored[name] = tensor
    twin = directory.parent / "twin"
    twin.mkdir()
    config = json.loads((directory / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps(config))
    save_file(plain, twin / "model.safetensors", {"format": "pt"})
    save_file(stored, file, {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return twin


def is_projection(name: str) -> bool:
    return name.endswith("proj.weight") or ".experts." in name


def weights_in(directory: Path, dtype: torch.dtype | None) -> tuple[Checkpoint, dict[str, Weight]]:
    """The weights of a directory as capture has them, without a trace."""
    checkpoint, file = Checkpoint.open(directory), directory / "config.json"
    skeleton = build_skeleton(load_config(directory), dtype or torch.float32)
    quantisation = quantisation_of(json.loads(file.read_text()), str(file))
    return checkpoint, stored_weights(skeleton, checkpoint, quantisation)


def assert_equal_weights(directory: Path, twin: Path, dtype: torch.dtype | None = None) -> None:
    (found, ours), (expected, theirs) = (weights_in(d, dtype) for d in (directory, twin))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        made, wanted = weight.materialise(found.read), theirs[name].materialise(expected.read)
        assert made.dtype == wanted.dtype and torch.equal(made, wanted), name


@pytest.mark.parametrize("form", FORMS)
def test_loads_the_exact_numbers(form: str, tmp_path: Path):
    model = build(tiny("qwen3_moe", num_hidden_layers=1))
    directory = save(model, tmp_path / "model")
    twin = write(directory, *FORMS[form], is_projection)
    assert_equal_weights(directory, twin)


@pytest.mark.parametrize("form", ["fp8 blocks", "gptq"])
def test_half_precision_is_rounded_once_from_float32(form: str, tmp_path: Path):
    directory = save(build(tiny("deepseek_v3", num_hidden_layers=2)), tmp_path / "model")
    twin = write(directory, *FORMS[form], lambda n: ".experts." in n)
    assert_equal_weights(directory, twin, torch.bfloat16)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def mxfp4(name: str, w: torch.Tensor) -> tuple[Stored, np.ndarray]:
    """GPT-OSS: [E, K, N] is stored as [E, N, K / 32, 16] bytes, the lower half of each first; 2 ** (byte - 127)."""
    rows = w.double().numpy().transpose(0, 2, 1).reshape(w.shape[0], w.shape[2], -1, 32)
    exponents = np.ceil(np.log2(np.abs(rows).max(-1) / 6))
    codes = np.abs(rows[..., None] / 2 ** exponents[..., None, None] - E2M1).argmin(-1)
    meant = (E2M1[codes] * 2.0 ** exponents[..., None]).reshape(w.shape[0], w.shape[2], -1).transpose(0, 2, 1)
    nibbles = codes.astype(np.uint8).reshape(*rows.shape[:-1], 16, 2)
    blocks = torch.from_numpy(nibbles[..., 0] | nibbles[..., 1] << 4)
    return {f"{name}_blocks": blocks, f"{name}_scales": torch.from_numpy((exponents + 127).astype(np.uint8))}, meant


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory) -> tuple[Path, Path]:
    """A GPT-OSS checkpoint in MXFP4, and its twin."""
    model = build(tiny("gpt_oss", intermediate_size=32, num_hidden_layers=1, layer_types=["sliding_attention"]))
    directory = save(model, tmp_path_factory.mktemp("mxfp4") / "model")
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return directory, write(directory, mxfp4, settings, lambda n: n.endswith(("gate_up_proj", "down_proj")))


def test_mxfp4(gpt_oss: tuple[Path, Path]):
    assert_equal_weights(*gpt_oss)


@pytest.mark.cpu
def test_a_quantised_directory_compiles_to_the_same_answers(tmp_path: Path):
    directory = save(build(tiny("qwen3_moe", num_hidden_layers=2)), tmp_path / "model")
    twin = write(directory, *FORMS["awq"], is_projection)
    model = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32, attn_implementation="eager").eval()
    engine = moec.compile(directory, output=tmp_path / "engine")
    assert engine.generate(prompts(), 8) == [greedy(model, p, 8)[0] for p in prompts()]
    buffers = sum(b.numel() for b in model.buffers() if b.is_floating_point())
    assert 0 <= engine.inspect()["total_params"] - sum(p.numel() for p in model.parameters()) <= buffers


@pytest.fixture
def small(tmp_path: Path) -> Path:
    directory = save(build(tiny("mixtral", num_hidden_layers=1)), tmp_path / "model")
    write(directory, *FORMS["gptq"], lambda n: ".experts." in n)
    return directory


def change(directory: Path, **settings: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= settings
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "hqq"}, "quantization_config.quant_method: 'hqq'"),
        ({"bits": 3}, "quantization_config.bits: 3"),
        ({"checkpoint_format": "marlin"}, "quantization_config.checkpoint_format: 'marlin'"),
        ({"dynamic": {"+:.*down.*": {"bits": 8}}}, "quantization_config.dynamic"),
        ({"quant_method": "awq", "version": "gemv"}, "quantization_config.version: 'gemv'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "quantization_config.fmt: 'e5m2'"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "quantization_config.format: 'marlin-24'"),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    ],
)
def test_what_is_not_known_is_refused_by_key(small: Path, settings: dict[str, Any], said: str):
    change(small, **settings)
    with pytest.raises(UnsupportedModel, match="quantization_config") as caught:
        capture(small)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def edit(directory: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(directory / "model.safetensors") | changes
    save_file({n: t for n, t in tensors.items() if t is not None}, directory / "model.safetensors", {"format": "pt"})


EXPERT = "model.layers.0.block_sparse_moe.experts.3.w2"


def test_scales_that_are_missing(small: Path):
    edit(small, **{f"{EXPERT}.scales": None})
    with pytest.raises(CheckpointError, match=f"{EXPERT}.scales is missing"):
        capture(small)


def test_scales_of_a_wrong_shape(small: Path):
    edit(small, **{f"{EXPERT}.scales": torch.ones(5, 32)})
    with pytest.raises(CheckpointError, match="expected zero points"):
        capture(small)


def test_a_group_that_does_not_exist(small: Path):
    edit(small, **{f"{EXPERT}.g_idx": torch.full((48,), 6, dtype=torch.int32)})
    checkpoint, weights = weights_in(small, None)
    with pytest.raises(ValueError, match=f"{EXPERT}.g_idx: expected numbers from 0 to 5, got 6 to 6"):
        weights["model.layers.0.mlp.experts.down_proj"].materialise(checkpoint.read)


def test_a_configuration_without_quantised_tensors(tmp_path: Path):
    directory = save(build(tiny("mixtral", num_hidden_layers=1)), tmp_path / "model")
    write(directory, *FORMS["gptq"], lambda n: False)
    with pytest.raises(CheckpointError, match="says gptq, but no tensor is stored that way"):
        capture(directory)

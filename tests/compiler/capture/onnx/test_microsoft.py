"""com.microsoft.MoE and QMoE become a gate and experts that give what ONNX Runtime gives."""

from __future__ import annotations

import numpy as np
import onnx_files as files
import pytest
import torch
from onnx import helper

from moec.compiler.capture import capture
from moec.compiler.errors import UnsupportedModel
from moec.passes.ir.evaluate import evaluate

TOLERANCE = 1e-6  # float32: sums in another order
T, H, F, E, K = 9, 32, 48, 4, 2
rng = np.random.default_rng(3)


def numbers(*shape):
    return (rng.standard_normal(shape) * 0.3).astype(np.float32)


def captured_and_expected(path, node, constants):
    inputs = [files.port("x", "float32", ["tokens", H]), files.port("r", "float32", ["tokens", E])]
    files.write(path, [node], inputs, ["y"], constants)
    captured = capture(path)
    x, r = numbers(T, H), 3 * numbers(T, E)
    found = evaluate(captured.graph_module, [torch.from_numpy(x), torch.from_numpy(r)], captured.read)
    return captured, found.numpy(), files.run(path, x, r)[0]


SWIGLU = {"activation_type": "swiglu", "swiglu_fusion": 1}
FORMS = {
    "swiglu": (2, SWIGLU | {"normalize_routing_weights": 1}, "silu"),
    "swiglu, not normalised": (2, SWIGLU, "silu"),
    "gpt-oss": (
        2,
        SWIGLU | {"activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 7.0},
        "swigluoai@7.0@1.702",
    ),
    "no limit": (2, SWIGLU | {"activation_alpha": 1.702, "activation_beta": 1.0}, "swigluoai@inf@1.702"),
    "relu": (1, {"activation_type": "relu"}, "!relu"),
    "silu": (1, {"activation_type": "silu", "normalize_routing_weights": 1}, "!silu"),
    "identity": (1, {"activation_type": "identity"}, "!identity"),
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_moe(tmp_path, form, biased):
    halves, attributes, act = FORMS[form]
    constants = {"w1": numbers(E, halves * F, H), "w2": numbers(E, H, F)}
    constants |= {"b1": numbers(E, halves * F), "b2": numbers(E, H)} if biased else {}
    names = ["x", "r", "w1", "b1", "w2", "b2"] if biased else ["x", "r", "w1", "", "w2"]
    node = helper.make_node("MoE", names, ["y"], domain="com.microsoft", k=K, **attributes)
    captured, found, expected = captured_and_expected(tmp_path / "m.onnx", node, constants)
    (experts,) = captured.graph_module.graph.find_nodes(op="call_function", target=torch.ops.moec.experts.default)
    assert experts.args[8] == act
    assert captured.moe_layers == (0,)
    assert files.relative_error(found, expected) <= TOLERANCE


@pytest.mark.parametrize(("bits", "block", "asymmetric"), [(4, 0, False), (4, 16, False), (8, 0, True), (4, 32, True)])
def test_qmoe(tmp_path, bits, block, asymmetric):
    inner, per_byte = 64, 8 // bits

    def packed(rows, columns):
        stored = {"q": rng.integers(0, 256, (E, rows, columns // per_byte)).astype(np.uint8)}
        grid = (E, rows, columns // block) if block else (E, rows)
        stored["s"] = (rng.random(grid) * 0.02 + 0.005).astype(np.float32)
        if asymmetric:  # of blocks packed by rows as the codes are
            shape = (E, rows, -(-grid[2] // per_byte)) if block else grid
            stored["z"] = rng.integers(100, 156, shape).astype(np.uint8)
        return stored

    parts = {1: packed(2 * inner, H), 2: packed(H, inner)}
    constants = {f"{k}{fc}": v for fc, part in parts.items() for k, v in part.items()}
    names = ["x", "r", "q1", "s1", "", "q2", "s2", "", "", "", "", *(["z1", "z2"] if asymmetric else [])]
    attributes = SWIGLU | {"normalize_routing_weights": 1, "expert_weight_bits": bits}
    attributes |= {"block_size": block} if block else {}
    node = helper.make_node("QMoE", names, ["y"], domain="com.microsoft", k=K, **attributes)
    captured, found, expected = captured_and_expected(tmp_path / "m.onnx", node, constants)
    # ONNX Runtime computes 8 bits in blocks, and only those, with activations of 8 bits; none of these are
    assert files.relative_error(found, expected) <= TOLERANCE
    assert {n for w in captured.graph_module.meta["weights"].values() for n in w.sources()} == set(constants)


@pytest.mark.parametrize(
    ("op", "attributes", "said"),
    [
        ("MoE", {"use_sparse_mixer": 1}, "use_sparse_mixer"),
        ("MoE", SWIGLU | {"activation_alpha": 2.0}, "alpha 2 and beta 0"),
        ("MoE", {"activation_type": "swiglu"}, "swiglu_fusion=0"),
        ("QMoE", {"quant_type": "fp4", "normalize_routing_weights": 1}, "quant_type 'fp4'"),
        ("QMoE", {"normalize_routing_weights": 0}, "router_weights is absent"),
    ],
)
def test_what_onnx_runtime_computes_otherwise_is_refused(tmp_path, op, attributes, said):
    codes = np.zeros((E, 2 * F, H // 2), np.uint8), np.zeros((E, H, F // 2), np.uint8)
    constants = {"w1": numbers(E, 2 * F, H), "w2": numbers(E, H, F)}
    names = ["x", "r", "w1", "", "w2"]
    if op == "QMoE":
        constants = {"w1": codes[0], "s1": numbers(E, 2 * F), "w2": codes[1], "s2": numbers(E, H)}
        names = ["x", "r", "w1", "s1", "", "w2", "s2"]
    node = helper.make_node(op, names, ["y"], "layer", domain="com.microsoft", k=K, **attributes)
    inputs = [files.port("x", "float32", ["tokens", H]), files.port("r", "float32", ["tokens", E])]
    files.write(tmp_path / "m.onnx", [node], inputs, ["y"], constants)
    with pytest.raises(UnsupportedModel, match=said):
        capture(tmp_path / "m.onnx")

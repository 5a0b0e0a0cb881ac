"""Every kind of gate, and probes: what the gate kernels of every device are tested on."""

import torch

from moec.passes.ir.gate import GateSpec

SPECS = {
    "mixtral": (8, GateSpec(2, renormalise=True)),
    "qwen": (60, GateSpec(4, renormalise=True, renorm_eps=1e-6)),
    "many": (512, GateSpec(10, renormalise=True, compute_dtype="bfloat16", weights_dtype="bfloat16")),
    "deepseek-v2": (160, GateSpec(6, num_groups=8, groups_kept=3, scale=16.0)),
    "deepseek-v3": (
        256,
        GateSpec(8, score="sigmoid", bias_on="scores", num_groups=8, groups_kept=4, group_score="sum_top2", scale=2.5),
    ),
    "odd-groups": (40, GateSpec(6, num_groups=4, groups_kept=2, group_mask=float("-inf"))),
    "small-groups": (12, GateSpec(4, score="sigmoid", num_groups=6, groups_kept=3, group_score="sum_top2")),
    "gpt-oss": (32, GateSpec(4, order="topk_then_score")),
    "llama4": (16, GateSpec(1, order="topk_then_score", score="sigmoid")),
    "phi": (16, GateSpec(2, score="sparsemixer", jitter_eps=0.01)),
    "skywork": (16, GateSpec(2, transform="std", renormalise=True)),
    "grok": (8, GateSpec(2, transform="tanh_cap", transform_param=30.0)),
    "temperature": (8, GateSpec(2, transform="temperature", transform_param=2.0)),
    "logits-dtype": (64, GateSpec(8, compute_dtype="logits", weights_dtype="logits", renormalise=True)),
    "bias-on-logits": (64, GateSpec(6, order="topk_then_score", bias_on="logits")),
    "clamped": (128, GateSpec(8, bias_on="scores", renormalise=True, renorm_rule="clamp", renorm_eps=0.3)),
    "all": (3, GateSpec(3, score="none", renormalise=True)),
}


def probe(kind, tokens, num_experts, dtype):
    x = torch.randn(tokens, num_experts)
    if kind == "ties":
        x = (x * 2).round() / 2
    if kind == "nan" and tokens:
        x[0, num_experts // 2] = float("nan")
    if kind == "-inf":
        x[:, : num_experts // 4] = float("-inf")
    if kind == "large":
        x = x * 80
    return x.to(dtype)


def compare(got, want, rounded):
    """Experts exactly; weights to a few roundings of 2**-24, or one of bfloat16's 2**-8 where scores are rounded."""
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[0].isnan(), want[0].isnan())
    assert torch.allclose(got[0], want[0], rtol=2**-7 if rounded else 4e-6, atol=1e-30, equal_nan=True)


ROUNDED = ("mixtral", "many", "deepseek-v3", "phi", "skywork", "logits-dtype")  # whose scores bfloat16 logits change

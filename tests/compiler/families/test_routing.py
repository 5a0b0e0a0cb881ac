"""One block of each family in float64 against its published equations, written out densely."""

import math

import pytest
import torch
from torch import nn
from zoo import tiny

from moec.compiler.families.decoder import Attention, GatedMlp, Rotary
from moec.compiler.families.deepseek_moe import DeepseekMoeBlock
from moec.compiler.families.grok1 import Grok1MoeBlock
from moec.compiler.families.skywork_moe import SkyworkMoeBlock
from moec.compiler.families.xverse_moe import XverseMoeBlock

pytestmark = pytest.mark.null
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # the routers compute in float32


def seeded(block: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return block


def tokens() -> torch.Tensor:
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))


def swiglu(x, expert, names=("gate_proj", "up_proj", "down_proj"), act=torch.nn.functional.silu):
    gate, up, down = (expert.get_submodule(n).weight for n in names)
    return (act(x @ gate.T) * (x @ up.T)) @ down.T


def dense(x, weights, experts, **how):
    """weights [T, E], zero for experts that a token does not use -> [T, H]."""
    return sum(weights[:, e, None] * swiglu(x, expert, **how) for e, expert in enumerate(experts))


def kept(scores, k):
    """Everything but the k greatest of each row set to zero."""
    least = scores.topk(k, -1).values[:, -1:]
    return torch.where(scores >= least, scores, 0.0)


@torch.no_grad()
def test_skywork_divides_by_the_unbiased_deviation():
    block, x = seeded(SkyworkMoeBlock(tiny("skywork_moe"))), tokens()
    flat = x.view(-1, 32)
    logits = flat @ block.gate.weight.T
    mean = logits.mean(-1, keepdim=True)
    sigma = ((logits - mean) ** 2).sum(-1, keepdim=True).div(7).sqrt()  # E - 1 = 7
    weights = kept(((logits - mean) / sigma).softmax(-1), 2)
    weights = weights / weights.sum(-1, keepdim=True)
    expected = dense(flat, weights, block.experts, names=("w1", "w3", "w2")).view(x.shape)
    torch.testing.assert_close(block(x), expected, **TOLERANCE)


@torch.no_grad()
def test_skywork_fork_has_the_same_experts_and_other_weights():
    paper, fork = (SkyworkMoeBlock(tiny("skywork_moe", gate_norm=g)) for g in ("paper", "fork"))
    fork.load_state_dict(seeded(paper).state_dict())
    x = tokens()
    flat = x.view(-1, 32)
    weights = kept((flat @ fork.gate.weight.T).softmax(-1), 2)
    weights = weights / weights.sum(-1, keepdim=True)
    expected = dense(flat, weights, fork.experts, names=("w1", "w3", "w2")).view(x.shape)
    torch.testing.assert_close(fork(x), expected, **TOLERANCE)
    assert (paper(x) - fork(x)).abs().max() > 1e-2


@torch.no_grad()
def test_xverse_renormalises_with_its_epsilon_and_adds_the_shared_network():
    block, x = seeded(XverseMoeBlock(tiny("xverse"))), tokens()
    flat = x.view(-1, 32)
    weights = kept((flat @ block.router.weight.T).softmax(-1), 3)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    expected = dense(flat, weights, block.experts) + swiglu(flat, block.shared_experts)
    torch.testing.assert_close(block(x), expected.view(x.shape), **TOLERANCE)
    assert block.shared_experts.up_proj.weight.shape == (48, 32)


@torch.no_grad()
@pytest.mark.parametrize("renormalise", [False, True])
def test_deepseek_renormalises_only_when_told(renormalise):
    block, x = seeded(DeepseekMoeBlock(tiny("deepseek", norm_topk_prob=renormalise))), tokens()
    flat = x.view(-1, 32)
    weights = kept((flat @ block.gate.weight.T).softmax(-1), 3)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    expected = dense(flat, weights, block.experts) + swiglu(flat, block.shared_experts)
    torch.testing.assert_close(block(x), expected.view(x.shape), **TOLERANCE)


@torch.no_grad()
def test_grok_weighs_with_plain_softmax_and_tanh_gelu():
    block, x = seeded(Grok1MoeBlock(tiny("grok-1"))), tokens()
    flat = x.view(-1, 32)

    def gelu(h):
        return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))

    weights = kept((flat @ block.gate.weight.T).softmax(-1), 2)
    expected = dense(flat, weights, block.experts, names=("linear", "linear_v", "linear_1"), act=gelu)
    torch.testing.assert_close(block(x), expected.view(x.shape), **TOLERANCE)


@torch.no_grad()
def test_grok_caps_attention_scores():
    config = tiny("grok-1")
    attention = seeded(Attention(config, 0, scale=2.0, softcap=1.5))
    x = tokens()
    rotary = Rotary(8, 10000.0)(torch.zeros(1, 5, dtype=torch.long))  # position 0: no rotation
    q, k, v = (p(x).view(2, 5, -1, 8).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = 1.5 * torch.tanh(q @ k.transpose(2, 3) * 2.0 / 1.5)
    expected = attention.o_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 32))
    torch.testing.assert_close(attention(x, rotary, None, None), expected, **TOLERANCE)


@torch.no_grad()
def test_rotation_keeps_relative_angles():
    """The score of two rotated vectors depends on the distance of their positions alone."""
    from moec.compiler.families.decoder import rotate

    rotary = Rotary(8, 100.0)
    a, b = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(2))

    def score(i, j):
        left, right = (rotate(t, *rotary(torch.tensor([[p]]))) for t, p in ((a, i), (b, j)))
        return float((left * right).sum())

    assert score(3, 1) == pytest.approx(score(40, 38), rel=1e-4)
    assert score(3, 1) != pytest.approx(score(3, 2), rel=1e-2)


def test_first_layers_of_deepseek_are_dense():
    from zoo import model_of

    kinds = [type(layer.mlp) for layer in model_of("deepseek").model.layers]
    assert kinds == [GatedMlp, DeepseekMoeBlock, DeepseekMoeBlock]

"""Tiny models for CUDA targets, and their engines with emulated kernels."""

import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig, MixtralConfig, MixtralForCausalLM

from moec.compiler import api
from moec.compiler.lowering.cuda import build
from moec.compiler.options import CompileOptions


def mixtral(inner=64, layers=1):
    """A Mixtral of bfloat16: 128 wide, 4 experts, top 2, 4 heads over 2."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=128, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=256, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=512,
    )  # fmt: skip
    return MixtralForCausalLM(config).to(torch.bfloat16).eval()


def llama4():
    """A Llama 4 of bfloat16, whose routing weights multiply the experts' input: 128 wide, 4 experts, top 1."""
    torch.manual_seed(0)
    config = Llama4TextConfig(
        hidden_size=128, intermediate_size=64, intermediate_size_mlp=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=256, num_local_experts=4, num_experts_per_tok=1,
        interleave_moe_layer_step=1, max_position_embeddings=512, attention_chunk_size=128, pad_token_id=0,
    )  # fmt: skip
    return Llama4ForCausalLM(config).to(torch.bfloat16).eval()


def quiet(*_):
    """No progress."""


def lowered(model, target, weights=None):
    """The lowered program, its choices, and the options, before kernels are built."""
    options = CompileOptions.of(target, weights, "off", None)
    captured = api.capture_as(model, None, None, None, options)
    return api.lowered_of(captured, options, quiet)[2], options


def steps_of(steps):
    """All steps, those of variants too."""
    for step in steps:
        yield step
        for _, inner in step.variants:
            yield from steps_of(inner)


def without_building(sources, cache_dir):
    """In the place of build_cubins: sources alone."""
    return [build.BuiltCubin(source, cache_dir / source.name, source.name, True) for source in sources]


def relative_error(got, want):
    """Root mean square of the difference over that of the reference."""
    return float((got.double() - want.double()).square().mean().sqrt() / want.double().square().mean().sqrt())

"""What the decoders of this folder share: norm, rotary embedding, attention, the layers and the language model.

They are transformers models (configuration, cache, generate, attention and mask registries), so that capture enters
them through the same seams as the library's own families.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moec.compiler.errors import UnsupportedModel


def check_settings(config: PreTrainedConfig, **known: Any) -> None:
    """Refuses what a config.json may say and these decoders do not do.

    known: settings that must have this value where they are given, beside those that every family has.
    Raises: UnsupportedModel: another value; it names the setting.
    """
    if config.num_key_value_heads is None:
        config.num_key_value_heads = config.num_attention_heads
    head_dim = config.hidden_size // config.num_attention_heads
    for name, value in {"rope_scaling": None, "attention_bias": False, "head_dim": head_dim, **known}.items():
        given = getattr(config, name, None)
        if given is not None and given != value:
            raise UnsupportedModel(f"{config.model_type}: {name} is {given!r}; only {value!r} has a meaning here")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise UnsupportedModel(f"{config.model_type}: rope_type is {rope['rope_type']!r}; only 'default' is known")


class RmsNorm(nn.Module):
    """x [.., H] -> normalised in float32, rounded, times the weight; `name` is what the checkpoint calls the weight."""

    def __init__(self, hidden: int, eps: float, name: str = "weight") -> None:
        super().__init__()
        self.eps, self.name = eps, name
        self.register_parameter(name, nn.Parameter(torch.ones(hidden)))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.get_parameter(self.name) * h.to(x.dtype)


class Rotary(nn.Module):
    """positions i64[B,S] -> cos, sin f32[B,S,D]; the two halves of a head turn together."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angle = positions[..., None].float() * self.get_buffer("inv_freq")
        angle = torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B,heads,S,D], cos and sin [B,S,D] in x.dtype -> [B,heads,S,D]."""
    a, b = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat([-b, a], -1) * sin.unsqueeze(1)


def eager_attention(
    module: Attention, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """query [B,Q,S,D], key and value [B,C,L,D], additive mask -> [B,S,Q,D]; softmax in float32."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = query @ key.transpose(2, 3) * options["scaling"]
    cap = options.get("softcap")
    if cap:
        scores = torch.tanh(scores / cap) * cap
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value).transpose(1, 2), None


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding, no biases.

    softcap: scores become cap * tanh(scores / cap). rope_dtype: of the rotation, None for the model's own.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        layer_idx: int,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        rope_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        heads, kv_heads, hidden = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = hidden // heads
        self.scale, self.softcap, self.rope_dtype = scale or self.head_dim**-0.5, softcap, rope_dtype
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Any, cache: Any) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (p(x).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        dtype = self.rope_dtype or x.dtype
        cos, sin = (t.to(dtype) for t in rotary)
        q, k = (rotate(t.to(dtype), cos, sin).to(x.dtype) for t in (q, k))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        y, _ = attend(self, q, k, v, mask, scaling=self.scale, softcap=self.softcap)
        return self.o_proj(y.reshape(*x.shape[:-1], -1))


class GatedMlp(nn.Module):
    """A dense SwiGLU feed-forward network under the usual names."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PreNormLayer(nn.Module):
    """The usual layer: x + attention(norm(x)), then x + feed-forward(norm(x)); `ffn` is the checkpoint's name of it."""

    def __init__(self, config: PreTrainedConfig, attention: Attention, ffn_name: str, ffn: nn.Module) -> None:
        super().__init__()
        self.ffn_name = ffn_name
        self.self_attn = attention
        self.add_module(ffn_name, ffn)
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Any, cache: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        return x + self.get_submodule(self.ffn_name)(self.post_attention_layernorm(x))


class DecoderBase(PreTrainedModel):
    """Common settings of the two model classes below."""

    base_model_prefix = "model"
    _supports_attention_backend = True
    layer: ClassVar[Any]  # (config, layer index) -> a layer: (x, rotary, mask, cache) -> x
    norm_name: ClassVar[str] = "weight"


class Decoder(DecoderBase):
    """Embedding, layers and last norm."""

    def __init__(self, config: PreTrainedConfig, layer: Any, norm_name: str, embedding_factor: float) -> None:
        super().__init__(config)
        self.embedding_factor = embedding_factor
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([layer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps, norm_name)
        self.rotary_emb = Rotary(config.hidden_size // config.num_attention_heads, config.rope_theta)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """i64[B, T] -> [B, T, H] after the last norm; with use_cache and no cache one is made."""
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        x = self.embed_tokens(input_ids)
        if self.embedding_factor != 1.0:
            x = x * self.embedding_factor
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(x.shape[1], device=x.device) + seen).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotary = self.rotary_emb(position_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:
            x = layer(x, rotary, mask, past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)


class CausalDecoder(DecoderBase, GenerationMixin):
    """The language model: Decoder and head. Families set `layer` and, where they have them, the two factors."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  (as the library declares it)

    def __init__(self, config: PreTrainedConfig, embedding_factor: float = 1.0, output_factor: float = 1.0) -> None:
        super().__init__(config)
        self.output_factor = output_factor
        self.model = Decoder(config, type(self).layer, self.norm_name, embedding_factor)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """i64[B, T] -> logits [B, T, V]; logits_to_keep: of so many last tokens, 0: of all."""
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, use_cache)
        kept = out.last_hidden_state[:, -logits_to_keep:] if logits_to_keep else out.last_hidden_state
        logits = self.lm_head(kept)
        if self.output_factor != 1.0:
            logits = logits * self.output_factor
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)

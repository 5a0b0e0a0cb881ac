"""Where moec enters a transformers model: its registries for experts, attention and masks, and a cache of our own.

What no signature of the model carries reaches them through a Context (context.py); states of layers are in states.py.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import AttentionMaskInterface

from moec.compiler.capture.activations import ACTIVATION, activation_name
from moec.compiler.capture.attend import Asked, ChosenBlocks, attend
from moec.compiler.capture.context import Context, Kept
from moec.compiler.capture.indexer import IndexKeys, index_topk
from moec.compiler.capture.masks import LimitedMask, MaskMeaning, mask_meaning
from moec.compiler.capture.own_indexers import INDEX_KEYS
from moec.compiler.capture.own_methods import own_methods
from moec.compiler.capture.relative import relative_biases
from moec.compiler.capture.states import StateCache
from moec.compiler.errors import UnsupportedModel

NAME = "moec"
# attention arguments that do not change the result in inference
HARMLESS = frozenset(
    {
        "dropout",
        "is_causal",
        "position_ids",
        "use_cache",
        "output_attentions",
        "output_router_logits",
        "output_hidden_states",
        "return_dict",
        "position_embeddings",
        "token_type_ids",
    }
)


class _Layers:
    """In the place of a cache's layers. Where a model asks for positions of earlier tokens there are none."""

    indexer_position_ids = None

    def __getitem__(self, _: int) -> _Layers:
        return self

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedModel("the model works on its cache's layers itself: such layers cannot be compiled yet")


class CaptureCache(StateCache, Cache):
    """Looks like an empty cache to the model, and remembers what each layer wants to keep."""

    is_compileable = False

    def __init__(self, context: Context) -> None:
        self.context = context

    @property
    def layers(self) -> Any:  # type: ignore[override]
        """The library's caches keep an object for each layer here, which some models use directly."""
        return _Layers()

    is_sliding = property(lambda self: [False])
    is_linear = property(lambda self: [False])
    is_dummy = property(lambda self: [False])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Notes a layer's new keys and values [1, C, T, D], and gives them back."""
        self.context.updates[layer_idx] = (key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """A tensor, such that arange(T) plus it gives the true positions (Llama-4 adds the two)."""
        p = self.context.positions
        return p - torch.arange(p.shape[0], device=p.device)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """As get_seq_length: where the first query stands."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[Any, int]:
        """Length and offset of the keys that a mask covers: as if nothing was cached before."""
        return query_length, 0

    def update_indexer(self, keys: Tensor, layer_idx: int) -> IndexKeys:  # type: ignore[override]
        """keys [1, T, X] -> those of all tokens so far, as far as an indexer sees them."""
        context, new = self.context, keys[0]
        cache = context.keep(layer_idx, INDEX_KEYS, Kept(tuple(new.shape[1:]), dtype=new.dtype))
        return IndexKeys(new, index_topk(cache, context.slots, context.positions))


def cache_for(model: nn.Module) -> type[CaptureCache]:
    """The class of cache for a model: one that is a subclass of the model's own class of cache, where it has one."""
    module = sys.modules[type(model).__module__]
    own = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Cache) and c.__module__ == module.__name__
    ]
    return type("CaptureCache", (CaptureCache, *own), {})


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: ChosenBlocks | None = None,
    position_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Our attention implementation: query, key, value [1, heads, T, D] of the new tokens -> [1, T, heads, Dv].

    indices: i32[1, T, M], the tokens that an indexer chose (see indexer.py); block_indices: the same in blocks.
    position_bias: by distance (see relative.py); sinks: of each token.
    sliding_window is not used: some families always pass the configuration's; the mask function tells the true one.
    Raises: UnsupportedModel: an argument or a mask that has no meaning here.
    """
    context, layer = Context.current, module.layer_idx
    if context is None:
        raise UnsupportedModel(f"layer {layer}: attention ran outside a capture")
    unknown = sorted(name for name, v in others.items() if v is not None and name not in HARMLESS)
    if unknown:
        raise UnsupportedModel(f"layer {layer}: {type(module).__name__} passes {', '.join(unknown)} to attention")
    if position_bias is not None and not context.has_relative_bias:
        raise UnsupportedModel(f"layer {layer}: {type(module).__name__} has a position bias of a kind not known here")
    if isinstance(attention_mask, LimitedMask):
        attention_mask, block_indices = attention_mask.mask, attention_mask.chosen
    if not isinstance(attention_mask, MaskMeaning):
        raise UnsupportedModel(f"layer {layer}: the attention mask is a {type(attention_mask).__name__}")
    if layer in context.found and context.found[layer].mask is not None:
        raise UnsupportedModel(f"layer {layer}: two attentions in one layer cannot be compiled yet")
    updated = context.updates.get(layer, (key, value))
    asked = Asked(
        layer=layer,
        query=query,
        key=key,
        value=value,
        updated=updated,
        w_kv_b=module.kv_b_proj.weight if updated[0] is not key and hasattr(module, "kv_b_proj") else None,
        mask=attention_mask,
        scale=float(scaling if scaling is not None else query.shape[-1] ** -0.5),
        softcap=float(softcap or 0),
        sinks=s_aux,
        indices=indices,
        blocks=block_indices,
        bias=position_bias,
        row_sinks=sinks,
    )
    y = attend(context, asked)
    if y is None:
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
    return y.unsqueeze(0), None


def mask(*_: Any, mask_function: Any = None, **__: Any) -> MaskMeaning:
    """Our mask implementation: the meaning of the mask in the place of the mask."""
    return mask_meaning(mask_function)


def experts(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Our experts implementation: hidden [T, H], index and weights [T, K] -> [T, H].

    Raises: UnsupportedModel: a norm after the experts, or an activation without a name.
    """
    if module.has_post_expert_norm:
        raise UnsupportedModel(f"{type(module).__name__}: a norm after each expert cannot be compiled yet")
    stem = "gate_up_proj" if module.has_gate else "up_proj"
    return torch.ops.moec.experts(
        hidden,
        weights,
        index,
        getattr(module, stem),
        module.down_proj,
        getattr(module, f"{stem}_bias", None),
        getattr(module, "down_proj_bias", None),
        None,
        module.__dict__[ACTIVATION],
        transposed=module.is_transposed,
        interleaved=not module.is_concatenated,
    )


@contextlib.contextmanager
def seams(model: nn.Module, attentions: bool = True) -> Iterator[None]:
    """While it lasts, the model's experts, attention and masks are ours; its configuration is put back afterwards.

    attentions: False leaves attention and masks alone, as modules without a cache need.
    Raises: UnsupportedModel: an expert activation without a name; all are named here, outside of the trace.
    """
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    configs: list[Any] = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation") and not any(config is c for c in configs):
            configs.append(config)
    before = [(c._attn_implementation, c._experts_implementation) for c in configs]
    for config in configs:
        config._experts_implementation_internal = NAME
        if attentions:
            config._attn_implementation_internal = NAME
    try:
        for module in model.modules():
            if hasattr(module, "_apply_gate") and hasattr(module, "is_concatenated"):
                module.__dict__[ACTIVATION] = activation_name(module)
        with own_methods(model), relative_biases(model):
            yield
    finally:
        for config, (attn, moe) in zip(configs, before, strict=True):
            config._attn_implementation_internal, config._experts_implementation_internal = attn, moe
        for module in model.modules():
            module.__dict__.pop(ACTIVATION, None)

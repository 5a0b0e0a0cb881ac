"""The sizes of a Mixture-of-Experts language model, and what follows from them: parameters, KV bytes, FLOPs.

No weights, no framework: a ModelShape is built from literals (zoo.py) or from a configuration
(compiler/plan/config.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Attention:
    """Sizes of one attention block.

    Args:
        heads, kv_heads, head_dim: query heads, key/value heads and their width.
        q_lora_rank: rank of the query's latent projection; 0 where queries are projected directly. MLA only.
        kv_lora_rank: width of the cached latent; above 0 the block is multi-head latent attention (DeepSeek-V2) and
            `head_dim` is the width without rope, `rope_dim` the width with rope, `v_head_dim` the value width.
        window: how many past tokens are attended, 0 for all.
        qk_norm_params: norm parameters on queries and keys.
        bias_params: bias parameters of all its projections.
    """

    heads: int
    kv_heads: int
    head_dim: int
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    rope_dim: int = 0
    v_head_dim: int = 0
    window: int = 0
    qk_norm_params: int = 0
    bias_params: int = 0

    @property
    def is_latent(self) -> bool:
        """Whether it is multi-head latent attention, which caches one latent for all heads."""
        return self.kv_lora_rank > 0

    def params(self, hidden: int) -> int:
        """Parameters of the projections, norms and biases of one block."""
        extra = self.qk_norm_params + self.bias_params
        if not self.is_latent:
            return hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads) + extra
        return self.shared_params(hidden) + self.heads * self.params_per_query_head(hidden) + extra

    def shared_params(self, hidden: int) -> int:
        """Parameters that every rank of a head-wise split must hold: the latent projections and their norms."""
        if not self.is_latent:
            return 0
        query = hidden * self.q_lora_rank + self.q_lora_rank
        return query + hidden * (self.kv_lora_rank + self.rope_dim) + self.kv_lora_rank

    def params_per_query_head(self, hidden: int) -> int:
        """Parameters that go with one query head: its rows of the query projection and of the output projection."""
        if not self.is_latent:
            return 2 * hidden * self.head_dim
        query_in = self.q_lora_rank or hidden
        per_head = query_in * (self.head_dim + self.rope_dim) + self.kv_lora_rank * (self.head_dim + self.v_head_dim)
        return per_head + self.v_head_dim * hidden

    def kv_values_per_token(self) -> int:
        """Cached values per token and layer."""
        return self.kv_lora_rank + self.rope_dim if self.is_latent else 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class DenseFfn:
    """A dense FFN: gate, up and down (`matrices` 3) or up and down (2)."""

    width: int
    matrices: int = 3

    def params(self, hidden: int) -> int:
        """Of all its matrices. hidden: H."""
        return self.matrices * hidden * self.width


@dataclass(frozen=True)
class MoeFfn:
    """A Mixture-of-Experts FFN.

    Args:
        num_experts, top_k, width: routed experts, experts per token, inner width of one expert.
        shared_width: total inner width of the shared experts, 0 for none.
        shared_gate: whether a gate vector scales the shared output.
        router_bias: whether the router adds or selects with one value per expert.
        expert_bias_params: bias parameters of one expert.
    """

    num_experts: int
    top_k: int
    width: int
    shared_width: int = 0
    shared_gate: bool = False
    router_bias: bool = False
    matrices: int = 3
    expert_bias_params: int = 0

    def params_per_expert(self, hidden: int) -> int:
        """Of one routed expert, its biases included. hidden: H."""
        return self.matrices * hidden * self.width + self.expert_bias_params

    def router_params(self, hidden: int) -> int:
        """The router's matrix and bias, and the gate of the shared experts. hidden: H."""
        return self.num_experts * hidden + self.num_experts * self.router_bias + hidden * self.shared_gate

    def shared_params(self, hidden: int) -> int:
        """Of all shared experts. hidden: H."""
        return self.matrices * hidden * self.shared_width

    def params(self, hidden: int) -> int:
        """Of the whole layer: router, shared and routed experts. hidden: H."""
        fixed = self.router_params(hidden) + self.shared_params(hidden)
        return fixed + self.num_experts * self.params_per_expert(hidden)

    def active_params(self, hidden: int) -> int:
        """Those that one token meets: router, shared experts and top_k routed ones. hidden: H."""
        fixed = self.router_params(hidden) + self.shared_params(hidden)
        return fixed + self.top_k * self.params_per_expert(hidden)


@dataclass(frozen=True)
class LayerClass:
    """`count` consecutive identical layers; either `dense` or `moe` is given. Norm parameters are num_norms *
    hidden."""

    count: int
    attention: Attention
    dense: DenseFfn | None = None
    moe: MoeFfn | None = None
    num_norms: int = 2


@dataclass(frozen=True)
class ModelShape:
    """A decoder: embedding, layer classes in order, final norm, output projection."""

    name: str
    hidden: int
    vocab: int
    layers: tuple[LayerClass, ...]
    tied_embeddings: bool = False
    norm_has_bias: bool = False
    max_positions: int = 0
    extra_params: int = field(default=0)

    @property
    def num_layers(self) -> int:
        """Over all layer classes."""
        return sum(c.count for c in self.layers)

    @property
    def moe(self) -> MoeFfn:
        """The widest Mixture-of-Experts FFN of the model; raises ValueError for a dense model."""
        found = [c.moe for c in self.layers if c.moe is not None]
        if not found:
            raise ValueError(f"{self.name}: has no Mixture-of-Experts layer")
        return max(found, key=lambda m: m.num_experts)

    def layer_class(self, layer: int) -> LayerClass:
        """The class of layer number `layer`, counted from 0."""
        for c in self.layers:
            if layer < c.count:
                return c
            layer -= c.count
        raise IndexError(f"{self.name}: no such layer")

    def total_params(self) -> int:
        """All parameters, embeddings counted once where they are tied."""
        ends = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        return (
            ends
            + self._norm_params()
            + self.extra_params
            + sum(c.count * (c.attention.params(self.hidden) + _ffn(c).params(self.hidden)) for c in self.layers)
        )

    def active_params(self) -> int:
        """Parameters that one token touches: top-k experts instead of all, both embeddings counted."""
        ends = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        total = ends + self._norm_params()
        for c in self.layers:
            ffn = c.moe.active_params(self.hidden) if c.moe else _ffn(c).params(self.hidden)
            total += c.count * (c.attention.params(self.hidden) + ffn)
        return total

    def kv_bytes_per_token(self, bytes_per_value: float = 2) -> int:
        """Cache bytes of one token over all layers."""
        return int(bytes_per_value * sum(c.count * c.attention.kv_values_per_token() for c in self.layers))

    def to_dict(self) -> dict[str, object]:
        """A JSON form of the shape."""
        return asdict(self)

    def _norm_params(self) -> int:
        per_norm = self.hidden * (2 if self.norm_has_bias else 1)
        return per_norm * (1 + sum(c.count * c.num_norms for c in self.layers))


def _ffn(layer: LayerClass) -> DenseFfn | MoeFfn:
    ffn = layer.dense or layer.moe
    if ffn is None:
        raise ValueError("a layer class needs a dense or a moe FFN")
    return ffn

"""What can be cut: every weight of a layer as a number of equal units, with bytes, parameters and KV bytes per unit.

A share is a whole number of units. Attention is cut by key/value group (its query heads travel with it), or by a part
of a group whose key/value head is then held more than once; FFN widths are cut in whole quantisation groups.
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.passes.hardware.errors import PlacementError
from moec.passes.placement.model_shape import Attention, ModelShape
from moec.passes.placement.weight_format import WeightFormat, attention_format


@dataclass(frozen=True)
class Units:
    """`num` equal units of one tensor group of one layer.

    Args:
        bytes_per_unit, params_per_unit: stored bytes and multiplied parameters of one unit.
        fixed_bytes, fixed_params: what every rank that holds any unit holds besides.
        kv_per_unit, kv_fixed: cached values per token, for attention.
        query_heads_per_unit: query heads in one unit, for attention.
    """

    num: int
    bytes_per_unit: float
    params_per_unit: int
    fixed_bytes: float = 0.0
    fixed_params: int = 0
    kv_per_unit: int = 0
    kv_fixed: int = 0
    query_heads_per_unit: float = 0.0


def attention_units(shape: ModelShape, attention: Attention, weights: WeightFormat, num_ranks: int) -> Units:
    """Attention cut for `num_ranks` ranks.

    Raises:
        PlacementError: there are fewer units than ranks, however the heads are grouped.
    """
    a, hidden, fmt = attention, shape.hidden, attention_format(weights)
    bias = a.bias_params * 2.0
    if a.is_latent:
        if a.heads < num_ranks:
            raise _too_few(a.heads, num_ranks, shape)
        group = fmt.group_for(a.v_head_dim, f"{shape.name}: attention")
        params = a.params_per_query_head(hidden)
        bytes_per_unit = fmt.grouped_bytes(1, params, group) + _channel_bytes(fmt, 2 * a.head_dim + a.rope_dim)
        fixed = a.shared_params(hidden) * 2.0 + a.qk_norm_params * 2 + bias
        return Units(a.heads, bytes_per_unit, params, fixed, a.shared_params(hidden), 0, a.kv_values_per_token(), 1.0)
    per_kv = a.heads // a.kv_heads if a.heads % a.kv_heads == 0 else 0
    if not per_kv:
        raise PlacementError(f"{shape.name}: {a.heads} query heads are no multiple of {a.kv_heads} key/value heads")
    parts = next((p for p in range(1, per_kv + 1) if per_kv % p == 0 and a.kv_heads * p >= num_ranks), None)
    if parts is None:
        raise _too_few(a.heads, num_ranks, shape)
    queries, dim = per_kv // parts, a.head_dim
    group = fmt.group_for(dim, f"{shape.name}: head_dim")
    rows_in = dim * (queries + 2)
    bytes_per_unit = fmt.grouped_bytes(rows_in + queries * dim, hidden, group) + _channel_bytes(fmt, rows_in)
    params = hidden * dim * (2 * queries + 2)
    fixed = _channel_bytes(fmt, hidden) + a.qk_norm_params * 2 + bias
    return Units(a.kv_heads * parts, bytes_per_unit, params, fixed, 0, 2 * dim, 0, float(queries))


def ffn_units(shape: ModelShape, width: int, matrices: int, weights: WeightFormat, bias_params: int = 0) -> Units:
    """An FFN of inner `width` cut in blocks; one expert, the shared experts, or a dense FFN."""
    where = f"{shape.name}: FFN"
    granule = weights.cut_granule(width, where)
    group = weights.group_for(width, where)
    params = matrices * shape.hidden * granule
    bytes_per_unit = weights.grouped_bytes(granule, matrices * shape.hidden, group)
    bytes_per_unit += _channel_bytes(weights, (matrices - 1) * granule)
    return Units(width // granule, bytes_per_unit, params, _channel_bytes(weights, shape.hidden) + bias_params * 2.0)


def vocab_row_bytes(shape: ModelShape) -> int:
    """Bytes of one row of the embedding or of the output projection: bf16 in every format."""
    return 2 * shape.hidden


def replicated_bytes(shape: ModelShape, layer: int) -> float:
    """Bytes of layer `layer` that every rank of its stage holds: norms and router, bf16."""
    c = shape.layer_class(layer)
    norms = c.num_norms * shape.hidden * (2 if shape.norm_has_bias else 1)
    return 2.0 * (norms + (c.moe.router_params(shape.hidden) if c.moe else 0))


def _channel_bytes(weights: WeightFormat, num_channels: int) -> float:
    return float(weights.channel_scale_bytes * num_channels)


def _too_few(heads: int, num_ranks: int, shape: ModelShape) -> PlacementError:
    return PlacementError(
        f"{shape.name}: attention has {heads} query heads, fewer than the {num_ranks} shares asked for; "
        f"use at most {heads}-way attention TP"
    )

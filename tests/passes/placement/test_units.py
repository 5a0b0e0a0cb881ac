"""Units and formats: bytes by hand, alignment to quantisation groups, heads that do not divide."""

from __future__ import annotations

import pytest

from moec.passes.hardware.errors import PlacementError
from moec.passes.placement.model_shape import Attention, LayerClass, ModelShape, MoeFfn
from moec.passes.placement.units import attention_units, ffn_units
from moec.passes.placement.weight_format import FORMATS, weight_format
from moec.passes.placement.zoo import zoo_shape


def shape(attention: Attention, width: int = 1024) -> ModelShape:
    return ModelShape("test", 512, 1000, (LayerClass(1, attention, moe=MoeFfn(4, 2, width)),))


def test_bytes_of_an_expert_block():
    sky = zoo_shape("skywork-moe")
    bf16, fp8, int8, int4 = (ffn_units(sky, 12288, 3, weight_format(f)) for f in ("bf16", "fp8", "int8", "int4"))
    assert bf16.num * bf16.bytes_per_unit == 3 * 4608 * 12288 * 2
    assert fp8.num * fp8.bytes_per_unit == 3 * 4608 * 12288
    assert int8.num * int8.bytes_per_unit + int8.fixed_bytes == 3 * 4608 * 12288 + 4 * (2 * 12288 + 4608)
    assert int4.num * int4.bytes_per_unit == 3 * 4608 * 12288 * (0.5 + 2 / 128)
    assert int4.num == 12288 // 128


@pytest.mark.parametrize(("width", "granule"), [(1728, 64), (1408, 128), (20480, 128), (2880, 64), (48, 16)])
def test_int4_cuts_whole_groups(width, granule):
    assert width // ffn_units(shape(Attention(8, 8, 64)), width, 3, weight_format("int4")).num == granule


def test_width_without_a_group_is_refused():
    with pytest.raises(PlacementError, match="width 20 is no multiple of a int4 group"):
        ffn_units(shape(Attention(8, 8, 64)), 20, 3, weight_format("int4"))


def test_query_heads_travel_with_their_kv_head():
    units = attention_units(shape(Attention(48, 8, 64)), Attention(48, 8, 64), weight_format("bf16"), 8)
    assert (units.num, units.query_heads_per_unit, units.kv_per_unit) == (8, 6, 128)


def test_fewer_kv_heads_than_ranks_are_held_twice():
    """Qwen2-57B: 28 heads, 4 of them for keys and values, over 8 ranks: no whole split of 7 in 2 exists, 7 in 7
    does."""
    attention = Attention(28, 4, 128)
    units = attention_units(shape(attention), attention, weight_format("bf16"), 8)
    assert (units.num, units.query_heads_per_unit) == (28, 1)
    assert units.num * units.params_per_unit > attention.params(512)  # key and value heads are repeated


@pytest.mark.parametrize(("heads", "ranks"), [(36, 64), (4, 8)])
def test_more_shares_than_heads(heads, ranks):
    attention = Attention(heads, heads, 64)
    with pytest.raises(
        PlacementError, match=f"attention has {heads} query heads, fewer than the {ranks} shares asked for"
    ):
        attention_units(shape(attention), attention, weight_format("bf16"), ranks)


def test_latent_attention_keeps_the_latent_on_every_rank():
    attention = Attention(128, 128, 128, 1536, 512, 64, 128)
    v3 = ModelShape("v3", 7168, 1000, (LayerClass(1, attention, moe=MoeFfn(4, 2, 1024)),))
    units = attention_units(v3, attention, weight_format("bf16"), 8)
    assert units.kv_fixed == 576
    assert units.fixed_params + units.num * units.params_per_unit == attention.params(7168)


def test_attention_of_expert_formats_stays_bf16():
    attention = Attention(8, 8, 64)
    plain = attention_units(shape(attention), attention, weight_format("bf16"), 8)
    for name in ("int2", "ternary", "mxfp4"):
        assert attention_units(shape(attention), attention, weight_format(name), 8) == plain


def test_unknown_format():
    with pytest.raises(PlacementError, match="weights 'fp7': unknown format; expected one of f32, bf16, fp16, fp8"):
        weight_format("fp7")
    assert all(f.bits in (2, 4, 8, 16, 32) for f in FORMATS.values())

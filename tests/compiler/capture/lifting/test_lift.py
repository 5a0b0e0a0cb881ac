"""The zoo: hand-written blocks that must be lifted, and near misses that must be refused by the right stage."""

import json

import moe_blocks
import moe_blocks_more
import moe_blocks_unseen
import moe_near_misses_unseen
import pytest
import torch
from moe_near_misses import NEAR_MISSES

from moec.compiler.capture.lifting import LiftedBlock, Refusal, lift_block
from moec.compiler.capture.lifting.held import tensors
from moec.passes.ir.gate import GateSpec

pytestmark = pytest.mark.null

ZOO = moe_blocks.BLOCKS + moe_blocks_more.BLOCKS + moe_blocks_unseen.BLOCKS
MISSES = {c: (stage,) for c, stage in NEAR_MISSES.items()} | moe_near_misses_unseen.NEAR_MISSES
# one or two of each kind of storage, routing and host code; the others are as the slow mark says
QUICK = {
    "MixtralLoop", "DbrxFlat", "GptOss", "Llama4", "NumpyRouter", "OddNames", "DeepExpert", "SparseMixer", "HashedDict",
    "SharedInStack", "ReluRouter", "TiedExperts", "CastsInGate", "TinyEps", "MaskedShared", "LatentExperts",
    "FlatSlices", "ResidualCoefficient", "UnusualActivations", "Rearranged", "NamedExperts", "HalfPrecision",
    "OneRouterForAll", "GroupedConvolution", "LayerScale",
}  # fmt: skip
SLOW_MISSES = {"NoDenseMixture", "NoBatchSoftmax", "NoNeighbour", "NoDeadExpert", "NoRareBranch", "NoEvenBatch"}


def marked(cls, quick):
    return pytest.param(cls, id=cls.__name__, marks=() if quick else pytest.mark.slow)


def on_fresh_rows(cls, block, found):
    """The replacement's and the block's own output on rows that no probe had."""
    generator = torch.Generator().manual_seed(99)
    replacement = found.replacement.materialise(tensors(block))
    x = torch.randn(*((4, 6) if cls.__name__ != "Grok" else (24,)), moe_blocks.H, generator=generator)
    x = x.to(getattr(cls, "DTYPE", torch.float32))
    kwargs = {"attention_mask": torch.rand(4, 6, generator=generator) > 0.3} if hasattr(cls, "MASK") else {}
    with torch.no_grad():
        return block(x.clone(), **kwargs), replacement(x.clone(), **kwargs)


@pytest.mark.parametrize("cls", [marked(c, c.__name__ in QUICK) for c in ZOO])
def test_block_is_lifted(cls):
    block, args, kwargs = moe_blocks.sample(cls)
    found = lift_block(block, args, kwargs)
    assert isinstance(found, LiftedBlock), str(found)
    record = json.loads(json.dumps(found.certificate))
    assert record["worst_relative_error_f64"] < 1e-12  # observed: at most 3e-15
    assert record["expert_uses"]["least"] > 0
    assert found.gate is None or GateSpec.decode(record["gate"]) == found.gate
    expected, got = on_fresh_rows(cls, block, found)
    for a, b in zip(torch.utils._pytree.tree_leaves(expected), torch.utils._pytree.tree_leaves(got), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape and a.dtype == b.dtype
            # float32 sums in another order; relative to the output's size (extra outputs are the block's own ops).
            # bfloat16: one rounding of each weight, of each expert's output and of the sum, 2**-9 each
            limit = 2e-5 if a.dtype != torch.bfloat16 else 1e-2
            assert (a - b).abs().max() <= limit * a.abs().max()


@pytest.mark.parametrize("cls", [marked(c, c.__name__ not in SLOW_MISSES) for c in MISSES])
def test_near_miss_is_refused(cls):
    block, args, kwargs = moe_blocks.sample(cls)
    found = lift_block(block, args, kwargs)
    assert isinstance(found, Refusal), f"{cls.__name__} was lifted: {found.certificate}"
    assert found.stage in MISSES[cls], str(found)
    assert found.reason and "\n" not in str(found)


def test_the_zoo_is_as_large_as_promised():
    assert len(ZOO) >= 70 and len(MISSES) >= 40


def test_a_block_is_not_changed_by_lifting():
    block, args, kwargs = moe_blocks.sample(moe_blocks.MixtralLoop)
    before = {n: t.clone() for n, t in tensors(block).items()}
    lift_block(block, args, kwargs)
    assert all(torch.equal(t, before[n]) for n, t in tensors(block).items())


def test_gate_and_weights_are_read_off():
    block, args, kwargs = moe_blocks.sample(moe_blocks.GptOss)
    found = lift_block(block, args, kwargs)
    assert found.activation == "swigluoai@7.0@1.702" and not found.weight_on_input
    assert (found.gate.top_k, found.gate.order, found.gate.score) == (4, "topk_then_score", "softmax")
    hidden, inner = moe_blocks.H, moe_blocks.I
    assert found.recipes["w_in"].shape == (8, 2 * inner, hidden)
    assert set(found.recipes["w_in"].sources()) == {"gu"} and set(found.recipes["w_out"].sources()) == {"dn"}


def test_a_call_without_rows_is_refused():
    block, _, _ = moe_blocks.sample(moe_blocks.MixtralLoop)
    found = lift_block(block, (torch.arange(4),))
    assert isinstance(found, Refusal) and found.stage == "call"


def test_bfloat16_block_keeps_its_router_dtype():
    """The router of this block computes in float32 although the block is bfloat16."""
    block, _, _ = moe_blocks.sample(moe_blocks_more.CastsInGate)
    block = block.bfloat16()
    found = lift_block(block, (torch.randn(2, 3, moe_blocks.H, dtype=torch.bfloat16),))
    assert isinstance(found, LiftedBlock), str(found)
    assert found.parts.dtypes[0] == "float32"
    assert found.certificate["median_relative_error_own_dtype"] < 1e-2  # one or two roundings of 2**-8

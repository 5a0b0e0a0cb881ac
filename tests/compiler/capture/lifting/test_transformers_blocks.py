"""The MoE blocks of the transformers library through the lifter: what is lifted, what is refused, nothing wrong."""

import warnings

import pytest
import torch
import transformers_blocks

from moec.compiler.capture.lifting import LiftedBlock, lift_block
from moec.compiler.capture.lifting.held import tensors

pytestmark = [pytest.mark.null, pytest.mark.slow]

REFUSED = {
    "AXK1MoE": "additivity",  # a norm after the experts
    "DeepseekV4SparseMoeBlock": "run",  # routes by token ids, which the call does not have
    "DogeCDMoE": "cross-token",  # its split of the router's logits mixes tokens, as its own comment says
    "Ernie4_5_VLMoeSparseMoeBlock": "call",  # [T, H] only: the block of the next line calls it
    "Ernie4_5_VLMoeMoeBlock": "line coverage",  # a second set of experts for images, which a text call does not reach
    "LongcatFlashMoE": "expert",  # experts without tensors, by index
    "NllbMoeSparseMLP": "state",  # writes its capacity
    "SwitchTransformersSparseMLP": "verify",  # capacity
    "VitPoseNaiveMoe": "run",  # the experts without their router
}
NOT_BUILT = {"Qwen3OmniMoeTalkerTextSparseMoeBlock"}  # the defaults of its configuration lack a size


def test_every_block_is_lifted_or_refused_for_its_reason():
    lifted = []
    for name, cls in transformers_blocks.found().items():
        if name in NOT_BUILT:
            continue
        block = transformers_blocks.built(cls)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = lift_block(block, (torch.randn(*transformers_blocks.ROWS, transformers_blocks.H),))
        if not isinstance(found, LiftedBlock):
            print(f"{name:40} refused: {found}")
            assert found.stage == REFUSED.get(name), f"{name}: {found}"
            continue
        assert name not in REFUSED
        error = on_fresh_rows(block, found)
        print(f"{name:40} lifted: {found.certificate['activation'] or 'graph'}, error {error:.1e}")
        assert error <= 2e-5, name  # float32 sums in another order, relative to the largest output
        lifted.append(name)
    assert len(lifted) >= 60


def on_fresh_rows(block, found):
    """The largest difference between block and replacement on rows that no probe had, relative to the output."""
    x = torch.randn(4, 6, transformers_blocks.H, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(block(x.clone()))[0]
        got = torch.utils._pytree.tree_leaves(found.replacement.materialise(tensors(block))(x.clone()))[0]
    return float((got - expected).abs().max() / expected.abs().max())

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_overlay,
    or_masks,
    sliding_window_overlay,
)

from moec.compiler.capture.masks import MaskMeaning, Unseen, mask_meaning
from moec.compiler.errors import UnsupportedModel

pytestmark = pytest.mark.null


def test_causal():
    assert mask_meaning(causal_mask_function) == MaskMeaning()


def test_window_and_chunk():
    assert mask_meaning(and_masks(sliding_window_overlay(7), causal_mask_function)) == MaskMeaning(window=7)
    inner = and_masks(chunked_overlay(16, 0), causal_mask_function)
    assert mask_meaning(and_masks(sliding_window_overlay(3), inner)) == MaskMeaning(window=3, chunk=16)


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (or_masks(causal_mask_function, sliding_window_overlay(7)), "or_mask"),
        (bidirectional_mask_function, "bidirectional_mask_function"),
        (lambda b, h, q, k: k <= q, "<lambda>"),
    ],
)
def test_other_parts_are_refused_by_name(function, named):
    with pytest.raises(UnsupportedModel, match=named):
        mask_meaning(function)


def test_a_mask_without_a_causal_part_is_refused():
    with pytest.raises(UnsupportedModel, match="not causal"):
        mask_meaning(sliding_window_overlay(7))


def test_an_indexer_sees_the_mask_without_its_axis_of_heads():
    assert MaskMeaning(window=7)[:, 0] == MaskMeaning(window=7)
    assert ~MaskMeaning()[:, 0, :, :] == Unseen(MaskMeaning())
    assert MaskMeaning().dtype == torch.bool


@pytest.mark.parametrize(
    ("compute", "named"),
    [
        (lambda m: m.masked_fill(m, 0), "masked_fill"),
        (lambda m: torch.zeros(1) + m, "add"),
        (lambda m: m.shape, "shape"),
    ],
)
def test_a_model_that_computes_with_its_mask_is_refused(compute, named):
    with pytest.raises(UnsupportedModel, match=f"computes with its attention mask .*{named}"):
        compute(MaskMeaning()[:, 0])

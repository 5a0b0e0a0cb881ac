"""Configurations that tuning may choose compute what the catalogue's does: every knob away from its default."""

import dataclasses

import pytest
from experts_layer import LONG, ODD

from moec.compiler.kernels.experts import knobs
from moec.compiler.kernels.experts.catalogue import AMX_BF16, AVX2_FMA, AVX512_BF16

pytestmark = pytest.mark.cpu

SMALLEST = {"task_bytes": 256 << 10, "l2_bytes": 256 << 10, "chunk_bytes": 128 << 10, "down_panels": 1, "step_rows": 16}
LARGEST = {"task_bytes": 8 << 20, "l2_bytes": 1792 << 10, "chunk_bytes": 4 << 20, "down_panels": 64, "step_rows": 32}
FEW = {**SMALLEST, "even_rows": True, "ahead_blocks": 16, "ahead_level": 1}
MANY = {**LARGEST, "even_rows": True, "ahead_blocks": 1, "threads": 1}


KEPT = {"locality_once": 2, "ahead_blocks": 16, "down_panels": 1}
NEAR = {"locality_once": 2, "ahead_blocks": 1, "l2_bytes": 512 << 10}


@pytest.mark.parametrize(
    ("kernel", "problem", "change"),
    [(AMX_BF16, LONG, FEW), (AMX_BF16, ODD, MANY), (AVX512_BF16, LONG, KEPT), (AVX2_FMA, ODD, NEAR)],
    ids=["amx-long-few", "amx-odd-many", "avx512-long-kept", "avx2-odd-near"],
)
def test_every_knob_away_from_its_default(make_layer, kernel, problem, change):
    """Row counts around blocks and steps: even parts must start where a block of packed rows starts."""
    kernel = knobs.configured(knobs.config_of(kernel) | change)
    assert all(getattr(kernel.blocking, name) == value for name, value in change.items())
    layer = make_layer(kernel, dataclasses.replace(problem, dtype="bfloat16"))
    for num_tokens in (1, 15, 33, 49, 70, 130, 300):
        layer.check(*layer.inputs(num_tokens))


def test_even_parts_differ_by_less_than_a_block():
    """49 rows in steps of 48 are 32 and 17, not 48 and 1; the number of parts stays the same."""
    even = dataclasses.replace(AMX_BF16, blocking=dataclasses.replace(AMX_BF16.blocking, even_rows=True)).plan(ODD)
    for rows in range(1, 400):
        size = int(even.part_rows(rows, 48))
        parts = -(-rows // size)
        assert size % 16 == 0 and size <= 48 and parts == -(-rows // 48)
        assert size - 16 < -(-rows // parts) <= size


def test_prefetch_distances_that_few_rows_do_not_have_are_no_candidates():
    """Steps of 1 and 2 rows ask for the next block whatever ahead_blocks says; longer ones as far ahead as it says."""
    few, many = (knobs.distinct_values(AVX512_BF16, ODD, num_tokens)["ahead_blocks"] for num_tokens in (2, 16))
    assert few == (AVX512_BF16.blocking.ahead_blocks,)
    assert many == knobs.PLAIN_VECTOR_KNOBS["ahead_blocks"]
    assert [AVX512_BF16.blocking.distance(rows) for rows in (1, 2, 3, 4, 5, 12)] == [1, 1, 2, 2, 4, 4]


def test_weights_that_another_step_may_read_go_to_the_second_level_cache():
    assert [AVX2_FMA.blocking.locality(rows) for rows in (1, 5, 6)] == [0, 0, 2]
    assert AMX_BF16.blocking.locality(1) == 2  # few rows of codes go through registers there as well

from __future__ import annotations

import pytest
import torch

from moec.runtime.errors import ContextError
from moec.runtime.kv_cache import CacheInput, KVCache

INPUTS = [CacheInput("cache_0_a", (2, 8), "float32"), CacheInput("cache_0_b", (2, 4), "bfloat16")]


def test_tensors_follow_the_program() -> None:
    cache = KVCache(INPUTS, 3, 5)
    assert [tuple(t.shape) for t in cache.tensors] == [(3, 5, 2, 8), (3, 5, 2, 4)]
    assert cache.tensors[1].dtype == torch.bfloat16
    assert cache.num_bytes == 3 * 5 * (16 * 4 + 8 * 2)


def test_entries_of_a_head_follow_each_other_where_asked() -> None:
    plain, by_head = (KVCache([*INPUTS, CacheInput("scales", (2,), "float32")], 3, 5, by_head=b) for b in (False, True))
    assert [t.shape for t in by_head.tensors] == [t.shape for t in plain.tensors]
    assert by_head.tensors[0][1, :, 1].is_contiguous() and not plain.tensors[0][1, :, 1].is_contiguous()
    assert by_head.tensors[2].is_contiguous() and by_head.num_bytes == plain.num_bytes


def test_slots_are_given_out_and_taken_back() -> None:
    cache = KVCache(INPUTS, 2, 5)
    assert [cache.allocate(), cache.allocate()] == [0, 1]
    with pytest.raises(ContextError, match="all 2 cache slots are in use"):
        cache.allocate()
    cache.extend([0], [4])
    cache.release(0)
    cache.release(0)
    assert cache.allocate() == 0 and cache.lengths[0] == 0


def test_overrun_changes_nothing() -> None:
    cache = KVCache(INPUTS, 2, 5)
    assert cache.extend([1, 0], [3, 2]) == [0, 0]
    with pytest.raises(ContextError, match="slot 1 has 3 tokens: 3 more overrun the cache of 5"):
        cache.extend([0, 1], [1, 3])
    assert cache.lengths == [2, 3]
    assert cache.extend([1], [2]) == [3]


def test_unknown_slot_and_too_long_a_cache() -> None:
    with pytest.raises(ContextError, match="no cache slot 2"):
        KVCache(INPUTS, 2, 5).extend([2], [1])
    with pytest.raises(ContextError, match="longer than the model's context of 4"):
        KVCache(INPUTS, 2, 5, max_positions=4)


def test_a_state_has_one_entry_for_each_slot_and_is_zero_in_a_new_one() -> None:
    cache = KVCache([*INPUTS, CacheInput("cache_1_a", (4, 3), "float32", "state")], 2, 5)
    state = cache.tensors[2]
    assert tuple(state.shape) == (2, 4, 3)
    slots = [cache.allocate(), cache.allocate()]
    state += 1
    cache.release(slots[1])
    assert cache.allocate() == slots[1]
    assert not state[slots[1]].any() and state[slots[0]].all()

"""Decode graphs against an executor and a device that only count: padding, captures, and what is refused."""

import pytest
import torch

from moec.runtime.errors import DeviceMemoryError, InputError
from moec.runtime.kv_cache import CacheInput, KVCache
from moec.runtime.launch.graphs import ROWS, DecodeGraphs, graph_refusal
from moec.runtime.program import Program, Step

pytestmark = pytest.mark.null


class Adding:
    """An executor: keeps tokens in the cache, and gives 10 * token + position + the sum of what its slot keeps."""

    class frames:
        block = torch.zeros(8, dtype=torch.uint8)

    def __init__(self):
        self.calls = []

    def __call__(self, inputs, batch):
        tokens, positions, slots, cache, wanted = inputs
        self.calls.append((tokens.tolist(), positions.tolist(), slots.tolist(), batch.longest))
        assert batch.is_decode and len(wanted) == len(tokens)
        cache[slots, positions, 0] = tokens.float()
        seen = torch.arange(cache.shape[1])[None] <= positions[:, None]
        kept = (cache[slots, :, 0] * seen).sum(1)
        return [torch.stack([10 * tokens + positions, kept], 1)]


class Fake:
    """A device that replays by running the step again; full: it has no memory for graphs."""

    torch_device, name = torch.device("cpu"), "fake"

    def __init__(self, full=False):
        self.captured, self.replayed, self.full = 0, 0, full

    def memory_bytes(self):
        return 1 << 30, 4 << 30

    def capture(self, run):
        if self.full:
            raise torch.OutOfMemoryError("no")
        result, self.captured = run(), self.captured + 1

        def replay():
            self.replayed += 1
            for old, new in zip(result, run(), strict=True):
                old.copy_(new)

        return replay, result


def rows(*triples):
    """(token, position, slot) of each row -> i64[3, T]."""
    return torch.tensor(triples).t().contiguous()


def setup(full=False, length=600):
    executor, device = Adding(), Fake(full)
    cache = KVCache([CacheInput("k", (1,), "float32")], 4, length, spare_slots=1)
    return executor, device, cache, DecodeGraphs(executor, device, selects_rows=True)


def test_a_step_is_captured_the_second_time_and_replayed_from_then_on():
    _, device, cache, graphs = setup()
    for position in range(4):
        for slot in range(3):
            cache.lengths[slot] = position + 1
        triples = [(7 + position, position, 2), (1, position, 0), (5, position, 1)]
        logits = graphs.run(cache, rows(*triples), position + 1)
        kept = [sum(range(7, 8 + position)), 1 * (position + 1), 5 * (position + 1)]
        assert logits.tolist() == [[10 * t + p, k] for (t, p, _), k in zip(triples, kept, strict=True)]
        assert (device.captured, device.replayed) == ((0, 0) if not position else (1, position))


def test_rows_that_pad_go_to_the_spare_slot():
    executor, _, cache, graphs = setup()
    triples = [(9, 3, i % 4) for i in range(9)]
    logits = graphs.run(cache, rows(*triples), 4)
    tokens, positions, slots, longest = executor.calls[0]
    assert len(tokens) == 12 and tokens[9:] == [9] * 3 and positions[9:] == [0] * 3 and slots[9:] == [4] * 3
    assert longest == 256 and len(logits) == 9
    assert cache.tensors[0][:4, :3].sum() == 0  # no sequence was written to before its place


def test_rows_that_a_replay_has_less_are_padded_anew():
    executor, _, cache, graphs = setup()
    for count in (12, 12, 9):
        graphs.run(cache, rows(*[(i, 5, i % 4) for i in range(count)]), 6)
    _, positions, slots, _ = executor.calls[-1]
    assert positions[9:] == [0] * 3 and slots[9:] == [4] * 3


def test_graphs_are_by_rows_end_and_cache():
    executor, device, cache, graphs = setup()
    for _ in range(2):
        for count, longest in ((1, 5), (2, 5), (2, 300), (2, 590)):
            graphs.run(cache, rows(*[(1, longest - 1, i) for i in range(count)]), longest)
    assert device.captured == 4 and executor.calls[-1][3] == 600  # an end is at most the cache's length
    other = KVCache([CacheInput("k", (1,), "float32")], 4, 600, spare_slots=1)
    graphs.run(other, rows((1, 4, 0)), 5)
    assert device.captured == 4 and device.replayed == 4
    assert len(graphs._by_cache) == 2
    del other
    assert len(graphs._by_cache) == 1  # a graph goes with its cache


def test_too_many_tokens_for_a_graph_are_one_line_and_nothing_breaks():
    _, _, cache, graphs = setup()
    for _ in range(2):
        graphs.run(cache, rows((1, 0, 0), (2, 0, 1)), 1)
    graph = graphs._by_cache[cache][2, 256]
    with pytest.raises(InputError, match=r"^the graph was captured for 2 tokens, got 3; capture one for more$"):
        graph.run(rows((1, 1, 0), (2, 1, 1), (3, 0, 2)))
    assert graph.run(rows((1, 1, 0), (2, 1, 1))).tolist() == [[11, 2], [21, 4]]
    assert graphs.fits(ROWS[-1]) and not graphs.fits(ROWS[-1] + 1) and not graphs.fits(0)
    assert any(t is Adding.frames.block for t in graph.kept)


def test_no_memory_for_a_graph_names_what_is_free():
    _, device, cache, graphs = setup(full=True)
    graphs.run(cache, rows((1, 0, 0)), 1)
    with pytest.raises(
        DeviceMemoryError, match=r"no memory for the graph of 1 tokens: fake has 1\.00 GiB free of 4\.00"
    ):
        graphs.run(cache, rows((1, 1, 0)), 2)
    device.full = False
    assert graphs.run(cache, rows((1, 1, 0)), 2).tolist() == [[11, 2]]


def test_what_no_graph_holds():
    def program(*steps):
        return Program(("T",), (), (), (), steps)

    waits = Step("library", "experts", "moe")
    choose = Step("choose", "", "moe", symbol="T", variants=((4, ()), (None, (waits,))))
    assert graph_refusal(program(choose)) == "node moe (experts) waits for the device"
    many = Step("choose", "", "moe", symbol="T", variants=((ROWS[-1], ()), (None, (waits,))))
    assert graph_refusal(program(many)) is None  # no decode step of a graph has so many rows
    nearly = Step("choose", "", "moe", symbol="T", variants=((ROWS[-1] - 1, ()), (None, (waits,))))
    assert graph_refusal(program(nearly)) is not None
    assert graph_refusal(program(Step("collective", "all_reduce", "r"))) == "node r talks to other ranks"
    assert graph_refusal(program(Step("aten", "aten.add.Tensor", "a"))) is None

"""The runtime's windows and recurrences against the plain meaning of the ops."""

import json

import pytest
import torch

from moec.passes.ir import state_ops
from moec.runtime.batch import Batch
from moec.runtime.errors import FormatError
from moec.runtime.launch.states import recurrence, shift_window

pytestmark = pytest.mark.null
N, C, K = 5, 3, 4
# slots and lengths of the sequences of a batch, in row order
BATCHES = {
    "decode": ([3, 0, 4], [1, 1, 1]),
    "prefill": ([2], [7]),
    "ragged": ([4, 1, 0, 2], [3, 1, 6, 3]),
    "nothing": ([], []),
}
# one token after the other in both: the same operations on the same numbers
TOLERANCE = 1e-6
BODY = {
    "inputs": 2,
    "constants": 1,
    "states": 1,
    "steps": [
        ["aten.mul.Tensor", [{"value": 3}, {"value": 2}], {}],
        ["aten.add.Tensor", [{"value": 4}, {"value": 0}], {"alpha": 0.5}],
        ["aten.view.default", [{"value": 5}, [{"rows": 3}, 2]], {}],
        ["aten.view.default", [{"value": 6}, [{"rows": 1}, 3, 2]], {}],
        ["aten.split.Tensor", [{"value": 7}, 1, -1], {}],
        ["getitem", [{"value": 8}, 1], {}],
        ["aten.mul.Tensor", [{"value": 9}, {"value": 1}], {}],
    ],
    "outputs": [10],
    "new_states": [5],
    "types": [["float32", [3, 1]]],
}


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def batch_of(name):
    slots, lengths = BATCHES[name]
    rows = [s for s, n in zip(slots, lengths, strict=True) for _ in range(n)]
    return Batch.of_lengths(slots, lengths, [0] * len(slots)), torch.tensor(rows, dtype=torch.long)


@pytest.mark.parametrize("name", BATCHES)
def test_shift_window(name):
    batch, slots = batch_of(name)
    x, mine = randn(len(slots), C, 1), randn(N, C, K)
    theirs = mine.clone()
    found = shift_window()(batch, x, mine, slots)
    assert torch.equal(found, state_ops.shift_window(x, theirs, slots))
    assert torch.equal(mine, theirs)


def test_a_window_holds_the_last_tokens():
    batch, slots = batch_of("prefill")
    x, state = torch.arange(1.0, 8).view(7, 1, 1), torch.zeros(N, 1, K)
    found = shift_window()(batch, x, state, slots)
    assert found[0, 0].tolist() == [0, 0, 0, 0, 1]
    assert found[5, 0].tolist() == [2, 3, 4, 5, 6]
    assert state[2, 0].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("name", BATCHES)
def test_recurrence(name):
    batch, slots = batch_of(name)
    inputs, constants = [randn(len(slots), 3, 2), randn(len(slots), 3, 1)], [randn(3, 2)]
    mine = randn(N, 3, 2)
    theirs = mine.clone()
    (found,) = recurrence(BODY)(batch, inputs, constants, [mine], slots)
    (wanted,) = state_ops.recurrence(inputs, constants, [theirs], slots, json.dumps(BODY))
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(mine, theirs, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": [["aten.random_.default", [{"value": 0}], {}]]}, "not on the runtime's list"),
        ({"steps": [["aten.mul.Tensor", [{"value": "0); import os"}], {}]]}, "cannot be read"),
        ({"steps": [["aten.mul.Tensor", [{"value": 0}], {"a b": 1}]]}, "no argument names"),
        ({"types": [["float33", [2]]]}, "no dtype"),
        ({"outputs": None}, "cannot be read"),
    ],
)
def test_a_body_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(FormatError, match=message):
        recurrence(BODY | change)

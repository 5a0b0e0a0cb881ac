"""The runtime's attention with biases by distance against the plain meaning of the op."""

import pytest
import torch

from moec.passes.ir.bias_ops import biased_attention as plain
from moec.runtime.batch import Batch
from moec.runtime.launch.biased import biased_attention

pytestmark = pytest.mark.null
# float32 sums in another order
TOLERANCE = 2e-6


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1), (4, 1), (0,)])
def test_biased_attention(window, has_sinks, lengths):
    generator = torch.Generator().manual_seed(0)
    starts, slots = (5, 2)[: len(lengths)], (1, 0)[: len(lengths)]
    rows = [(s, p + i) for s, p, n in zip(slots, starts, lengths, strict=True) for i in range(n)]
    t = len(rows)
    at, places = torch.tensor(rows, dtype=torch.long).view(t, 2).unbind(1)
    q, k, v = (torch.randn(t, heads, 8, generator=generator) for heads in (4, 2, 2))
    bias = torch.randn(t, 4, 4, generator=generator)
    sinks = torch.randn(t, 4, generator=generator) if has_sinks else None
    mine = [torch.randn(2, 16, 2, 8, generator=generator) for _ in range(2)]
    theirs = [c.clone() for c in mine]
    batch = Batch.of_lengths(slots, lengths, starts) if t else Batch(())
    found = biased_attention(0.3, window)(batch, q, k, v, bias, sinks, *mine, at, places)
    wanted = plain(q, k, v, bias, sinks, *theirs, at, places, 0.3, window)
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))

"""Blocks that are measured on a narrow twin and checked at full width."""

import moe_blocks
import moe_blocks_unseen
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from moec.compiler.capture.lifting import LiftedBlock, Refusal, lift, lift_block
from moec.compiler.capture.lifting.held import tensors
from moec.compiler.capture.lifting.widths import choices

pytestmark = pytest.mark.null

H, INNER = 256, 320


class Wide(nn.Module):
    """a loop, a shared expert with biases, widths from attributes"""

    def __init__(self):
        super().__init__()
        self.width = H
        self.gate = nn.Linear(H, 8, bias=False)
        self.experts = nn.ModuleList(moe_blocks.glu(H, INNER) for _ in range(8))
        self.shared = nn.Sequential(nn.Linear(H, INNER), nn.GELU(), nn.Linear(INNER, H))

    def mixed(self, x):
        v, i = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e, f in enumerate(self.experts):
            t, k = torch.where(i == e)
            out.index_add_(0, t, f(x[t]) * v[t, k, None])
        return out + self.shared(x)

    def forward(self, hidden):
        return self.mixed(hidden.reshape(-1, self.width)).view_as(hidden)


class SpelledOut(nn.Module):
    """flat stacks and widths as numbers in the code, an activation that no kernel knows"""

    def __init__(self):
        super().__init__()
        self.router = nn.Parameter(torch.randn(4, 256) * 0.1)
        self.up, self.down = (
            nn.Parameter(torch.randn(4 * 320, 256) * 0.1),
            nn.Parameter(torch.randn(4 * 256, 320) * 0.1),
        )

    def forward(self, hidden):
        x = hidden.reshape(-1, 256)
        v, i = F.linear(x, self.router).topk(2)
        v, out = v.softmax(-1), torch.zeros_like(x)
        for e in range(4):
            t, k = torch.where(i == e)
            h = F.hardswish(x[t] @ self.up.view(4, 320, 256)[e].T)
            out.index_add_(0, t, h @ self.down.view(4, 256, 320)[e].T * v[t, k, None])
        return out.view_as(hidden)


class AnotherAtFullWidth(Wide):
    """scales only what is wide, on a line that always runs"""

    def mixed(self, x):
        return super().mixed(x) * (1.01 if x.shape[-1] >= 200 else 1.0)


class AnotherBranch(Wide):
    """a line that runs at full width only"""

    def mixed(self, x):
        y = super().mixed(x)
        if x.shape[-1] >= 200:
            y = y * 1.01
        return y


class NoRoom(Wide):
    """a capacity that equals a width: shrunk with it"""

    def mixed(self, x):
        return torch.cat([super().mixed(x[: self.width]), 0 * x[self.width :]])


@pytest.fixture
def small_blocks_are_wide(monkeypatch):
    monkeypatch.setattr(lift, "WIDE_BLOCK", 1000)


def lifted(cls, dtype=torch.float32):
    torch.manual_seed(1)
    block = cls().to(dtype).eval()
    return block, lift_block(block, (torch.randn(2, 3, H, dtype=dtype),))


@pytest.mark.parametrize(("cls", "dtype"), [(Wide, torch.bfloat16), (SpelledOut, torch.float32)])
def test_a_twin_is_measured_and_the_block_is_checked(small_blocks_are_wide, cls, dtype):
    block, found = lifted(cls, dtype)
    assert isinstance(found, LiftedBlock), str(found)
    record = found.certificate["full_width"]
    assert record["hidden"] == H and record["twin"][str(H)] < H and record["twin"][str(INNER)] < INNER
    assert record["worst_relative_error_f64"] < 1e-12  # observed: at most 3e-15
    x = torch.randn(3, 7, H, generator=torch.Generator().manual_seed(9)).to(dtype)
    with torch.no_grad():
        expected, got = block(x), found.replacement.materialise(tensors(block))(x)
    limit = 1e-2 if dtype == torch.bfloat16 else 2e-5  # a few roundings of 2**-9; float32 sums in another order
    assert (got - expected).abs().max() <= limit * expected.abs().max()


@pytest.mark.parametrize("cls", [pytest.param(AnotherAtFullWidth, marks=pytest.mark.slow), AnotherBranch])
def test_what_holds_on_the_twin_alone_is_not_believed(small_blocks_are_wide, monkeypatch, cls):
    _, found = lifted(cls)
    record = found.certificate["full_width"]  # hidden keeps its width, or the block itself was measured
    assert record is None or str(H) not in record["twin"]
    monkeypatch.setattr("moec.compiler.capture.lifting.measure.choices", lambda t, h: [next(choices(t, h))])
    monkeypatch.setattr("moec.compiler.capture.lifting.measure.MAX_BYTES", 1 << 20)
    _, found = lifted(cls)
    assert isinstance(found, Refusal) and found.stage in ("width", "line coverage"), str(found)


@pytest.mark.slow
def test_a_capacity_that_shrinks_with_a_width_is_refused(small_blocks_are_wide):
    _, found = lifted(NoRoom)
    assert isinstance(found, Refusal), found.certificate


def test_numbers_of_experts_are_no_widths():
    torch.manual_seed(0)
    stacks = {"up": torch.empty(512, 320, 256), "gate": torch.empty(512, 256), "down": torch.empty(512, 256, 320)}
    every = list(choices(stacks, 256))
    assert every and all(512 not in w.sizes for w in every)
    assert set(every[0].sizes) == {256, 320}


def test_a_block_without_widths_is_measured_itself(small_blocks_are_wide):
    block, args, kwargs = moe_blocks.sample(moe_blocks_unseen.MaskedSelect)
    found = lift_block(block, args, kwargs)
    assert isinstance(found, LiftedBlock) and found.certificate["full_width"] is None

"""More blocks that must be refused, in the styles of moe_blocks_unseen, each with the stages that may find out."""

import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from moe_blocks import H, I, glu


class Plain(nn.Module):
    """What the near misses change one thing of: softmax, top-2, a loop."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, 8, bias=False)
        self.experts = nn.ModuleList(glu() for _ in range(8))

    def choose(self, x):
        return self.gate(x).softmax(-1).topk(2)

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        v, i = self.choose(x)
        out = torch.zeros_like(x)
        for e, f in enumerate(self.experts):
            t, k = torch.where(i == e)
            out.index_add_(0, t, f(x[t]) * v[t, k, None])
        return out.view_as(hidden)


class NoTokensChosenByExperts(Plain):
    """each expert takes its two best tokens"""

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        p = self.gate(x).softmax(-1)
        v, t = p.topk(min(2, len(x)), dim=0)
        out = torch.zeros_like(x)
        for e, f in enumerate(self.experts):
            out.index_add_(0, t[:, e], f(x[t[:, e]]) * v[:, e, None])
        return out.view_as(hidden)


class NoBatchPriority(Plain):
    """tokens of small probability are dropped relative to the batch's best"""

    def choose(self, x):
        v, i = super().choose(x)
        return v * (v[:, :1] > 0.3 * v.max()), i


class NoPostNorm(Plain):
    """the sum of the experts is normalised: not additive"""

    def forward(self, hidden):
        return F.layer_norm(super().forward(hidden), (H,))


class NoOwnGenerator(Plain):
    """noise from a generator of its own"""

    def __init__(self):
        super().__init__()
        self.seeds = [1, 2, 3]

    def choose(self, x):
        generator = torch.Generator().manual_seed(self.seeds[0])
        z = self.gate(x) + 0.05 * torch.randn(len(x), 8, generator=generator).to(x.dtype)
        return z.softmax(-1).topk(2)


class NoWarmUp(Plain):
    """the first calls use uniform weights"""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def choose(self, x):
        v, i = super().choose(x)
        self.calls += 1
        return (torch.full_like(v, 0.5) if self.calls <= 3 else v), i


class NoClock(Plain):
    """a scale that follows the clock"""

    def choose(self, x):
        v, i = super().choose(x)
        return v * (1 + time.perf_counter() % 1.0), i


class NoCumulative(Plain):
    """as many experts as it takes to reach half of the probability"""

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        p, i = self.gate(3 * x).softmax(-1).sort(-1, descending=True)
        w = p * ((p.cumsum(-1) - p) < 0.5)
        out = torch.zeros_like(x)
        for e, f in enumerate(self.experts):
            t, k = torch.where((i == e) & (w > 0))
            out.index_add_(0, t, f(x[t]) * w[t, k, None])
        return out.view_as(hidden)


class NoLimitedRoom(nn.Module):
    """a capacity hidden in a configuration dictionary"""

    def __init__(self):
        super().__init__()
        self.settings = {"room": {"rows": 500}}
        self.gate = nn.Linear(H, 6, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(6, H, I) * 0.2), nn.Parameter(torch.randn(6, I, H) * 0.2)

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        p, i = self.gate(x).softmax(-1).topk(1)
        order = i[:, 0].argsort(stable=True)
        counts = torch.bincount(i[:, 0], minlength=6).tolist()
        out, start = torch.zeros_like(x), 0
        for e, count in enumerate(counts):
            rows = order[start : start + count][: self.settings["room"]["rows"]]
            out[rows] = F.relu(x[rows] @ self.up[e]) @ self.down[e] * p[rows]
            start += count
        return out.view_as(hidden)


class NoFirstToken(Plain):
    """the first token of a call has its own rule"""

    def choose(self, x):
        v, i = super().choose(x)
        v = v.clone()
        v[:1] = 0.5
        return v, i


class NoLargeRows(Plain):
    """rows above a large norm go through unchanged, by index arithmetic without a comparison of tensors"""

    def forward(self, hidden):
        y = super().forward(hidden)
        big = (hidden.norm(dim=-1, keepdim=True) / 400).floor().clamp(max=1)
        return y * (1 - big) + hidden * big


class NoLengthScale(Plain):
    """divided by the logarithm of the number of tokens"""

    def forward(self, hidden):
        return super().forward(hidden) / (1 + 0.01 * torch.log1p(torch.tensor(float(hidden.shape[-2]))))


NEAR_MISSES = {
    NoTokensChosenByExperts: ("cross-token",),
    NoBatchPriority: ("cross-token", "verify"),
    NoPostNorm: ("additivity",),
    NoOwnGenerator: ("randomness", "cross-token"),
    NoWarmUp: ("state",),
    NoClock: ("state",),
    NoCumulative: ("dynamic",),
    NoLimitedRoom: ("verify",),
    NoFirstToken: ("cross-token",),
    NoLargeRows: ("verify",),
    NoLengthScale: ("cross-token",),
}

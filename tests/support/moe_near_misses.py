"""Blocks that look like MoE and must be refused, each with the stage that has to find out."""

import random

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from moe_blocks import Base, H, I, glu


class NoCapacityFactor(Base):
    def keep(s, t, k):
        c = max(4, int(1.25 * s.now * s.K / s.E))
        return t[:c], k[:c]

    def pick(s, z):
        s.now = len(z)
        return super().pick(z)


class NoCapacityBig(Base):
    """a fixed capacity far above any small probe, and no branch to betray it"""

    def keep(s, t, k):
        return t[:777], k[:777]


class NoCapacityBranch(Base):
    def keep(s, t, k):
        limit = 3000 * 10
        if len(t) > limit:
            t, k = t[:limit], k[:limit]
        return t, k


class NoState(Base):
    def __init__(s):
        super().__init__()
        s.register_buffer("load", torch.zeros(8))

    def pick(s, z):
        v, i = super().pick(z - s.load)
        s.load += 0.01 * torch.bincount(i.flatten(), minlength=s.E)
        return v, i


class NoRandom(Base):
    def logits(s, x):
        return s.gate(x * (1 + 0.01 * torch.randn_like(x)))


class NoTopP(Base):
    """as many experts as it takes to reach 70% of the probability"""

    def forward(s, h):
        x = h.reshape(-1, H)
        p, o = (3 * s.gate(x)).softmax(-1).sort(-1, descending=True)
        keep = (p.cumsum(-1) - p) < 0.7
        out = torch.zeros_like(x)
        for e, f in enumerate(s.experts):
            t, k = torch.where((o == e) & keep)
            if len(t):
                out.index_add_(0, t, f(x[t]) * p[t, k, None])
        return out.view_as(h)


class NoUnreachable(Base):
    def __init__(s):
        super().__init__()
        s.register_buffer("ban", torch.tensor([0.0] * 5 + [-1e9] + [0.0] * 2))

    def logits(s, x):
        return s.gate(x) + s.ban


class NoBatchNorm(Base):
    def logits(s, x):
        z = s.gate(x)
        return z - z.mean(0, keepdim=True)


class NoExpertChoice(Base):
    def forward(s, h):
        x = h.reshape(-1, H)
        p = s.gate(x).softmax(-1)
        c = max(1, len(x) * s.K // s.E)
        w, t = p.topk(c, dim=0)
        out = torch.zeros_like(x)
        for e, f in enumerate(s.experts):
            out.index_add_(0, t[:, e], f(x[t[:, e]]) * w[:, e, None])
        return out.view_as(h)


class NoDenseMixture(Base):
    def forward(s, h):
        p = s.gate(h).softmax(-1)
        return sum(f(h) * p[..., e : e + 1] for e, f in enumerate(s.experts))


class NoPosition(Base):
    def logits(s, x):
        return s.gate(x) + (torch.arange(len(x))[:, None] % 3) * torch.arange(s.E)


class NoLongBranch(Base):
    """another activation scale for long inputs, on its own line"""

    def pick(s, z):
        v, i = super().pick(z)
        if z.shape[0] > 100000:
            v = v * 0.5
        return v, i


class NoOddExpert(Base):
    """one expert uses another activation"""

    def __init__(s):
        super().__init__()
        s.experts[3] = glu(act=F.gelu)


class NoNonlinearCombine(Base):
    def forward(s, h):
        return torch.tanh(super().forward(h))


class NoOutlier(Base):
    """rows of large norm skip the experts"""

    def forward(s, h):
        y = super().forward(h)
        return torch.where(h.norm(dim=-1, keepdim=True) > 1e4, h, y)


class NoLayerDrop(Base):
    """a weak expert is skipped: fewer than K for flat rows"""

    def keep(s, t, k):
        return t, k

    def pick(s, z):
        v, i = super().pick(z)
        return torch.where(v < 0.2, torch.zeros_like(v), v), i


class NoEvenBatch(Base):
    """halves the result when the number of tokens is a multiple of 50, in arithmetic"""

    def pick(s, z):
        v, i = super().pick(z)
        return v * (1 - 0.5 * (len(z) % 50 == 0) * (len(z) > 0)), i


class NoRareRow(Base):
    """one row in ten thousand is dropped, in arithmetic, without a comparison"""

    def forward(s, h):
        y = super().forward(h)
        r = torch.floor((h.sum(-1, keepdim=True) * 1e6) % 10000 / 9999)
        return y * (1 - r)


class NoCache(Base):
    """reuses the last routing when the shape is the same"""

    def __init__(s):
        super().__init__()
        s.old = None

    def pick(s, z):
        if s.old is None or len(s.old[0]) != len(z):
            s.old = super().pick(z)
        return s.old


class NoTinyMix(Base):
    """a 1e-7 leak from the other tokens"""

    def logits(s, x):
        return s.gate(x + 1e-7 * x.mean(0))


class NoGlobalState(Base):
    """counts calls in a module-level dict and changes after a thousand"""

    calls = {"n": 0}  # noqa: RUF012

    def pick(s, z):
        v, i = super().pick(z)
        NoGlobalState.calls["n"] += 1
        return v * (0.5 if NoGlobalState.calls["n"] > 1000 else 1.0), i


class NoPythonRandom(Base):
    """random.random() scales the weights"""

    def pick(s, z):
        v, i = super().pick(z)
        return v * (1 + 0.01 * random.random()), i


class NoNumpyRandom(Base):
    """numpy noise on the logits"""

    def logits(s, x):
        return s.gate(x) + torch.from_numpy(np.random.randn(len(x), s.E)).to(x.dtype) * 0.01


class NoThreshold(Base):
    """all experts above a probability"""

    def forward(s, h):
        x = h.reshape(-1, H)
        p = s.gate(x).softmax(-1)
        out = torch.zeros_like(x)
        for e, f in enumerate(s.experts):
            t = (p[:, e] > 0.15).nonzero().squeeze(1)
            if len(t):
                out.index_add_(0, t, f(x[t]) * p[t, e, None])
        return out.view_as(h)


class NoNeighbour(Base):
    """each token is routed by its left neighbour"""

    def logits(s, x):
        return s.gate(x.roll(1, 0))


class NoSequenceMean(Base):
    """the mean of the sequence goes into the router"""

    def forward(s, h):
        return super().forward(h + 0.1 * h.mean(1, keepdim=True))


class NoMovingAverage(Base):
    """a running mean of the logits, also in evaluation mode"""

    def __init__(s):
        super().__init__()
        s.mean = torch.zeros(8)

    def pick(s, z):
        s.mean = 0.9 * s.mean + 0.1 * z.mean(0).detach()
        return super().pick(z - s.mean)


class NoRareBranch(Base):
    """huge inputs are clipped, on a line of their own"""

    def forward(s, h):
        y = super().forward(h)
        if h.numel() and h.abs().max() > 1e9:
            y = y.clamp(-1, 1)
        return y


class NoRareWhere(Base):
    """a comparison that no probe takes"""

    def forward(s, h):
        y = super().forward(h)
        return torch.where(h.norm(dim=-1, keepdim=True) > 1e12, torch.zeros_like(y), y)


class NoPaddedSlots(nn.Module):
    """dispatch einsum with 40 slots per expert; what does not fit is dropped"""

    def __init__(s, E=6):
        super().__init__()
        s.E, s.slots = E, 40
        s.wg = nn.Parameter(torch.randn(H, E) * 0.3)
        s.wi, s.wo = nn.Parameter(torch.randn(E, H, I) * 0.3), nn.Parameter(torch.randn(E, I, H) * 0.3)

    def forward(s, h):
        x = h.reshape(-1, H)
        g = torch.softmax(x @ s.wg, -1)
        m = F.one_hot(g.argmax(-1), s.E)
        at = ((torch.cumsum(m, 0) - 1) * m).sum(1)
        kept = at < s.slots
        mask = m[:, :, None] * F.one_hot(at.clamp(max=s.slots - 1), s.slots)[:, None, :] * kept[:, None, None]
        e = torch.einsum("sec,sm->ecm", mask.to(x.dtype), x)
        e = torch.einsum("ecf,efm->ecm", F.gelu(torch.einsum("ecm,emf->ecf", e, s.wi)), s.wo)
        return torch.einsum("sec,ecm->sm", mask * g.amax(1)[:, None, None], e).view_as(h)


class NoDeadExpert(Base):
    """top-1 whose last expert has a bias that never wins"""

    def __init__(s):
        super().__init__(8, 1)
        s.gate = nn.Linear(H, 8)
        s.gate.bias.data[7] = -1e6


class NoBatchSoftmax(Base):
    """the softmax runs over the tokens"""

    def pick(s, z):
        return z.softmax(0).topk(s.K, -1)


NEAR_MISSES = {
    NoCapacityFactor: "state",
    NoCapacityBig: "verify",
    NoCapacityBranch: "line coverage",
    NoState: "state",
    NoRandom: "randomness",
    NoTopP: "dynamic",
    NoUnreachable: "coverage",
    NoBatchNorm: "cross-token",
    NoExpertChoice: "cross-token",
    NoDenseMixture: "partition",
    NoPosition: "cross-token",
    NoLongBranch: "line coverage",
    NoOddExpert: "expert",
    NoNonlinearCombine: "additivity",
    NoOutlier: "verify",
    NoLayerDrop: "verify",
    NoEvenBatch: "verify",
    NoRareRow: "verify",
    NoCache: "state",
    NoTinyMix: "cross-token",
    NoGlobalState: "state",
    NoPythonRandom: "randomness",
    NoNumpyRandom: "randomness",
    NoThreshold: "dynamic",
    NoNeighbour: "cross-token",
    NoSequenceMean: "cross-token",
    NoMovingAverage: "state",
    NoRareBranch: "line coverage",
    NoRareWhere: "predicate coverage",
    NoPaddedSlots: "verify",
    NoDeadExpert: "coverage",
    NoBatchSoftmax: "cross-token",
}

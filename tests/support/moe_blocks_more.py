"""More MoE blocks to lift: odd storage, casts, masks, zero, tied and scaled experts."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from moe_blocks import Base, H, I, glu


def loop(x, v, i, fs):
    out = torch.zeros_like(x)
    for e, f in enumerate(fs):
        t, k = torch.where(i == e)
        if len(t):
            out.index_add_(0, t, f(x[t]) * v[t, k, None])
    return out


class NestedGroups(nn.Module):
    """4 groups of 4 experts: two integers in a name"""

    def __init__(s):
        super().__init__()
        s.gate = nn.Linear(H, 16)
        s.groups = nn.ModuleList(nn.ModuleList(glu() for _ in range(4)) for _ in range(4))

    def forward(s, h):
        x = h.reshape(-1, H)
        v, i = s.gate(x).softmax(-1).topk(3, -1)
        return loop(x, v, i, [f for g in s.groups for f in g]).view_as(h)


class SharedInStack(nn.Module):
    """the shared expert is the last slice of the stack"""

    def __init__(s, E=8):
        super().__init__()
        s.E = E
        s.gate = nn.Linear(H, E)
        s.a, s.b = nn.Parameter(torch.randn(E + 1, I, H) * 0.3), nn.Parameter(torch.randn(E + 1, H, I) * 0.3)

    def forward(s, h):
        x = h.reshape(-1, H)
        v, i = s.gate(x).softmax(-1).topk(2, -1)
        f = lambda e: lambda u: F.silu(u @ s.a[e].T) @ s.b[e].T  # noqa: E731
        return (loop(x, v, i, [f(e) for e in range(s.E)]) + f(s.E)(x)).view_as(h)


class OneBuffer(nn.Module):
    """each expert is one flat vector holding three matrices"""

    def __init__(s, E=6):
        super().__init__()
        s.gate = nn.Linear(H, E)
        s.w = nn.Parameter(torch.randn(E, 3 * H * I) * 0.3)

    def forward(s, h):
        x = h.reshape(-1, H)
        v, i = s.gate(x).softmax(-1).topk(2, -1)

        def f(e):
            g, u, d = s.w[e].split(H * I)
            return lambda q: (F.silu(q @ g.view(H, I)) * (q @ u.view(H, I))) @ d.view(I, H)

        return loop(x, v, i, [f(e) for e in range(len(s.w))]).view_as(h)


class ChunkedTokens(Base):
    """sixteen tokens at a time"""

    def forward(s, h):
        x = h.reshape(-1, H)
        f = super().forward
        return torch.cat([f(c) for c in x.split(16)]).view_as(h) if len(x) else x.view_as(h)


class WritesInput(Base):
    """adds into its own input"""

    def forward(s, h):
        h += super().forward(h)
        return h


class ExpertScale(Base):
    """one learnt factor per expert"""

    def __init__(s):
        super().__init__()
        s.alpha = nn.Parameter(torch.rand(8) + 0.5)

    def pick(s, z):
        v, i = super().pick(z)
        return v * s.alpha[i], i


class Int8Weights(nn.Module):
    """int8 codes and scales, dequantised on the fly"""

    def __init__(s, E=8):
        super().__init__()
        s.gate = nn.Linear(H, E)
        for n, sh in (("a", (E, I, H)), ("b", (E, H, I))):
            s.register_buffer(n, torch.randint(-127, 127, sh, dtype=torch.int8))
            s.register_buffer(n + "s", torch.rand(E, sh[1], 1) * 0.01)

    def forward(s, h):
        x = h.reshape(-1, H)
        v, i = s.gate(x).softmax(-1).topk(2, -1)
        d = lambda q, c, e: q[e].to(x.dtype) * c[e].to(x.dtype)  # noqa: E731
        return loop(
            x, v, i, [(lambda u, e=e: F.silu(u @ d(s.a, getattr(s, "as"), e).T) @ d(s.b, s.bs, e).T) for e in range(8)]
        ).view_as(h)


class ScriptedExpert(nn.Module):
    """experts are torch.jit.script modules"""

    def __init__(s, E=4):
        super().__init__()
        s.gate = nn.Linear(H, E)
        s.experts = nn.ModuleList(
            torch.jit.script(nn.Sequential(nn.Linear(H, I), nn.SiLU(), nn.Linear(I, H))) for _ in range(E)
        )

    def forward(s, h):
        x = h.reshape(-1, H)
        v, i = s.gate(x).topk(2, -1)
        return loop(x, v.softmax(-1), i, s.experts).view_as(h)


class LayerNormInside(Base):
    """normalises its input and adds the residual"""

    def __init__(s):
        super().__init__()
        s.ln = nn.LayerNorm(H)

    def forward(s, h):
        return h + super().forward(s.ln(h))


class DropoutInside(Base):
    """dropout that eval turns off, and a recorded load that nothing reads"""

    def __init__(s):
        super().__init__()
        s.dp = nn.Dropout(0.3)
        s.last = None

    def pick(s, z):
        v, i = super().pick(s.dp(z))
        s.last = i.flatten().tolist()
        return v, i


class TopOneConstant(Base):
    """top-1 with renormalisation: every weight is 1"""

    def __init__(s):
        super().__init__(8, 1)


class LatentExperts(nn.Module):
    """experts work in a narrower space: shared down and up projections around them"""

    def __init__(s, E=8, L=12):
        super().__init__()
        s.gate = nn.Linear(H, E)
        s.down, s.up = nn.Linear(H, L, bias=False), nn.Linear(L, H, bias=False)
        s.experts = nn.ModuleList(glu(L, 20) for _ in range(E))

    def forward(s, h):
        x = h.reshape(-1, H)
        v, i = s.gate(x).softmax(-1).topk(2, -1)
        return s.up(loop(s.down(x), v, i, s.experts)).view_as(h)


class ZeroExperts(Base):
    """two of the choices are 'no expert': identity"""

    def __init__(s):
        super().__init__()
        s.gate = nn.Linear(H, 10, bias=False)

    def forward(s, h):
        x = h.reshape(-1, H)
        v, i = s.pick(s.gate(x))
        return (loop(x, v, i, s.experts) + x * (v * (i >= 8)).sum(1, keepdim=True)).view_as(h)


class TiedExperts(Base):
    """experts 0 and 4 are one module"""

    def __init__(s):
        super().__init__()
        s.experts[4] = s.experts[0]


class ReluRouter(Base):
    """weights are relu(logits): may be zero"""

    def pick(s, z):
        v, i = z.topk(s.K, -1)
        return v.relu(), i


class CastsInGate(nn.Module):
    """casts, reshapes and a transpose between every two steps of the gate"""

    def __init__(s, E=8, K=2):
        super().__init__()
        s.E, s.K = E, K
        s.gate = nn.Linear(H, E, bias=False)
        s.experts = nn.ModuleList(glu() for _ in range(E))

    def forward(s, h):
        x = h.reshape(-1, H)
        z = F.linear(x.unsqueeze(1).float(), s.gate.weight.float()).to(torch.float32).flatten(1)
        p = z.t().contiguous().softmax(0, dtype=torch.float32).t().to(h.dtype).view(-1, 1, s.E)
        v, i = p.float().topk(s.K, dim=-1)
        v = (v / v.sum(-1, keepdim=True)).type_as(h).reshape(-1, s.K)
        return loop(x, v, i.to(torch.int32).long().squeeze(1), s.experts).reshape(h.shape)


class Temperature(Base):
    """softmax with a temperature"""

    def pick(s, z):
        return (z / 0.7).softmax(-1).topk(s.K, -1)


class ClampedSum(Base):
    """renormalisation by a sum that is clamped from below"""

    def pick(s, z):
        v, i = z.sigmoid().topk(s.K, -1)
        return v / v.sum(-1, keepdim=True).clamp(min=1e-9), i


class TinyEps(Base):
    """sigmoid weights, renormalised with an eps that is none of the usual ones, and scaled"""

    def pick(s, z):
        v, i = z.sigmoid().topk(s.K, -1)
        return 1.7 * v / (v.sum(-1, keepdim=True) + 3e-7), i


class DictOutput(Base):
    """a dictionary with the hidden states, the logits and a constant"""

    def forward(s, h):
        return {"hidden": super().forward(h), "router_logits": s.gate(h), "aux": None}


class GroupMax(Base):
    """groups by their best score; experts outside compete with score 0"""

    def __init__(s):
        super().__init__(12, 3)

    def pick(s, z):
        p = z.softmax(-1)
        g = p.view(-1, 4, 3).max(-1).values
        m = torch.zeros_like(g).scatter_(1, g.topk(2, -1).indices, 1).repeat_interleave(3, 1)
        v, i = p.masked_fill(m == 0, 0.0).topk(s.K, -1)
        return v * 16.0, i


class LogitBias(Base):
    """a bias that helps to choose and does not weigh"""

    def __init__(s):
        super().__init__()
        s.register_buffer("balance", torch.randn(8) * 0.02)

    def pick(s, z):
        p = z.softmax(-1)
        i = (p + s.balance).topk(s.K, -1).indices
        return p.gather(1, i), i


class MaskedShared(Base):
    """padding keeps the shared part only"""

    MASK = True

    def __init__(s):
        super().__init__()
        s.shared = glu(I=16)

    def forward(s, h, attention_mask=None):
        y = super().forward(h)
        if attention_mask is not None:
            y = y * attention_mask[..., None]
        return y + s.shared(h)


class WhileLoop(Base):
    """experts by a while loop over a work list, sums in a dictionary"""

    def forward(s, h):
        x = h.reshape(-1, H)
        v, i = s.pick(s.gate(x))
        work, sums = list(range(s.E)), {}
        while work:
            e = work.pop()
            hit = (i == e).any(1).nonzero().squeeze(1)
            sums[e] = (hit, s.experts[e](x[hit]) * (v * (i == e)).sum(1)[hit, None])
        out = torch.zeros_like(x)
        for hit, y in sums.values():
            out[hit] = out[hit] + y
        return out.view_as(h)


class OneHotEinsum(nn.Module):
    """one-hot weights and one einsum over all experts"""

    def __init__(s, E=6, K=2):
        super().__init__()
        s.E, s.K = E, K
        s.router = nn.Parameter(torch.randn(E, H) * 0.3)
        s.up, s.down = nn.Parameter(torch.randn(E, H, I) * 0.3), nn.Parameter(torch.randn(E, I, H) * 0.3)

    def forward(s, h):
        z = torch.einsum("bsh,eh->bse", h, s.router)
        v, i = z.topk(s.K, -1)
        w = (F.one_hot(i, s.E) * v.softmax(-1).unsqueeze(-1)).sum(-2)
        y = torch.einsum("bsef,efh->bseh", F.silu(torch.einsum("bsh,ehf->bsef", h, s.up)), s.down)
        return torch.einsum("bseh,bse->bsh", y, w)


BLOCKS = (
    NestedGroups,
    SharedInStack,
    OneBuffer,
    ChunkedTokens,
    WritesInput,
    ExpertScale,
    Int8Weights,
    ScriptedExpert,
    LayerNormInside,
    DropoutInside,
    TopOneConstant,
    LatentExperts,
    ZeroExperts,
    TiedExperts,
    ReluRouter,
    CastsInGate,
    Temperature,
    ClampedSum,
    TinyEps,
    DictOutput,
    GroupMax,
    LogitBias,
    MaskedShared,
    WhileLoop,
    OneHotEinsum,
)

"""MoE blocks in many styles, written by hand: each must be lifted. What a block is about stands in its docstring."""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

H, I = 24, 40


def glu(H=H, I=I, act=F.silu, bias=False, names=("w1", "w3", "w2")):
    class Ffn(nn.Module):
        def __init__(s):
            super().__init__()
            for n, (a, b) in zip(names, ((H, I), (H, I), (I, H))):  # noqa: B905
                setattr(s, n, nn.Linear(a, b, bias=bias))

        def forward(s, x):
            g, u, d = (getattr(s, n) for n in names)
            return d(act(g(x)) * u(x))

    return Ffn()


class MixtralLoop(nn.Module):
    """one_hot, permute, where, index_add_"""

    def __init__(s, E=8, K=2):
        super().__init__()
        s.E, s.K = E, K
        s.gate = nn.Linear(H, E, bias=False)
        s.experts = nn.ModuleList(glu() for _ in range(E))

    def forward(s, h):
        B, S, D = h.shape
        x = h.view(-1, D)
        logits = s.gate(x)
        p = F.softmax(logits, dim=1, dtype=torch.float)
        w, sel = torch.topk(p, s.K, dim=-1)
        w /= w.sum(dim=-1, keepdim=True)
        w = w.to(x.dtype)
        out = torch.zeros_like(x)
        mask = F.one_hot(sel, num_classes=s.E).permute(2, 1, 0)
        for e in range(s.E):
            idx, top_x = torch.where(mask[e])
            cur = x[None, top_x].reshape(-1, D)
            cur = s.experts[e](cur) * w[top_x, idx, None]
            out.index_add_(0, top_x, cur.to(x.dtype))
        return out.reshape(B, S, D), logits


class DeepseekInfer(nn.Module):
    """argsort, bincount, numpy, scatter_reduce_, no_grad, shared experts"""

    def __init__(s, E=16, K=6):
        super().__init__()
        s.num_experts_per_tok, s.n = K, E
        s.weight = nn.Parameter(torch.randn(E, H) * 0.2)
        s.experts = nn.ModuleList(glu(names=("gate_proj", "up_proj", "down_proj")) for _ in range(E))
        s.shared_experts = glu(I=2 * I, names=("gate_proj", "up_proj", "down_proj"))

    def forward(s, h):
        shape, identity = h.shape, h
        x = h.view(-1, H)
        scores = F.linear(x, s.weight, None).softmax(dim=-1)
        w, i = torch.topk(scores, k=s.num_experts_per_tok, dim=-1, sorted=False)
        if s.training:
            raise NotImplementedError
        y = s.moe_infer(x, i.view(-1), w.view(-1, 1)).view(*shape)
        return y + s.shared_experts(identity)

    @torch.no_grad()
    def moe_infer(s, x, flat, w):
        cache = torch.zeros_like(x)
        idxs = flat.argsort()
        per = flat.bincount().cpu().numpy().cumsum(0)
        tok = idxs // s.num_experts_per_tok
        for i, end in enumerate(per):
            start = 0 if i == 0 else per[i - 1]
            if start == end:
                continue
            t = tok[start:end]
            out = s.experts[i](x[t])
            out.mul_(w[idxs[start:end]])
            cache.scatter_reduce_(0, t.view(-1, 1).repeat(1, x.shape[-1]), out, reduce="sum")
        return cache


class Xverse(nn.Module):
    """float32 router, eps 1e-6, tolist, early continue, shared MLP"""

    def __init__(s, E=12, K=3):
        super().__init__()
        s.E, s.K = E, K
        s.router = nn.Linear(H, E, bias=False, dtype=torch.float32)
        s.experts = nn.ModuleList(glu() for _ in range(E))
        s.shared = glu(I=64)

    def forward(s, hs):
        b, n, d = hs.shape
        x = hs.view(-1, d)
        logits = s.router(x.float() if s.router.weight.dtype == torch.float32 else x.double())
        w = F.softmax(logits, dim=1, dtype=torch.float)
        w, sel = torch.topk(w, s.K, dim=-1)
        w = (w / (w.sum(dim=-1, keepdim=True) + 1e-6)).to(x.dtype)
        final = torch.zeros((b * n, d), dtype=x.dtype)
        m = F.one_hot(sel, s.E).permute(2, 1, 0)
        for e in range(s.E):
            idx, top = torch.where(m[e])
            if top.shape[0] == 0:
                continue
            tl, il = top.tolist(), idx.tolist()
            cur = s.experts[e](x[None, tl].reshape(-1, d)) * w[tl, il, None]
            final.index_add_(0, top, cur)
        return (final + s.shared(x)).reshape(b, n, d), logits


class Skywork(nn.Module):
    """dict of (tokens, gates) from nonzero, std-normalised logits, in-place scaling"""

    def __init__(s, E=16, K=2):
        super().__init__()
        s.k, s.std = K, 1.0
        s.wg = nn.Linear(H, E, bias=False)
        s.layers = nn.ModuleList(glu() for _ in range(E))

    def forward(s, h):
        x = h.reshape(-1, H)
        z = s.wg(x)
        z = z / (z.std(dim=1, keepdim=True) / s.std)
        v, i = torch.topk(F.softmax(z, dim=1), s.k)
        v = v / v.sum(-1, keepdim=True)
        jobs = {}
        for e in range(len(s.layers)):
            pos = torch.nonzero(i == e)
            if pos.numel():
                jobs[e] = (pos[:, 0], v[pos[:, 0], pos[:, 1]])
        out = torch.zeros_like(x)
        for e, (tok, g) in jobs.items():
            r = s.layers[e](torch.index_select(x, 0, tok))
            r *= g.unsqueeze(1)
            out.index_add_(0, tok, r)
        return out.view_as(h)


class DbrxFlat(nn.Module):
    """flat [E*I, H] parameters, view and chunk per expert, L1 normalisation"""

    def __init__(s, E=4, K=2):
        super().__init__()
        s.E, s.K = E, K
        s.layer = nn.Linear(H, E, bias=False)
        s.w1, s.v1, s.w2 = (nn.Parameter(torch.randn(E * I, H) * 0.2) for _ in range(3))

    def forward(s, x):
        sh = x.shape
        x = x.view(-1, H)
        w = s.layer(x).softmax(-1)
        tw, te = torch.topk(w, s.K, dim=-1)
        tw = tw / torch.norm(tw, p=1, dim=-1, keepdim=True)
        out = torch.zeros_like(x)
        mask = F.one_hot(te, s.E).permute(2, 1, 0)
        parts = [torch.chunk(p.view(s.E, I, H), s.E, dim=0) for p in (s.w1, s.v1, s.w2)]
        for e in range(s.E):
            k, t = torch.where(mask[e])
            a, b, c = (q[e].squeeze(0) for q in parts)
            cur = x[None, t].reshape(-1, H)
            y = (F.silu(cur.matmul(a.t())) * cur.matmul(b.t())).matmul(c)
            out.index_add_(0, t, y * tw[t, k, None])
        return out.reshape(sh)


class GptOss(nn.Module):
    """biases, interleaved and clamped swiglu, top-k then softmax, dense bmm with a scattered score"""

    def __init__(s, E=8, K=4):
        super().__init__()
        s.E, s.K = E, K
        s.weight, s.bias = nn.Parameter(torch.randn(E, H) * 0.3), nn.Parameter(torch.randn(E) * 0.3)
        s.gu, s.gub = nn.Parameter(torch.randn(E, H, 2 * I) * 0.4), nn.Parameter(torch.randn(E, 2 * I) * 0.4)
        s.dn, s.dnb = nn.Parameter(torch.randn(E, I, H) * 0.4), nn.Parameter(torch.randn(E, H) * 0.4)

    def forward(s, h):
        x = h.reshape(-1, H)
        z = F.linear(x, s.weight, s.bias)
        v, i = torch.topk(z, s.K, dim=-1)
        sc = torch.zeros_like(z).scatter_(1, i, F.softmax(v, dim=1, dtype=v.dtype))
        r = x.repeat(s.E, 1).view(s.E, -1, H)
        gu = torch.bmm(r, s.gu) + s.gub[..., None, :]
        g, u = gu[..., ::2].clamp(max=7.0), gu[..., 1::2].clamp(-7.0, 7.0)
        y = torch.bmm((u + 1) * (g * torch.sigmoid(g * 1.702)), s.dn) + s.dnb[..., None, :]
        y = y * sc.transpose(0, 1)[..., None]
        return y.sum(0).view_as(h), sc


class Llama4(nn.Module):
    """top-1, sigmoid of a scattered -inf tensor, weight on the expert input, all experts on all tokens, shared"""

    def __init__(s, E=8, K=1):
        super().__init__()
        s.E, s.K = E, K
        s.router = nn.Linear(H, E, bias=False)
        s.gate_up, s.down = nn.Parameter(torch.randn(E, H, 2 * I) * 0.3), nn.Parameter(torch.randn(E, I, H) * 0.3)
        s.shared_expert = glu()

    def forward(s, h):
        x = h.reshape(-1, H)
        z = s.router(x)
        v, i = torch.topk(z, s.K, dim=1)
        sc = torch.full_like(z, float("-inf")).scatter_(1, i, v).transpose(0, 1)
        sc = torch.sigmoid(sc.float()).to(x.dtype)
        r = x.repeat(s.E, 1) * sc.reshape(-1, 1)
        g, u = torch.bmm(r.view(s.E, -1, H), s.gate_up).chunk(2, dim=-1)
        y = torch.bmm(u * F.silu(g), s.down).reshape(s.E, -1, H).sum(0)
        return (s.shared_expert(x) + y).view_as(h), sc


class GShardEinsum(nn.Module):
    """dispatch and combine masks [T, E, C] with capacity = T (never drops), cumsum positions"""

    def __init__(s, E=6, K=2):
        super().__init__()
        s.E = E
        s.wg = nn.Parameter(torch.randn(H, E) * 0.3)
        s.wi, s.wo = nn.Parameter(torch.randn(E, H, I) * 0.3), nn.Parameter(torch.randn(E, I, H) * 0.3)

    def forward(s, h):
        x = h.reshape(-1, H)
        T = x.shape[0]
        g = torch.softmax(x @ s.wg, -1)
        m1 = F.one_hot(g.argmax(-1), s.E)
        m2 = F.one_hot(g.masked_fill(m1.bool(), float("-inf")).argmax(-1), s.E)
        p1 = torch.cumsum(m1, 0) - 1
        p2 = torch.cumsum(m2, 0) - 1 + m1.sum(0, keepdim=True)
        g1, g2 = (g * m1).sum(1), (g * m2).sum(1)
        den = (g1 + g2).clamp(min=torch.finfo(g.dtype).eps)
        C = 2 * T

        def part(gv, m, p):
            return (gv / den)[:, None, None] * m[:, :, None] * F.one_hot((p * m).sum(1), C)[:, None, :]

        comb = part(g1, m1, p1) + part(g2, m2, p2)
        disp = comb.bool().to(x.dtype)
        e = torch.einsum("sec,sm->ecm", disp, x)
        e = torch.einsum("ecf,efm->ecm", F.gelu(torch.einsum("ecm,emf->ecf", e, s.wi)), s.wo)
        return torch.einsum("sec,ecm->sm", comb, e).view_as(h)


class SwitchItem(nn.Module):
    """token by token Python: argmax().item(), probability as a Python float"""

    def __init__(s, E=5):
        super().__init__()
        s.classifier = nn.Linear(H, E)
        s.mlp = nn.ModuleDict(
            {
                f"expert_{i}": nn.Sequential(nn.Linear(H, I, bias=False), nn.ReLU(), nn.Linear(I, H, bias=False))
                for i in range(E)
            }
        )

    def forward(s, h):
        x = h.reshape(-1, H)
        rows = []
        for t in range(x.shape[0]):
            p = s.classifier(x[t]).softmax(-1)
            e = p.argmax().item()
            rows.append(s.mlp[f"expert_{e}"](x[t]) * p[e].item())
        return torch.stack(rows).view_as(h) if rows else torch.zeros_like(h)


class OneBigLinear(nn.Module):
    """all experts are one Linear [E*I, H] and one Linear [H, E*I]; a mask on the hidden layer"""

    def __init__(s, E=7, K=2):
        super().__init__()
        s.E, s.K = E, K
        s.pick = nn.Linear(H, E, bias=False)
        s.up, s.down = nn.Linear(H, E * I, bias=False), nn.Linear(E * I, H, bias=False)

    def forward(s, x):
        z = s.pick(x)
        v, i = z.topk(s.K, -1)
        w = torch.zeros_like(z).scatter(-1, i, v.softmax(-1))
        hid = F.gelu(s.up(x), approximate="tanh").unflatten(-1, (s.E, I)) * w.unsqueeze(-1)
        return s.down(hid.flatten(-2))


class NumpyRouter(nn.Module):
    """routing and weights in numpy; experts are bare parameters in a ParameterList"""

    def __init__(s, E=8, K=2):
        super().__init__()
        s.E, s.K = E, K
        s.scorer = nn.Linear(H, E, bias=False)
        s.A = nn.ParameterList(nn.Parameter(torch.randn(I, H) * 0.3) for _ in range(E))
        s.B = nn.ParameterList(nn.Parameter(torch.randn(H, I) * 0.3) for _ in range(E))

    def forward(s, h):
        x = h.reshape(-1, H)
        z = s.scorer(x).detach().cpu().numpy()
        order = np.argsort(-z, axis=1, kind="stable")[:, : s.K]
        top = np.take_along_axis(z, order, 1)
        w = np.exp(top - top.max(1, keepdims=True)) if len(top) else top
        w = w / w.sum(1, keepdims=True)
        out = torch.zeros_like(x)
        for e in range(s.E):
            rows, cols = np.nonzero(order == e)
            if len(rows) == 0:
                continue
            r = torch.from_numpy(rows)
            y = F.linear(F.silu(F.linear(x[r], s.A[e])), s.B[e])
            out[r] = out[r] + torch.from_numpy(w[rows, cols]).to(x.dtype)[:, None] * y
        return out.view_as(h)


class DeepseekV3(nn.Module):
    """sigmoid, correction bias, groups by sum of two best, scale 2.5"""

    def __init__(s, E=16, K=4, n=4, keep=2):
        super().__init__()
        s.E, s.K, s.n, s.keep = E, K, n, keep
        s.g = nn.Parameter(torch.randn(E, H) * 0.3)
        s.register_buffer("e_score_correction_bias", torch.randn(E) * 0.1)
        s.experts = nn.ModuleList(glu() for _ in range(E))
        s.sh = glu()

    def forward(s, h):
        x = h.reshape(-1, H)
        sc = F.linear(x.float(), s.g.float()).sigmoid()
        c = sc + s.e_score_correction_bias[None]
        gs = c.view(-1, s.n, s.E // s.n).topk(2, dim=-1)[0].sum(-1)
        gi = torch.topk(gs, s.keep, dim=-1, sorted=False)[1]
        m = torch.zeros_like(gs).scatter_(1, gi, 1)
        m = m.unsqueeze(-1).expand(-1, s.n, s.E // s.n).reshape(-1, s.E)
        i = torch.topk(c.masked_fill(~m.bool(), float("-inf")), s.K, dim=-1, sorted=False)[1]
        w = sc.gather(1, i)
        w = (w / (w.sum(-1, keepdim=True) + 1e-20) * 2.5).to(x.dtype)
        out = torch.zeros_like(x)
        for e, ffn in enumerate(s.experts):
            t, k = (i == e).nonzero(as_tuple=True)
            if t.numel() > 0:
                out[t] += ffn(x[t]) * w[t, k].unsqueeze(-1)
        return out.view_as(h) + s.sh(h)


class OddNames(nn.Module):
    """experts as attributes blk0..blk9, biases, a padding mask that zeroes rows"""

    MASK = True

    def __init__(s, E=10):
        super().__init__()
        s.zeta = nn.Linear(H, E)
        s.cnt = E
        for i in range(E):
            setattr(s, f"blk{i}", nn.Sequential(nn.Linear(H, I), nn.GELU(), nn.Linear(I, H)))

    def forward(s, x, attention_mask=None):
        B, S, _ = x.shape
        f = x.reshape(B * S, -1)
        a, b = s.zeta(f).sort(dim=-1, descending=True)
        a, b = a[:, :2].sigmoid(), b[:, :2]
        y = torch.zeros_like(f)
        for i in range(s.cnt):
            sel = b == i
            who = sel.any(1)
            if who.any():
                y[who] += getattr(s, f"blk{i}")(f[who]) * (a * sel)[who].sum(1, keepdim=True)
        y = y.view(B, S, -1)
        if attention_mask is not None:
            y = y * attention_mask.unsqueeze(-1).to(y.dtype)
        return y


class Qwen2(nn.Module):
    """no renormalisation, sigmoid-gated shared expert"""

    def __init__(s, E=60, K=4):
        super().__init__()
        s.E, s.K = E, K
        s.gate = nn.Linear(H, E, bias=False)
        s.experts = nn.ModuleList(glu(I=16) for _ in range(E))
        s.shared_expert, s.shared_expert_gate = glu(), nn.Linear(H, 1, bias=False)

    def forward(s, h):
        x = h.view(-1, H)
        p = F.softmax(s.gate(x), dim=1, dtype=torch.float)
        w, sel = torch.topk(p, s.K, dim=-1)
        w = w.to(x.dtype)
        out = torch.zeros_like(x)
        for e in set(sel.flatten().tolist()):
            t, k = torch.nonzero(sel == e, as_tuple=True)
            out.index_add_(0, t, s.experts[e](x[t]) * w[t, k, None])
        out = out + torch.sigmoid(s.shared_expert_gate(x)) * s.shared_expert(x)
        return out.view_as(h)


class JetMoe(nn.Module):
    """sort by expert, split sizes through tolist, stacked [E, out, in], output bias shared by all"""

    def __init__(s, E=8, K=2):
        super().__init__()
        s.E, s.K = E, K
        s.router = nn.Linear(H, E, bias=False)
        s.inp, s.outp = nn.Parameter(torch.randn(E, 2 * I, H) * 0.3), nn.Parameter(torch.randn(E, H, I) * 0.3)
        s.bias = nn.Parameter(torch.randn(H))

    def forward(s, h):
        sh = h.shape
        x = h.reshape(-1, H)
        v, i = s.router(x).topk(s.K, dim=1)
        g = torch.softmax(v.float(), dim=1).type_as(x)
        size = torch.zeros([x.size(0), s.E]).scatter(1, i, 1).long().sum(0).tolist()
        _, order = i.flatten().sort(0)
        tok = order.div(s.K, rounding_mode="trunc")
        parts = x[tok].split(size, dim=0)
        res = []
        for e in range(s.E):
            a, b = F.linear(parts[e], s.inp[e]).chunk(2, dim=-1)
            res.append(F.linear(F.silu(a) * b, s.outp[e]))
        y = torch.cat(res) * g.flatten()[order][:, None]
        return (torch.zeros_like(x).index_add(0, tok, y) + s.bias).view(sh)


class GatherWeights(nn.Module):
    """weights gathered per token, einsum over (token, k)"""

    def __init__(s, E=32, K=3):
        super().__init__()
        s.K = K
        s.gate = nn.Linear(H, E, bias=False)
        s.w_in, s.w_out = nn.Parameter(torch.randn(E, I, H) * 0.3), nn.Parameter(torch.randn(E, H, I) * 0.3)

    def forward(s, h):
        x = h.reshape(-1, H)
        v, i = s.gate(x).softmax(-1).topk(s.K, -1)
        hid = F.relu(torch.einsum("tkfh,th->tkf", s.w_in[i], x)) ** 2
        return torch.einsum("tkhf,tkf,tk->th", s.w_out[i], hid, v).view_as(h)


class DeepExpert(nn.Module):
    """an expert no template knows: three layers with a LayerNorm"""

    def __init__(s, E=6, K=2):
        super().__init__()
        s.K = K
        s.gate = nn.Linear(H, E)
        s.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(H, I), nn.LayerNorm(I), nn.SiLU(), nn.Linear(I, I), nn.Tanh(), nn.Linear(I, H))
            for _ in range(E)
        )

    def forward(s, h):
        x = h.reshape(-1, H)
        v, i = s.gate(x).topk(s.K, -1)
        v = v.softmax(-1)
        out = torch.zeros_like(x)
        for e, f in enumerate(s.experts):
            t, k = torch.where(i == e)
            if len(t):
                out.index_add_(0, t, f(x[t]) * v[t, k, None])
        return out.view_as(h)


class SparseMixer(nn.Module):
    """Phi-3.5 routing: two argmaxes with relative masking"""

    def __init__(s, E=16):
        super().__init__()
        s.E = E
        s.gate = nn.Linear(H, E, bias=False)
        s.experts = nn.ModuleList(glu() for _ in range(E))

    def mix(s, z, cur, eps=0.01):
        with torch.no_grad():
            m, i = cur.max(dim=-1, keepdim=True)
            f = z.abs().clamp(min=m)
            k = ((m - z) / f) > (2 * eps)
        g = torch.softmax(cur.masked_fill(k, float("-inf")), dim=-1)
        return g.gather(dim=-1, index=i), i

    def forward(s, h):
        x = h.reshape(-1, H)
        z = s.gate(x)
        w1, i1 = s.mix(z, z)
        w2, i2 = s.mix(z, torch.scatter(z, -1, i1, float("-inf")))
        w, i = torch.cat((w1, w2), -1), torch.cat((i1, i2), -1)
        out = torch.zeros_like(x)
        m = F.one_hot(i, s.E).permute(2, 1, 0)
        for e in range(s.E):
            k, t = torch.where(m[e])
            if t.shape[0] == 0:
                continue
            out.index_add_(0, t, s.experts[e](x[t]) * w[t, k, None])
        return out.view_as(h), z


class Grok(nn.Module):
    """every expert on every token, then select; GeGLU; tanh cap on the logits; 2-D input"""

    def __init__(s, E=8, K=2):
        super().__init__()
        s.K = K
        s.gate = nn.Linear(H, E, bias=False)
        s.experts = nn.ModuleList(
            glu(act=lambda v: F.gelu(v, approximate="tanh"), names=("linear", "linear_v", "linear_1")) for _ in range(E)
        )

    def forward(s, x):
        z = s.gate(x)
        z = 30.0 * torch.tanh(z / 30.0)
        p = F.softmax(z.float(), dim=-1)
        v, i = torch.topk(p, s.K)
        al = torch.stack([e(x) for e in s.experts], dim=1)
        return (al.gather(1, i[..., None].expand(-1, -1, x.shape[-1])) * v[..., None]).sum(1)


class TwoLayerRouter(nn.Module):
    """router Linear-Tanh-Linear, E=64, lists of tokens, residual inside the block"""

    def __init__(s, E=64, K=6):
        super().__init__()
        s.E, s.K = E, K
        s.r = nn.Sequential(nn.Linear(H, 3 * E, bias=False), nn.Tanh(), nn.Linear(3 * E, E, bias=False))
        s.r[2].weight.data *= 4
        s.bank = nn.ModuleList(glu(I=12) for _ in range(E))

    def forward(s, h):
        x = h.reshape(-1, H)
        v, i = s.r(x).softmax(-1).topk(s.K, -1)
        v = v / v.sum(-1, keepdim=True)
        lists = {}
        for t, row in enumerate(i.tolist()):
            for k, e in enumerate(row):
                lists.setdefault(e, []).append((t, k))
        out = x.clone()
        for e in sorted(lists):
            t, k = (torch.tensor(c) for c in zip(*lists[e]))  # noqa: B905
            out[t] += s.bank[e](x[t]) * v[t, k].unsqueeze(1)
        return out.view_as(h)


class HashedDict(nn.Module):
    """experts in a plain Python dict of tensors, not registered; top-1 through max()"""

    def __init__(s, E=6):
        super().__init__()
        s.key = nn.Parameter(torch.randn(H, E) * 0.3)
        s.store = {f"e{i}": [torch.randn(H, I) * 0.3, torch.randn(I, H) * 0.3] for i in range(E)}

    def forward(s, h):
        x = h.reshape(-1, H)
        p, j = torch.softmax(x @ s.key, 1).max(1)
        y = torch.empty_like(x)
        for e in j.unique().tolist():
            a, b = s.store[f"e{e}"]
            m = j == e
            y[m] = torch.tanh(x[m] @ a) @ b * p[m][:, None]
        return y.view_as(h)


class Base(nn.Module):
    """A loop over a ModuleList; others change one of its steps."""

    def __init__(s, E=8, K=2):
        super().__init__()
        s.E, s.K, s.now = E, K, 0
        s.gate = nn.Linear(H, E, bias=False)
        s.experts = nn.ModuleList(glu() for _ in range(E))

    def logits(s, x):
        return s.gate(x)

    def keep(s, t, k):
        return t, k

    def pick(s, z):
        v, i = z.softmax(-1).topk(s.K, -1)
        return v / v.sum(-1, keepdim=True), i

    def forward(s, h):
        x = h.reshape(-1, H)
        v, i = s.pick(s.logits(x))
        out = torch.zeros_like(x)
        for e, f in enumerate(s.experts):
            t, k = torch.where(i == e)
            if len(t) == 0:
                continue
            t, k = s.keep(t, k)
            out.index_add_(0, t, f(x[t]) * v[t, k, None])
        return out.view_as(h)


BLOCKS = (
    MixtralLoop,
    DeepseekInfer,
    Xverse,
    Skywork,
    DbrxFlat,
    GptOss,
    Llama4,
    GShardEinsum,
    SwitchItem,
    OneBigLinear,
    NumpyRouter,
    DeepseekV3,
    OddNames,
    Qwen2,
    JetMoe,
    GatherWeights,
    DeepExpert,
    SparseMixer,
    Grok,
    TwoLayerRouter,
    HashedDict,
)


def sample(cls):
    """A block with fixed random weights, and the arguments of one call."""
    torch.manual_seed(7)
    block = cls().eval()
    if cls.__name__ == "Grok":
        return block, (torch.randn(6, H),), {}
    if hasattr(cls, "DTYPE"):
        return block, (torch.randn(2, 3, H, dtype=cls.DTYPE),), {}
    if hasattr(cls, "MASK"):
        return block, (torch.randn(2, 3, H),), {"attention_mask": torch.ones(2, 3, dtype=torch.bool)}
    return block, (torch.randn(2, 3, H),), {}

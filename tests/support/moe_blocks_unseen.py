"""MoE blocks written to be unlike the others, without a look at the lifter: naming, gating, storage, dispatch."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from moe_blocks import H, I, glu


class ManualSoftmax(nn.Module):
    """softmax by hand, argsort instead of topk, rows collected in Python lists"""

    def __init__(self):
        super().__init__()
        self.chooser = nn.Linear(H, 6)
        self.bank = nn.ModuleList(glu() for _ in range(6))

    def forward(self, hidden):
        flat = hidden.flatten(0, -2)
        z = self.chooser(flat)
        e = torch.exp(z - z.max(dim=1, keepdim=True).values)
        p = e / e.sum(dim=1, keepdim=True)
        order = torch.argsort(p, dim=1, descending=True)[:, :2]
        share = torch.gather(p, 1, order)
        result = torch.zeros_like(flat)
        for number, net in enumerate(self.bank):
            rows = [t for t, pair in enumerate(order.tolist()) if number in pair]
            if rows:
                index = torch.tensor(rows)
                column = (order[index] == number).int().argmax(1)
                result[index] += net(flat[index]) * share[index, column].unsqueeze(1)
        return result.reshape(hidden.shape)


class LogSumExp(nn.Module):
    """log probabilities, exponentiated after the choice, renormalised in log space"""

    def __init__(self):
        super().__init__()
        self.centroids = nn.Parameter(torch.randn(H, 10) * 0.2)
        self.up = nn.Parameter(torch.randn(10, H, I) * 0.2)
        self.down = nn.Parameter(torch.randn(10, I, H) * 0.2)

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        z = torch.matmul(x, self.centroids)
        logp = z - torch.logsumexp(z, dim=-1, keepdim=True)
        best, which = logp.topk(3, dim=-1)
        weight = (best - best.logsumexp(-1, keepdim=True)).exp()
        out = x.new_zeros(x.shape)
        for k in range(3):
            for e in which[:, k].unique():
                rows = (which[:, k] == e).nonzero().view(-1)
                y = torch.relu(x[rows] @ self.up[e]).square() @ self.down[e]
                out.index_put_((rows,), y * weight[rows, k : k + 1], accumulate=True)
        return out.view(hidden.shape)


class WhereMask(nn.Module):
    """everything under the K-th best probability is zeroed by torch.where; all experts run on all tokens"""

    def __init__(self):
        super().__init__()
        self.score = nn.Linear(H, 5, bias=False)
        self.a = nn.Parameter(torch.randn(5, I, H) * 0.3)
        self.b = nn.Parameter(torch.randn(5, H, I) * 0.3)

    def forward(self, hidden):
        p = self.score(hidden).softmax(-1)
        bound = p.sort(-1).values[..., -2:-1]
        w = torch.where(p >= bound, p, torch.zeros_like(p))
        w = w / w.sum(-1, keepdim=True)
        inner = F.gelu(torch.einsum("bsh,efh->bsef", hidden, self.a))
        return torch.einsum("bsef,ehf,bse->bsh", inner, self.b, w)


class OneHotSum(nn.Module):
    """a multi-hot mask from summed one-hots times the probabilities; columns taken by narrow"""

    def __init__(self):
        super().__init__()
        self.selector = nn.Linear(H, 7)
        self.specialists = nn.ModuleList(
            nn.ModuleDict({"enter": nn.Linear(H, I), "leave": nn.Linear(I, H)}) for _ in range(7)
        )

    def forward(self, hidden):
        x = hidden.view(-1, hidden.size(-1))
        p = torch.sigmoid(self.selector(x))
        hot = F.one_hot(p.topk(2).indices, 7).sum(dim=1)
        w = p * hot
        total = 0
        for e, s in enumerate(self.specialists):
            total = total + s["leave"](F.silu(s["enter"](x))) * w.narrow(1, e, 1)
        return total.view_as(hidden)


class ScatterInPlace(nn.Module):
    """weights scattered and normalised in place, gathered again per expert"""

    def __init__(self):
        super().__init__()
        self.wr = nn.Parameter(torch.randn(9, H) * 0.3)
        self.gates, self.ups, self.downs = (
            nn.ParameterList(nn.Parameter(torch.randn(*s) * 0.2) for _ in range(9)) for s in ((H, I), (H, I), (I, H))
        )

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        z = x.mm(self.wr.t())
        values, index = torch.topk(z.softmax(1), 3, dim=1, sorted=False)
        w = torch.zeros(x.size(0), 9, dtype=x.dtype)
        w.scatter_(1, index, values)
        w.div_(w.sum(1, keepdim=True))
        out = torch.zeros_like(x)
        for e in range(9):
            rows = w[:, e].nonzero().flatten()
            h = x.index_select(0, rows)
            h = (F.silu(h @ self.gates[e]) * (h @ self.ups[e])) @ self.downs[e]
            out.index_add_(0, rows, h.mul_(w[rows, e].unsqueeze(-1)))
        return out.view_as(hidden)


class FlatSlices(nn.Module):
    """F.linear with slices of tall stacked matrices and flat biases, start offsets kept in a list"""

    def __init__(self):
        super().__init__()
        self.n = 6
        self.router_kernel = nn.Parameter(torch.randn(6, H) * 0.3)
        self.tall_in, self.tall_in_bias = nn.Parameter(torch.randn(6 * I, H) * 0.2), nn.Parameter(torch.randn(6 * I))
        self.tall_out, self.tall_out_bias = nn.Parameter(torch.randn(6 * H, I) * 0.2), nn.Parameter(torch.randn(6 * H))
        self.starts = [(e * I, e * H) for e in range(6)]

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        v, i = torch.topk(F.linear(x, self.router_kernel), 2)
        v = F.softmax(v, dim=-1)
        y = torch.zeros_like(x)
        for e, (a, b) in enumerate(self.starts):
            rows, slot = (i == e).nonzero(as_tuple=True)
            h = F.gelu(F.linear(x[rows], self.tall_in[a : a + I], self.tall_in_bias[a : a + I]))
            h = F.linear(h, self.tall_out[b : b + H], self.tall_out_bias[b : b + H])
            y.index_add_(0, rows, h * v[rows, slot][:, None])
        return y.reshape(*hidden.shape)


class PaddedBmm(nn.Module):
    """tokens of each expert padded to the longest list, one bmm, gathered back"""

    def __init__(self):
        super().__init__()
        self.g = nn.Linear(H, 8, bias=False)
        self.k1, self.k2 = nn.Parameter(torch.randn(8, H, 2 * I) * 0.2), nn.Parameter(torch.randn(8, I, H) * 0.2)

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        p, i = self.g(x).softmax(-1).topk(2)
        p = p / p.sum(-1, keepdim=True)
        owner = i.reshape(-1)
        counts = torch.bincount(owner, minlength=8)
        order = owner.argsort(stable=True)
        first = counts.cumsum(0) - counts
        place = torch.arange(len(owner)) - first[owner[order]]
        room = int(counts.max()) if len(owner) else 0
        padded = x.new_zeros(8, room, H)
        padded[owner[order], place] = x[order // 2]
        gate, up = torch.bmm(padded, self.k1).chunk(2, -1)
        done = torch.bmm(F.silu(gate) * up, self.k2)
        slots = torch.empty(len(owner), H, dtype=x.dtype)
        slots[order] = done[owner[order], place]
        return (slots.view(-1, 2, H) * p.unsqueeze(-1)).sum(1).view_as(hidden)


class ViewsInGate(nn.Module):
    """logits by broadcast multiply and sum, with views and casts in between"""

    def __init__(self):
        super().__init__()
        self.keys = nn.Parameter(torch.randn(4, 2, H) * 0.3)
        self.mlps = nn.ModuleList(glu(names=("wi_0", "wi_1", "wo")) for _ in range(8))

    def forward(self, hidden):
        x = hidden.reshape(-1, 1, 1, H).float()
        z = (x * self.keys.float()[None]).sum(-1).reshape(-1, 8)
        p = torch.softmax(z.unsqueeze(1), -1).squeeze(1)
        v, i = p.topk(2, -1)
        v = (v / v.sum(-1, keepdim=True)).to(hidden.dtype)
        rows = hidden.reshape(-1, H)
        out = torch.zeros_like(rows)
        for e, mlp in enumerate(self.mlps):
            hit = (i == e).any(-1)
            if hit.any():
                out[hit] += mlp(rows[hit]) * (v * (i == e))[hit].sum(-1, keepdim=True)
        return out.view(hidden.shape)


class NoisyTopK(nn.Module):
    """noisy top-k gating: the noise is for training only; weights by a softmax over -inf"""

    def __init__(self):
        super().__init__()
        self.w_gate, self.w_noise = nn.Parameter(torch.randn(H, 8) * 0.2), nn.Parameter(torch.zeros(H, 8))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(H, I), nn.ReLU(), nn.Linear(I, H)) for _ in range(8))

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        z = x @ self.w_gate
        if self.training:
            z = z + torch.randn_like(z) * F.softplus(x @ self.w_noise)
        top, i = z.topk(2, dim=1)
        full = torch.full_like(z, float("-inf")).scatter(1, i, top)
        gates = F.softmax(full, dim=1)
        chunks = [(gates[:, e] > 0).nonzero().squeeze(1) for e in range(8)]
        stitched = torch.cat([f(x[c]) for f, c in zip(self.experts, chunks, strict=True)])
        scaled = stitched * torch.cat([gates[c, e] for e, c in enumerate(chunks)]).unsqueeze(1)
        return torch.zeros_like(x).index_add(0, torch.cat(chunks), scaled).view_as(hidden)


class ResidualCoefficient(nn.Module):
    """a dense MLP and the experts mixed by a softmax over two coefficients of the token"""

    def __init__(self):
        super().__init__()
        self.wg = nn.Linear(H, 4, bias=False)
        self.deepspeed_experts = nn.ModuleList(glu() for _ in range(4))
        self.mlp, self.coefficient = glu(), nn.Linear(H, 2)

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        v, i = self.wg(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for e, f in enumerate(self.deepspeed_experts):
            y[i == e] = f(x[i == e]) * v[i == e, None]
        c = self.coefficient(x).softmax(-1)
        return (y * c[:, 0:1] + self.mlp(x) * c[:, 1:]).view_as(hidden)


class UnusualActivations(nn.Module):
    """biased experts with a hard swish and an ELU; addmm throughout"""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, 6)
        self.w1, self.b1 = nn.Parameter(torch.randn(6, H, I) * 0.2), nn.Parameter(torch.randn(6, I) * 0.2)
        self.w2, self.b2 = nn.Parameter(torch.randn(6, I, H) * 0.2), nn.Parameter(torch.randn(6, H) * 0.2)

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        p, i = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e in range(6):
            t, k = torch.where(i == e)
            h = torch.addmm(self.b1[e], x[t], self.w1[e])
            h = F.hardswish(h) + 0.1 * F.elu(h)
            out.index_add_(0, t, torch.addmm(self.b2[e], h, self.w2[e]) * p[t, k].unsqueeze(1))
        return out.view_as(hidden)


class Rearranged(nn.Module):
    """einsum rearrangements: tokens by experts by features, contracted with a sparse combine tensor"""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(H, 3, 2) * 0.3)  # 3 x 2 experts
        self.w_in, self.w_out = nn.Parameter(torch.randn(3, 2, H, I) * 0.3), nn.Parameter(torch.randn(3, 2, I, H) * 0.3)

    def forward(self, hidden):
        z = torch.einsum("...h,hab->...ab", hidden, self.gate).flatten(-2)
        v, i = z.softmax(-1).topk(2, -1)
        combine = torch.zeros_like(z).scatter_add(-1, i, v).unflatten(-1, (3, 2))
        inner = F.gelu(torch.einsum("...h,abhf->...abf", hidden, self.w_in), approximate="tanh")
        return torch.einsum("...abf,abfh,...ab->...h", inner, self.w_out, combine)


class NamedExperts(nn.Module):
    """a dictionary of experts whose names have no numbers"""

    NAMES = ("syntax", "facts", "code", "maths", "dialogue")

    def __init__(self):
        super().__init__()
        self.topics = nn.Linear(H, 5)
        self.people = nn.ModuleDict({n: glu() for n in self.NAMES})

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        p = self.topics(x).softmax(-1)
        v, i = p.topk(2)
        out = torch.zeros_like(x)
        for n, name in enumerate(self.NAMES):
            t, k = (i == n).nonzero(as_tuple=True)
            out.index_add_(0, t, self.people[name](x[t]) * v[t, k, None])
        return out.view_as(hidden)


class FunctionalExperts(nn.Module):
    """one prototype called with stacked buffers through functional_call"""

    def __init__(self):
        super().__init__()
        self.route = nn.Linear(H, 6, bias=False)
        object.__setattr__(self, "prototype", glu())
        for name, p in self.prototype.named_parameters():
            self.register_buffer(name.replace(".", "_"), torch.randn(6, *p.shape) * 0.2)

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        v, i = self.route(x).topk(2)
        v = v.sigmoid()
        out = torch.zeros_like(x)
        for e in range(6):
            t, k = torch.where(i == e)
            given = {n: getattr(self, n.replace(".", "_"))[e] for n, _ in self.prototype.named_parameters()}
            out.index_add_(0, t, torch.func.functional_call(self.prototype, given, x[t]) * v[t, k, None])
        return out.view_as(hidden)


class TiedInAndOut(nn.Module):
    """each expert has one matrix, used forward and transposed"""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, 8)
        self.dictionary = nn.Parameter(torch.randn(8, I, H) * 0.2)

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        v, i = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e in range(8):
            t, k = torch.where(i == e)
            out.index_add_(0, t, F.relu(x[t] @ self.dictionary[e].T) @ self.dictionary[e] * v[t, k, None])
        return out.view_as(hidden)


class HalfPrecision(nn.Module):
    """bfloat16 weights, the router in float32, probabilities rounded before they are used"""

    DTYPE = torch.bfloat16

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, 8, bias=False)
        self.ffn = nn.ModuleList(glu() for _ in range(8))
        self.to(torch.bfloat16)

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        z = F.linear(x.float(), self.router.weight.float())
        p, i = z.softmax(-1).topk(2)
        p = (p / p.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(x)
        for e, f in enumerate(self.ffn):
            t, k = torch.where(i == e)
            out.index_add_(0, t, f(x[t]) * p[t, k, None])
        return out.view_as(hidden)


class TokenByToken(nn.Module):
    """two nested Python loops, weights as Python floats"""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(H, 5)
        self.members = nn.ModuleList(glu() for _ in range(5))

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        out = torch.zeros_like(x)
        for t in range(x.shape[0]):
            z = self.head(x[t])
            best = sorted(range(5), key=lambda e: -z[e].item())[:2]
            norm = sum(math.exp(z[e].item()) for e in best)
            for e in best:
                out[t] += math.exp(z[e].item()) / norm * self.members[e](x[t])
        return out.view_as(hidden)


class SwitchTopOne(nn.Module):
    """top-1 by argmax, the expert's output scaled by its probability, masks by equality"""

    def __init__(self):
        super().__init__()
        self.switch = nn.Linear(H, 6, bias=False)
        self.fc = nn.ModuleList(nn.Sequential(nn.Linear(H, I), nn.GELU(), nn.Linear(I, H)) for _ in range(6))

    def forward(self, hidden):
        probability = self.switch(hidden).softmax(-1)
        route = probability.argmax(-1)
        peak = probability.amax(-1, keepdim=True)
        final = hidden.new_zeros(hidden.shape)
        for e in range(6):
            mask = route == e
            final[mask] = self.fc[e](hidden[mask])
        return final * peak


class SortAndSplit(nn.Module):
    """stable sort by expert, split by counts, concatenated and put back by the inverse permutation"""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, 12, bias=False)
        self.lobes = nn.ModuleList(glu(I=16) for _ in range(12))

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        v, i = torch.topk(F.softmax(self.gate(x), -1), 4)
        flat, order = torch.sort(i.flatten(), stable=True)
        counts = torch.histc(flat.float(), 12, 0, 11).int().tolist()
        parts = (x.repeat_interleave(4, 0)[order]).split(counts)
        y = torch.cat([f(p) for f, p in zip(self.lobes, parts, strict=True)])
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        return (y[inverse].view(-1, 4, H) * v[..., None]).sum(1).view_as(hidden)


class SoftplusGate(nn.Module):
    """square roots of softplus as scores"""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, 8, bias=False)
        self.experts = nn.ModuleList(glu() for _ in range(8))

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        v, i = F.softplus(self.gate(x)).sqrt().topk(3)
        v = v / v.sum(-1, keepdim=True) * 1.5
        out = torch.zeros_like(x)
        for e, f in enumerate(self.experts):
            t, k = torch.where(i == e)
            out.index_add_(0, t, f(x[t]) * v[t, k, None])
        return out.view_as(hidden)


class CosineRouter(nn.Module):
    """cosine similarity in a small space, with a learnt temperature"""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(H, 10, bias=False)
        self.anchors = nn.Parameter(torch.randn(8, 10))
        self.temperature = nn.Parameter(torch.tensor(0.3))
        self.experts = nn.ModuleList(glu() for _ in range(8))

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        z = F.normalize(self.project(x), dim=-1) @ F.normalize(self.anchors, dim=-1).T
        v, i = (z / self.temperature.clamp(min=0.01)).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e, f in enumerate(self.experts):
            t, k = torch.where(i == e)
            out.index_add_(0, t, f(x[t]) * v[t, k, None])
        return out.view_as(hidden)


class TwoLevels(nn.Module):
    """one of four groups, then two of its three experts; weights are products of both softmaxes"""

    def __init__(self):
        super().__init__()
        self.outer, self.inner = nn.Linear(H, 4), nn.Linear(H, 12)
        self.leaves = nn.ModuleList(glu() for _ in range(12))

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        pg, g = self.outer(x).softmax(-1).max(-1)
        inside = self.inner(x).view(-1, 4, 3)[torch.arange(len(x)), g].softmax(-1)
        v, j = inside.topk(2, -1)
        i, v = g[:, None] * 3 + j, v * pg[:, None]
        out = torch.zeros_like(x)
        for e, f in enumerate(self.leaves):
            t, k = torch.where(i == e)
            out.index_add_(0, t, f(x[t]) * v[t, k, None])
        return out.view_as(hidden)


class OneRouterForAll(nn.Module):
    """the router's last output is the shared expert's gate; experts are tuples in a plain list"""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(H, 7)
        self.tuples = [(torch.randn(I, H) * 0.2, torch.randn(H, I) * 0.2) for _ in range(6)]
        self.shared = glu()

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        z = self.router(x)
        v, i = z[:, :6].softmax(-1).topk(2)
        out = self.shared(x) * z[:, 6:].sigmoid()
        for e, (a, b) in enumerate(self.tuples):
            t, k = torch.where(i == e)
            out = out.index_add(0, t, F.silu(x[t] @ a.T) @ b.T * v[t, k, None])
        return out.view_as(hidden)


class GroupedConvolution(nn.Module):
    """all experts as one grouped convolution of width 1"""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, 4)
        self.c1 = nn.Conv1d(4 * H, 4 * I, 1, groups=4, bias=False)
        self.c2 = nn.Conv1d(4 * I, 4 * H, 1, groups=4, bias=False)

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        v, i = self.gate(x).softmax(-1).topk(2)
        w = torch.zeros(len(x), 4, dtype=x.dtype).scatter(1, i, v)
        y = self.c2(F.silu(self.c1(x.repeat(1, 4).unsqueeze(-1)))).view(-1, 4, H)
        return (y * w.unsqueeze(-1)).sum(1).view_as(hidden)


class ColumnMajor(nn.Module):
    """tokens are columns throughout"""

    def __init__(self):
        super().__init__()
        self.r = nn.Parameter(torch.randn(8, H) * 0.3)
        self.u = nn.ParameterList(nn.Parameter(torch.randn(2 * I, H) * 0.2) for _ in range(8))
        self.d = nn.ParameterList(nn.Parameter(torch.randn(H, I) * 0.2) for _ in range(8))

    def forward(self, hidden):
        c = hidden.reshape(-1, H).T.contiguous()  # [H, T]
        v, i = (self.r @ c).softmax(0).topk(2, dim=0)
        out = torch.zeros_like(c)
        for e in range(8):
            k, t = torch.where(i == e)
            up, gate = (self.u[e] @ c[:, t]).chunk(2, 0)
            out.index_add_(1, t, self.d[e] @ (F.gelu(gate) * up) * v[k, t])
        return out.T.reshape(hidden.shape)


class MaskedSelect(nn.Module):
    """masked_select and masked_scatter, one mask per expert"""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, 6, bias=False)
        self.experts = nn.ModuleList(glu() for _ in range(6))

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        p = self.gate(x).softmax(-1)
        v, i = p.topk(2)
        w = (F.one_hot(i, 6) * (v / v.sum(-1, keepdim=True)).unsqueeze(-1)).sum(1)
        total = torch.zeros_like(x)
        for f, mask, weight in zip(self.experts, (w > 0).unbind(1), w.unbind(1), strict=True):
            m = mask.unsqueeze(1)
            y = f(torch.masked_select(x, m).view(-1, H)) * torch.masked_select(weight, mask)[:, None]
            total = total + torch.zeros_like(x).masked_scatter(m, y)
        return total.view_as(hidden)


class LayerScale(nn.Module):
    """a learnt vector scales the sum of the experts, a projection mixes it"""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, 6, bias=False)
        self.experts = nn.ModuleList(glu() for _ in range(6))
        self.gamma = nn.Parameter(torch.rand(H) + 0.5)

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        v, i = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e, f in enumerate(self.experts):
            t, k = torch.where(i == e)
            out.index_add_(0, t, f(x[t]) * v[t, k, None])
        return (hidden.reshape(-1, H) + out * self.gamma).view_as(hidden)


class OutputProjection(nn.Module):
    """the sum of the experts goes through one more linear layer with a bias"""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, 6, bias=False)
        self.experts = nn.ModuleList(glu() for _ in range(6))
        self.project = nn.Linear(H, H)

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        v, i = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e, f in enumerate(self.experts):
            t, k = torch.where(i == e)
            out.index_add_(0, t, f(x[t]) * v[t, k, None])
        return self.project(out).view_as(hidden)


BLOCKS = (
    ManualSoftmax,
    LogSumExp,
    WhereMask,
    OneHotSum,
    ScatterInPlace,
    FlatSlices,
    PaddedBmm,
    ViewsInGate,
    NoisyTopK,
    ResidualCoefficient,
    UnusualActivations,
    Rearranged,
    NamedExperts,
    FunctionalExperts,
    TiedInAndOut,
    HalfPrecision,
    TokenByToken,
    SwitchTopOne,
    SortAndSplit,
    SoftplusGate,
    CosineRouter,
    TwoLevels,
    OneRouterForAll,
    GroupedConvolution,
    ColumnMajor,
    MaskedSelect,
    LayerScale,
    OutputProjection,
)

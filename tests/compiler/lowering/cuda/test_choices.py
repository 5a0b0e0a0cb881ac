"""Which kernels layers get on GPUs by the cost model's own figures, and why others are refused. Nothing is built."""

import operator

import pytest
import torch
from torch import fx

from moec.compiler.codegen.cuda_archs import ARCHITECTURES, architecture
from moec.compiler.lowering.cuda.select import site_of
from moec.compiler.lowering.select import choose, settled
from moec.passes.ir.gate import GateSpec

pytestmark = pytest.mark.null
moec = torch.ops.moec

SHAPES = {
    "mixtral": (4096, 14336, 8, 2, 0),
    "deepseek-moe-16b": (2048, 1408, 64, 6, 2),
    "qwen3-30b-a3b": (2048, 768, 128, 8, 0),
    "skywork": (4608, 12288, 16, 2, 0),
    "deepseek-v3": (7168, 2048, 256, 8, 1),
}


class Graph:
    """x -> gate_linear -> experts with weights that are nowhere: hidden, inner, experts, top k, shared experts."""

    def __init__(self, hidden, inner, num_experts, top_k, num_shared, tokens=8):
        self.graph, self.module = fx.Graph(), torch.nn.Module()
        self.x = self.value(self.graph.placeholder("x"), tokens, hidden)
        self.stacked, self.shared = num_experts + num_shared, num_shared
        self.router = self.weight("router", num_experts, hidden)
        self.stacks = (
            self.weight("up", self.stacked, 2 * inner, hidden),
            self.weight("down", self.stacked, hidden, inner),
        )
        self.spec, self.tokens, self.top_k = GateSpec(top_k, renormalise=True).encode(), tokens, top_k

    def value(self, node, *shape, dtype=torch.bfloat16):
        node.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
        return node

    def weight(self, name, *shape):
        setattr(self.module, name, torch.nn.Parameter(torch.empty(shape, device="meta", dtype=torch.bfloat16)))
        return self.value(self.graph.get_attr(name), *shape)

    def call(self, op, *args, like=None):
        node = self.graph.call_function(op, args)
        if like is not None:
            node.meta["val"] = like.meta["val"]
        return node

    def gate(self, op=moec.gate_linear.default, *args):
        """-> weights, experts; those of gate_linear on x where no arguments are given."""
        made = self.call(op, *(args or (self.x, self.router, None, None, self.spec, "float32")))
        shape = self.tokens, self.top_k
        made.meta["val"] = [torch.empty(shape, dtype=d, device="meta") for d in (torch.float32, torch.int32)]
        parts = [self.call(operator.getitem, made, i) for i in range(2)]
        for part, val in zip(parts, made.meta["val"], strict=True):
            part.meta["val"] = val
        return parts

    def experts(self, weights, experts, on_input=False, x=None):
        more = (*self.stacks, None, None, None, "silu", self.shared, on_input)
        return self.call(moec.experts.default, x or self.x, weights, experts, *more, like=self.x)

    def choices(self, arch, *outputs):
        """By op, after kernels that do two sites' work have settled who does what."""
        self.graph.output(outputs)
        fx.GraphModule(self.module, self.graph)
        sites = {n: site_of(n, architecture(arch)) for n in self.graph.nodes if n.op == "call_function"}
        chosen = settled({n: choose(site) for n, site in sites.items() if site})
        return {str(n.target).split(".")[1]: choice for n, choice in chosen.items()}


def ranges(choice):
    return [(limit, c.name) for limit, c in choice.variants]


def reason(choice, kernel):
    return next(r["reason"] for r in choice.record()["rejected"] if r["kernel"] == kernel)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_few_tokens_go_in_one_launch_and_no_layer_waits_for_the_host(shape, arch, real_predictions):
    graph = Graph(*SHAPES[shape])
    found = graph.choices(arch, graph.experts(*graph.gate()))
    gate, experts = ranges(found["gate_linear"]), ranges(found["experts"])
    assert gate[0] == experts[0] == (16, "cuda-moe-decode")
    assert gate[-1] == (None, "linear+cuda-gate") and experts[-1] == (None, "cuda-experts-large")
    assert reason(found["experts"], "library-experts") == "the host would wait for the device, no graphs"


def test_a_wide_router_is_read_once_for_all_tokens(real_predictions):
    """256 experts of 7168: 64 tokens would each read 3.7 MB from the cache; 64 experts of 2048: a 14th of that."""
    found = {}
    for shape in ("deepseek-moe-16b", "deepseek-v3"):
        graph = Graph(*SHAPES[shape])
        found[shape] = graph.choices("sm_90a", graph.experts(*graph.gate()))["gate_linear"]
    assert ranges(found["deepseek-moe-16b"])[1] == (64, "cuda-gate-linear")
    assert "cuda-gate-linear" not in dict(ranges(found["deepseek-v3"])).values()
    assert reason(found["deepseek-v3"], "cuda-gate-linear").startswith("predicted ")


def test_what_one_launch_cannot_do_is_said(real_predictions):
    small = (128, 64, 6, 2, 1)

    def scaled(graph):
        weights, experts = graph.gate()
        return graph.experts(graph.call(torch.ops.aten.mul.Tensor, weights, 2.0, like=weights), experts)

    def other_x(graph):
        return graph.experts(*graph.gate(), x=graph.call(torch.ops.aten.neg.default, graph.x, like=graph.x))

    def logits_from_elsewhere(graph):
        logits = graph.value(graph.graph.placeholder("logits"), graph.tokens, 6, dtype=torch.float32)
        return graph.experts(*graph.gate(moec.gate.default, logits, None, graph.spec))

    for build, expected in (
        (scaled, "the weights of the routing do not come from a gate as they are"),
        (other_x, "the router reads another x than the experts"),
        (logits_from_elsewhere, "the router is no linear layer with its gate behind it"),
        (lambda g: g.experts(*g.gate(), True), "the weights of the routing are applied to the input"),
        (lambda g: g.experts(*g.gate()[::-1]), "the weights of the routing do not come from a gate as they are"),
    ):
        graph = Graph(*small)
        choice = graph.choices("sm_80", build(graph))["experts"]
        assert reason(choice, "cuda-moe-decode") == expected
    graph = Graph(*small)
    weights, experts = graph.gate()
    choice = graph.choices("sm_80", graph.experts(weights, experts), weights)["experts"]
    assert reason(choice, "cuda-moe-decode") == "the routing is read elsewhere too"
    graph = Graph(128, 64, 1100, 2, 0)
    found = graph.choices("sm_80", graph.experts(*graph.gate()))
    assert reason(found["experts"], "cuda-moe-decode") == "1100 experts with top 2; at most 1024 and 32"

"""What the passes make of expert layers is what lowering finds again as one layer: the two spell the chain apart."""

import pytest
import torch
from torch import nn

from moec.compiler import api
from moec.compiler.options import CompileOptions
from moec.passes.ir import ops
from moec.passes.ir.gate import GateSpec

pytestmark = pytest.mark.null
SPEC = GateSpec(2, renormalise=True).encode()
COMBINE = torch.ops.moec.combine_gemm.default


class Layer(nn.Module):
    """A router and its experts; shared: how many every token sees, by what weight."""

    def __init__(self, shared=0, weighted=False, on_input=False, biased=False):
        super().__init__()
        self.shared, self.weighted, self.on_input = shared, weighted, on_input
        shapes = {"router": (6, 32), "up": (6 + shared, 32, 32), "down": (6 + shared, 32, 16), "column": (32,)}
        shapes |= {"b_up": (6 + shared, 32), "b_down": (6 + shared, 32)} if biased else {}
        self.b_up = self.b_down = None
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape), requires_grad=False))

    def forward(self, x):
        weights, experts = ops.gate_linear(x, self.router, None, None, SPEC, "float32")
        factor = torch.sigmoid(x @ self.column) if self.weighted else None
        stacks = self.up, self.down, self.b_up, self.b_down
        return ops.experts(x, weights, experts, *stacks, factor, "silu", self.shared, self.on_input)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"biased": True},
        {"on_input": True},
        {"shared": 1},
        {"shared": 2},
        {"shared": 1, "weighted": True},
        {"shared": 2, "weighted": True},
    ],
    ids=str,
)
def test_a_layer_is_found_again(options):
    module, compile_options = Layer(**options), CompileOptions.of("cpu:avx2", None, "off", None)
    captured = api.capture_as(module, [torch.randn(5, 32)], None, None, compile_options)
    captured, _, lowered = api.lowered_of(captured, compile_options, api.quiet)
    assert captured.graph_module.graph.find_nodes(op="call_function", target=COMBINE), "the passes made no chain"
    assert [c.kernels[0].name for c in lowered.choices if c.site.node.target is COMBINE] == ["experts-avx2"]
    left = {s.name for s in lowered.program.steps if s.kind == "library"}
    assert not left & {"dispatch", "grouped_gemm", "combine_gemm"}

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import model_of

from moec.compiler.capture import capture
from moec.compiler.errors import CompileError, UnsupportedModel
from moec.passes.ir.evaluate import evaluate
from moec.passes.ir.weights import weights_of

pytestmark = pytest.mark.null


class Moe(nn.Module):
    """A dense-masked block in plain PyTorch."""

    def __init__(self, hidden=16, experts=4, inner=24, top_k=2):
        super().__init__()
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.w1 = nn.Parameter(torch.randn(experts, 2 * inner, hidden) * 0.2)
        self.w2 = nn.Parameter(torch.randn(experts, hidden, inner) * 0.2)
        self.register_buffer("scale", torch.tensor([1.5]), persistent=False)
        self.top_k = top_k

    def forward(self, x):
        flat = x.view(-1, x.shape[-1])
        scores = self.gate(flat).softmax(-1)
        weights, index = scores.topk(self.top_k)
        weights /= weights.sum(-1, keepdim=True)
        gate, up = torch.einsum("th,efh->tef", flat, self.w1).chunk(2, -1)
        each = torch.einsum("tef,ehf->teh", F.silu(gate) * up, self.w2)
        combine = torch.zeros_like(scores).scatter_(1, index, weights)
        return ((each * combine[..., None]).sum(1) * self.scale + torch.tensor(0.25)).view(x.shape)


@pytest.mark.parametrize("shape", [(5, 16), (2, 6, 16), (1, 6, 16), (4, 4, 16)])
def test_any_leading_dimensions(shape):
    module = Moe()
    captured = capture(module, (torch.randn(shape),))
    for lead in ((1,) * (len(shape) - 1), (0,) * (len(shape) - 1), (3, 8)[: len(shape) - 1]):
        x = torch.randn(*lead, 16)
        with torch.no_grad():
            expected = module(x)
        torch.testing.assert_close(evaluate(captured.graph_module, [x], captured.read), expected)


def test_weights_are_by_name_and_values_are_live():
    module = Moe()
    captured = capture(module, (torch.randn(5, 16),))
    assert {"gate_weight", "w1", "w2", "scale"} <= set(weights_of(captured.graph_module))
    assert torch.equal(captured.read("gate.weight"), module.gate.weight)
    assert captured.kind == "module"
    assert captured.info.model_type == "Moe"
    assert list(captured.symbols.values()) == ["T"]


def test_a_branch_on_one_token_is_refused():
    class Branch(nn.Module):
        def forward(self, x):
            return x + 100 if x.shape[0] == 1 else x + 1

    with pytest.raises(UnsupportedModel, match="T = 1"):
        capture(Branch(), (torch.randn(5, 2),))


def test_a_branch_on_another_size_is_refused():
    class Branch(nn.Module):
        def forward(self, x):
            return x + 100 if x.shape[0] == 3 else x + 1

    with pytest.raises(UnsupportedModel, match="some size of a token dimension specially"):
        capture(Branch(), (torch.randn(5, 2),))


def test_random_numbers_are_refused():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    with pytest.raises(UnsupportedModel, match="random numbers"):
        capture(Noise(), (torch.randn(5, 2),))


def test_a_loop_over_data_is_refused():
    class Loop(nn.Module):
        def forward(self, x):
            for e in x.argmax(-1).tolist():
                x = x + e
            return x

    with pytest.raises(UnsupportedModel, match="Loop cannot be traced"):
        capture(Loop(), (torch.randn(5, 2),))


def test_dropout_is_off_and_the_modes_are_put_back():
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    module[1].eval()
    captured = capture(module, (torch.randn(5, 4),))
    assert (module.training, module[0].training, module[1].training) == (True, True, False)
    assert [str(n.target) for n in captured.graph_module.graph.nodes if n.op == "call_function"] == [
        "aten.linear.default"
    ]


def test_several_inputs_share_a_dimension():
    class Scaled(nn.Module):
        def forward(self, x, tokens, factor):
            return x * factor + tokens[:, None]

    captured = capture(Scaled(), (torch.randn(5, 4), torch.arange(5), 2.0))
    names = [n.name for n in captured.graph_module.graph.find_nodes(op="placeholder")]
    assert names == ["x", "tokens"]
    assert list(captured.symbols.values()) == ["T"]


def test_a_square_input_whose_sizes_are_one():
    class Mixed(nn.Module):
        def forward(self, x, mask):
            return mask.to(x.dtype) @ x

    captured = capture(Mixed(), (torch.randn(5, 4), torch.ones(5, 5, dtype=torch.bool)))
    assert list(captured.symbols.values()) == ["T"]


def test_several_outputs():
    class Two(nn.Module):
        def forward(self, x):
            return {"sum": x.sum(-1), "double": x * 2}

    captured = capture(Two(), (torch.randn(5, 4),))
    total, double = evaluate(captured.graph_module, [torch.ones(3, 4)], captured.read)
    assert total.tolist() == [4.0, 4.0, 4.0]
    assert double.shape == (3, 4)


def test_a_block_of_transformers_gets_the_experts_op():
    block = model_of("qwen2_moe").model.layers[0].mlp
    captured = capture(block, (torch.randn(2, 5, 32),))
    assert captured.graph_module.graph.find_nodes(op="call_function", target=torch.ops.moec.experts.default)


def test_example_inputs_are_needed():
    with pytest.raises(CompileError, match="give example_inputs"):
        capture(Moe())


def test_an_input_that_is_no_tensor():
    with pytest.raises(CompileError, match="example input x: expected a tensor or a constant, got a object"):
        capture(Moe(), (object(),))


def test_something_else():
    with pytest.raises(CompileError, match=r"expected a model directory or a torch\.nn\.Module, got a int"):
        capture(3)


def test_directory_options_do_not_apply_to_modules():
    with pytest.raises(CompileError, match="model directories only"):
        capture(Moe(), (torch.randn(5, 16),), layers=1)


def test_a_branch_on_a_value_is_refused():
    class Choice(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(UnsupportedModel, match="Choice cannot be traced: its code depends on the values"):
        capture(Choice(), (torch.randn(5, 2),))

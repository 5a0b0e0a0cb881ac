"""Every operator of the table against ONNX Runtime, as tensors; sizes on the host, through shape arithmetic."""

from __future__ import annotations

import numpy as np
import onnx_files as files
import pytest
import torch
from onnx import helper

from moec.compiler.capture.onnx.code import write_module
from moec.compiler.capture.onnx.examples import given_inputs
from moec.compiler.capture.onnx.file import read_graph
from moec.compiler.capture.onnx.observe import check_operators, inline_branches, observe
from moec.compiler.capture.onnx.prepare import prepare
from moec.compiler.capture.onnx.table import TABLE

TOLERANCE = 2e-6  # a few roundings of float32: sums in another order, exp and erf of another library
rng = np.random.default_rng(7)
X = rng.standard_normal((3, 4, 6)).astype(np.float32)
Y = rng.standard_normal((3, 4, 6)).astype(np.float32)
P = np.abs(X) + 0.1
M = rng.standard_normal((6, 5)).astype(np.float32)
N = rng.integers(-9, 9, (3, 4)).astype(np.int64)
I = rng.integers(0, 4, (3, 2)).astype(np.int64)
B = X > 0
ROW = rng.standard_normal(6).astype(np.float32)
Q, K, V = (rng.standard_normal((2, h, 3, 8)).astype(np.float32) for h in (4, 2, 2))


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


UNARY = (
    *("Abs", "Ceil", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu"),
    *("Neg", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Softplus", "Swish", "Tan", "Tanh", "IsNaN", "IsInf"),
    *("LogSoftmax", "Softmax", "Transpose", "Size"),
)
BINARY = ("Add", "Sub", "Mul", "Div", "Equal", "Less", "LessOrEqual", "Max", "Min", "Sum", "Mean")
CODES, SHIFTS = np.arange(24, dtype=np.uint8).reshape(4, 6), np.arange(6, dtype=np.uint8)
SEEN = np.array([[True, False, True], [True, True, False], [False, True, True]])
REDUCED = ["L1", "L2", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare", "LogSumExp"]
ADDED = {"axis": 1, "reduction": "add"}
# operator, operands, attributes; operands in a tuple are constants of the file
CASES = [
    *((op, [X], {}) for op in UNARY),
    *((op, [P], {}) for op in ("Log", "Reciprocal", "Sqrt")),
    *((op, [X, Y], {}) for op in BINARY),
    *((op, [X, (ROW,)], {}) for op in ("Greater", "GreaterOrEqual")),
    *((op, [B, ~B], {}) for op in ("And", "Or", "Xor")),
    ("Not", [B], {}),
    ("Div", [N, (ints(4),)], {}),
    ("Mod", [N, (ints(4),)], {}),
    ("Mod", [X, (ROW,)], {"fmod": 1}),
    ("Pow", [P, (np.float32(2.5).reshape(()),)], {}),
    ("Pow", [X, (ints(2),)], {}),
    ("Clip", [X, (np.float32(-0.5).reshape(()),), (np.float32(0.5).reshape(()),)], {}),
    ("Cast", [X], {"to": 7}),
    ("CastLike", [N, (X,)], {}),
    ("Where", [B, X, (ROW,)], {}),
    ("Gelu", [X], {"approximate": "tanh"}),
    ("Swish", [X], {"alpha": 1.5}),
    ("Dropout", [X], {}),
    ("Shape", [X], {"start": 1}),
    ("Reshape", [X, (ints(0, -1, 2),)], {}),
    ("Flatten", [X], {"axis": 2}),
    ("Flatten", [X], {"axis": 1}),
    ("Squeeze", [X[:1], (ints(0),)], {}),
    ("Unsqueeze", [X, (ints(0, -1),)], {}),
    ("Transpose", [X], {"perm": [2, 0, 1]}),
    ("Concat", [X, (Y,)], {"axis": -1}),
    ("Split", [X, (ints(1, 5),)], {"axis": -1}),
    ("Split", [X], {"axis": -1, "num_outputs": 2}),
    ("Slice", [X, (ints(1, 0),), (ints(9, 3),), (ints(2, 0),), (ints(2, 1),)], {}),
    ("Slice", [X, (ints(-1),), (ints(-(2**63)),), (ints(2),), (ints(-1),)], {}),
    ("Expand", [X[:, :1], (ints(2, 1, 5, 1),)], {}),
    ("Tile", [X, (ints(1, 2, 1),)], {}),
    ("Pad", [X, (ints(1, 2),), (np.float32(3).reshape(()),), (ints(1),)], {}),
    ("ConstantOfShape", [ints(2, 3)], {}),
    ("Range", [(ints(2).reshape(()),), (ints(9).reshape(()),), ints(3).reshape(())], {}),
    ("Gather", [X, I], {"axis": 1}),
    ("Gather", [X, (ints(-1).reshape(()),)], {"axis": 2}),
    ("Gather", [(M,), I], {}),
    ("GatherElements", [X[:, :, 0], I], {"axis": 1}),
    ("GatherND", [X, (np.array([[0, 1], [2, 3]]),)], {}),
    ("ScatterElements", [X[:, :, 0], (np.array([[0, 1], [2, 3], [1, 3]]),), Y[:, :2, 0]], {"axis": 1}),
    ("ScatterElements", [X[:, :, 0], (np.array([[1, 1], [2, 3], [1, 3]]),), Y[:, :2, 0]], ADDED),
    ("ScatterND", [X, (np.array([[0], [2]]),), Y[:2]], {}),
    ("ScatterND", [X, (np.array([[2], [2]]),), Y[:2]], {"reduction": "add"}),
    ("NonZero", [B], {}),
    ("OneHot", [I, (ints(4),), (np.array([0, 1]),)], {}),
    ("OneHot", [I - 2, (ints(4),), (np.array([-1.5, 2.0], dtype=np.float32),)], {"axis": 0}),
    ("TopK", [X, (ints(3),)], {"axis": -1}),
    ("TopK", [X, (ints(2),)], {"axis": 1, "largest": 0}),
    ("ArgMax", [X], {"axis": 1, "keepdims": 0}),
    ("ArgMin", [X], {"axis": -1}),
    ("Trilu", [X], {"upper": 0}),
    ("Trilu", [X, (ints(1).reshape(()),)], {}),
    ("CumSum", [X, (ints(1).reshape(()),)], {"reverse": 1, "exclusive": 1}),
    ("MatMul", [X, (M,)], {}),
    ("MatMul", [X, Y.transpose(0, 2, 1).copy()], {}),
    ("Gemm", [X[0], (M,), (ROW[:5],)], {}),
    ("Gemm", [X[0], (M.T.copy(),), (ROW[:5],)], {"transB": 1}),
    ("Gemm", [X[0].T.copy(), (M.T.copy(),), (ROW[:5],)], {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Einsum", [X, (M,)], {"equation": "bth,ho->bto"}),
    ("LayerNormalization", [X, (ROW,), (ROW,)], {"epsilon": 1e-3}),
    ("RMSNormalization", [X, (ROW,)], {"epsilon": 1e-3}),
    *((f"Reduce{kind}", [X, (ints(1, -1),)], {}) for kind in REDUCED),
    ("ReduceSum", [X], {"keepdims": 0}),
    ("DequantizeLinear", [CODES, (np.abs(ROW),), (SHIFTS,)], {"axis": 1}),
    ("Attention", [Q, K, V], {"is_causal": 1}),
    ("Attention", [Q, K, V, (SEEN,)], {"softcap": 5.0, "scale": 0.3}),
    ("RotaryEmbedding", [Q, (M[:3, :4],), (M[3:, :4],), (np.array([[0, 1, 2], [2, 0, 1]]),)], {}),
    ("com.microsoft.FastGelu", [X, (ROW,)], {}),
    ("com.microsoft.BiasGelu", [X, (ROW,)], {}),
    ("com.microsoft.Gelu", [X], {}),
    ("com.microsoft.QuickGelu", [X], {"alpha": 1.5}),
    ("SimplifiedLayerNormalization", [X, (ROW,)], {"epsilon": 1e-3}),
    ("com.microsoft.SkipSimplifiedLayerNormalization", [X, Y, (ROW,)], {"epsilon": 1e-3}),
    ("com.microsoft.SkipLayerNormalization", [X, Y, (ROW,), (ROW,)], {"epsilon": 1e-3}),
]  # fmt: skip
RESULTS = {"Split": 2, "TopK": 2}
NEWEST = {"Swish": 24, "Attention": 23, "RMSNormalization": 23, "RotaryEmbedding": 23}
ELSEWHERE = {
    "com.microsoft.MoE",  # test_microsoft.py
    "ConcatFromSequence",  # below
    "SequenceAt",
    "SequenceConstruct",
    "SplitToSequence",
    "moec.linear",  # MatMul and Gemm become it
    "com.microsoft.SimplifiedLayerNormalization",  # the same function as without the domain
}


def build(path, op, operands, attributes):
    inputs, constants, names = [], {}, []
    for i, operand in enumerate(operands):
        names.append(f"i{i}")
        if isinstance(operand, tuple):
            constants[f"i{i}"] = operand[0]
        else:
            inputs.append((files.port(f"i{i}", str(operand.dtype), list(operand.shape)), operand))
    *domain, kind = op.rsplit(".", 1)
    outputs = [f"o{i}" for i in range(RESULTS.get(op, 1))]
    node = helper.make_node(kind, names, outputs, domain=".".join(domain), **attributes)
    files.write(path, [node], [p for p, _ in inputs], outputs, constants, NEWEST.get(op, 21))
    return [v for _, v in inputs]


def results(path, values):
    """What the written module gives, as arrays."""
    graph = prepare(read_graph(path)).graph
    check_operators(graph)
    given = given_inputs(graph, [torch.from_numpy(np.array(v)) for v in values])
    graph = inline_branches(graph, [observe(graph, given)])
    found = write_module(graph, []).module(*given.values())
    return [np.asarray(f) for f in (found if isinstance(found, tuple) else (found,))]


@pytest.mark.parametrize(("op", "operands", "attributes"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_an_operator_gives_what_onnx_runtime_gives(tmp_path, op, operands, attributes):
    values = build(tmp_path / "op.onnx", op, operands, attributes)
    expected = files.run(tmp_path / "op.onnx", *values)
    for found, wanted in zip(results(tmp_path / "op.onnx", values), expected, strict=True):
        if wanted.dtype.kind == "f":
            assert files.relative_error(found, wanted) <= TOLERANCE
        else:
            assert found.tolist() == wanted.tolist()


def test_every_operator_of_the_table_has_a_case():
    assert {c[0] for c in CASES} | ELSEWHERE == set(TABLE)


def test_sizes_are_computed_on_the_host(tmp_path):
    """Shape, Gather, arithmetic, Where and Concat of sizes, as exporters write them around Reshape and Expand."""
    node = helper.make_node
    nodes = [
        node("Shape", ["x"], ["shape"]),
        node("Gather", ["shape", "zero"], ["b"]),
        node("Gather", ["shape", "one"], ["t"]),
        node("Mul", ["b", "t"], ["rows"]),
        node("Unsqueeze", ["rows", "at"], ["rows_list"]),
        node("Concat", ["rows_list", "minus"], ["wanted"], axis=0),
        node("Reshape", ["x", "wanted"], ["flat"]),
        node("Equal", ["wanted", "minus"], ["is_open"]),
        node("Where", ["is_open", "six", "wanted"], ["closed"]),
        node("ConstantOfShape", ["closed"], ["zeros"]),
        node("Add", ["flat", "zeros"], ["y"]),
        node("Div", ["rows", "two"], ["half"]),
        node("Range", ["zero", "half", "one"], ["places"]),
        node("SplitToSequence", ["y", "two"], ["parts"], axis=1),
        node("SequenceAt", ["parts", "one"], ["part"]),
        node("SequenceConstruct", ["part", "part"], ["again"]),
        node("ConcatFromSequence", ["again"], ["z"], axis=0),
    ]
    constants = {
        "zero": np.array(0),
        "one": np.array(1),
        "two": np.array(2),
        "at": ints(0),
        "minus": ints(-1),
        "six": ints(6),
    }
    files.write(tmp_path / "s.onnx", nodes, [files.port("x", "float32", [3, 4, 6])], ["y", "places", "z"], constants)
    found = results(tmp_path / "s.onnx", [X])
    for a, b in zip(found, files.run(tmp_path / "s.onnx", X), strict=True):
        assert np.array_equal(a, b)


def test_a_branch_on_a_size_is_taken(tmp_path):
    """If with a condition that follows from a static size, as the classic exporter writes for squeeze."""
    node = helper.make_node
    then = helper.make_graph([node("Mul", ["x", "x"], ["a"])], "t", [], [helper.make_empty_tensor_value_info("a")])
    other = helper.make_graph([node("Identity", ["x"], ["b"])], "e", [], [helper.make_empty_tensor_value_info("b")])
    nodes = [
        node("Shape", ["x"], ["shape"]),
        node("Gather", ["shape", "last"], ["width"]),
        node("Equal", ["width", "six"], ["is_six"]),
        node("If", ["is_six"], ["y"], then_branch=then, else_branch=other),
    ]
    constants = {"last": np.array(2), "six": np.array(6)}
    files.write(tmp_path / "i.onnx", nodes, [files.port("x", "float32", [3, 4, 6])], ["y"], constants)
    assert np.array_equal(results(tmp_path / "i.onnx", [X])[0], X * X)

"""ATen operators in standard ONNX operators: a table from the overload to a function of (values, node, *arguments).

What is not in the table is refused by name. Arithmetic is done in the dtype of the result, comparisons in the dtype
that torch promotes to.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from moec.compiler.export.onnx.shapes import SHAPES
from moec.compiler.export.onnx.values import Values, axis, dtype_of

aten = torch.ops.aten
Translation = Callable[..., Any]


def _unary(*names: str) -> Translation:
    """ONNX operators in turn."""

    def emit(v: Values, node: Node, x: Node) -> ir.Value:
        value = v.tensor(x, dtype_of(node))
        for name in names:
            value = v.b.op(name, value)
        return value

    return emit


def _binary(name: str, swapped: bool = False) -> Translation:
    def emit(v: Values, node: Node, x: Any, y: Any, alpha: Any = 1) -> ir.Value:
        dtype = dtype_of(node)
        a, c = v.tensor(x, dtype), v.tensor(y, dtype)
        if alpha != 1:
            c = v.b.op("Mul", c, v.b.number(alpha, dtype))
        return v.b.op(name, c, a) if swapped else v.b.op(name, a, c)

    return emit


def _promoted(*args: Any) -> torch.dtype:
    """What torch compares these in."""
    values = [a.meta["val"] if isinstance(a, Node) else a for a in args]
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    plain = [torch.empty(0 if t.dim() else (), dtype=t.dtype, device="meta") for t in tensors]
    numbers = [1 if isinstance(v, torch.SymInt) else v for v in values if not isinstance(v, torch.Tensor)]
    both: list[Any] = [*plain, *numbers]
    return torch.result_type(both[0], both[1])


def _comparison(name: str, negated: bool = False) -> Translation:
    def emit(v: Values, node: Node, x: Any, y: Any) -> ir.Value:
        dtype = _promoted(x, y)
        if dtype is torch.bool and name != "Equal":
            dtype = torch.int32
        result = v.b.op(name, v.tensor(x, dtype), v.tensor(y, dtype))
        return v.b.op("Not", result) if negated else result

    return emit


def _logical(name: str) -> Translation:
    return lambda v, node, x, y: v.b.op(name, v.tensor(x, torch.bool), v.tensor(y, torch.bool))


def _bitwise(logical: str, bitwise: str) -> Translation:
    def emit(v: Values, node: Node, x: Any, y: Any) -> ir.Value:
        dtype = dtype_of(node)
        return v.b.op(logical if dtype is torch.bool else bitwise, v.tensor(x, dtype), v.tensor(y, dtype))

    return emit


def _cast(v: Values, node: Node, x: Node, *_: Any, **__: Any) -> ir.Value:
    return v.tensor(x, dtype_of(node))


def _silu(v: Values, node: Node, x: Node) -> ir.Value:
    value = v.tensor(x)
    return v.b.op("Mul", value, v.b.op("Sigmoid", value))


def _gelu(v: Values, node: Node, x: Node, approximate: str = "none") -> ir.Value:
    return v.b.op("Gelu", v.tensor(x), approximate=approximate)


def _softplus(v: Values, node: Node, x: Node, beta: float = 1, threshold: float = 20) -> ir.Value:
    dtype, value = dtype_of(node), v.tensor(x)
    scaled = value if beta == 1 else v.b.op("Mul", value, v.b.number(beta, dtype))
    soft = v.b.op("Softplus", scaled)
    soft = soft if beta == 1 else v.b.op("Div", soft, v.b.number(beta, dtype))
    return v.b.op("Where", v.b.op("Greater", scaled, v.b.number(threshold, dtype)), value, soft)


def _log1p(v: Values, node: Node, x: Node) -> ir.Value:
    dtype = dtype_of(node)
    return v.b.op("Log", v.b.op("Add", v.tensor(x, dtype), v.b.number(1, dtype)))


def _power(v: Values, node: Node, x: Any, y: Any) -> ir.Value:
    dtype = dtype_of(node)
    if y == 2:
        value = v.tensor(x, dtype)
        return v.b.op("Mul", value, value)
    return v.b.op("Pow", v.tensor(x, dtype), v.tensor(y, dtype))


def _divide(v: Values, node: Node, x: Any, y: Any, *, rounding_mode: str | None = None) -> ir.Value:
    dtype = dtype_of(node)
    if rounding_mode == "floor":
        return _floor_divide(v, node, x, y)
    quotient = v.b.op("Div", v.tensor(x, dtype), v.tensor(y, dtype))  # of integers: towards zero
    if rounding_mode is None or not dtype.is_floating_point:
        return quotient
    return v.b.op("Mul", v.b.op("Floor", v.b.op("Abs", quotient)), v.b.op("Sign", quotient))


def _floor_divide(v: Values, node: Node, x: Any, y: Any) -> ir.Value:
    """Div of integers goes towards zero: one less where the signs differ and something is left."""
    b, dtype = v.b, dtype_of(node)
    a, c = v.tensor(x, dtype), v.tensor(y, dtype)
    quotient = b.op("Div", a, c)
    if dtype.is_floating_point:
        return b.op("Floor", quotient)
    rest = b.op("Sub", a, b.op("Mul", quotient, c))
    zero = b.number(0, dtype)
    negative = b.op("Less", b.op("Mul", rest, c), zero)
    return b.op("Sub", quotient, b.cast(negative, dtype))


def _remainder(v: Values, node: Node, x: Any, y: Any) -> ir.Value:
    dtype = dtype_of(node)
    a, c = v.tensor(x, dtype), v.tensor(y, dtype)
    if not dtype.is_floating_point:
        return v.b.op("Mod", a, c)
    return v.b.op("Sub", a, v.b.op("Mul", v.b.op("Floor", v.b.op("Div", a, c)), c))


def _clamp(v: Values, node: Node, x: Node, min: Any = None, max: Any = None) -> ir.Value:
    dtype = dtype_of(node)
    value = v.tensor(x, dtype)
    if min is not None:
        value = v.b.op("Max", value, v.tensor(min, dtype))
    return value if max is None else v.b.op("Min", value, v.tensor(max, dtype))


def _where(v: Values, node: Node, condition: Node, x: Any, y: Any) -> ir.Value:
    dtype = dtype_of(node)
    return v.b.op("Where", v.tensor(condition, torch.bool), v.tensor(x, dtype), v.tensor(y, dtype))


def _masked_fill(v: Values, node: Node, x: Node, mask: Node, value: Any) -> ir.Value:
    return _where(v, node, mask, value, x)


def _softmax(v: Values, node: Node, x: Node, dim: int, dtype: Any = None) -> ir.Value:
    given = v.tensor(x, dtype_of(node))
    return v.b.op("Softmax", given, axis=axis(node, dim))


def _log_softmax(v: Values, node: Node, x: Node, dim: int, dtype: Any = None) -> ir.Value:
    return v.b.op("LogSoftmax", v.tensor(x, dtype_of(node)), axis=axis(node, dim))


def _reduce(name: str) -> Translation:
    def emit(v: Values, node: Node, x: Node, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> ir.Value:
        dims = [] if dim is None else [dim] if isinstance(dim, int) else list(dim)
        axes = v.b.ints(*(axis(x, d) for d in dims)) if dims else None
        return v.b.op(name, v.tensor(x, dtype_of(node)), axes, keepdims=int(keepdim))

    return emit


def _any(v: Values, node: Node, x: Node, dim: Any = None, keepdim: bool = False) -> ir.Value:
    axes = None if dim is None else v.b.ints(axis(x, dim))
    found = v.b.op("ReduceMax", v.b.cast(v.tensor(x, torch.bool), torch.int32), axes, keepdims=int(keepdim))
    return v.b.cast(found, torch.bool)


def _linear(v: Values, node: Node, x: Node, w: Node, bias: Node | None = None) -> ir.Value:
    y = v.b.op("MatMul", v.tensor(x), v.transposed(w))
    return y if bias is None else v.b.op("Add", y, v.tensor(bias))


def _matmul(v: Values, node: Node, x: Node, y: Node) -> ir.Value:
    return v.b.op("MatMul", v.tensor(x), v.tensor(y))


def _addmm(v: Values, node: Node, bias: Node, x: Node, y: Node) -> ir.Value:
    return v.b.op("Add", v.b.op("MatMul", v.tensor(x), v.tensor(y)), v.tensor(bias))


def _einsum(v: Values, node: Node, equation: str, operands: Sequence[Node], **_: Any) -> ir.Value:
    return v.b.op("Einsum", *(v.tensor(x) for x in operands), equation=equation)


def _topk(v: Values, node: Node, x: Node, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    return v.b.many("TopK", 2, v.tensor(x), v.b.ints(k), axis=axis(x, dim), largest=int(largest), sorted=1)


def _sort(v: Values, node: Node, x: Node, *, dim: int = -1, descending: bool = False, **_: Any) -> Any:
    """TopK over all; of equal values it, too, puts the lower index first."""
    at = axis(x, dim)
    return v.b.many("TopK", 2, v.tensor(x), v.b.size(v.tensor(x), at), axis=at, largest=int(descending), sorted=1)


def _sort_default(v: Values, node: Node, x: Node, dim: int = -1, descending: bool = False) -> Any:
    return _sort(v, node, x, dim=dim, descending=descending)


def _argmax(v: Values, node: Node, x: Node, dim: int = -1, keepdim: bool = False) -> ir.Value:
    return v.b.op("ArgMax", v.tensor(x), axis=axis(x, dim), keepdims=int(keepdim))


def _max_dim(v: Values, node: Node, x: Node, dim: int, keepdim: bool = False) -> tuple[ir.Value, ir.Value]:
    at = axis(x, dim)
    best = v.b.op("ReduceMax", v.tensor(x), v.b.ints(at), keepdims=int(keepdim))
    return best, v.b.op("ArgMax", v.tensor(x), axis=at, keepdims=int(keepdim))


def _cumsum(v: Values, node: Node, x: Node, dim: int, *, dtype: Any = None) -> ir.Value:
    return v.b.op("CumSum", v.tensor(x, dtype_of(node)), v.b.number(axis(x, dim), torch.int64))


def _layer_norm(
    v: Values,
    node: Node,
    x: Node,
    shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> ir.Value:
    scale = v.optional(weight)
    if scale is None:
        scale = v.b.op("Expand", v.b.number(1.0, dtype_of(node)), v.b.ints(*shape))
    return v.b.op("LayerNormalization", v.tensor(x), scale, v.optional(bias), axis=-len(shape), epsilon=eps)


def _pair(name: str) -> Translation:
    """Of two sizes: Python's own operators, on i64[1]."""
    return lambda v, node, x, y: v.b.op(name, _size(v, x), _size(v, y))


def _size(v: Values, arg: Any) -> ir.Value:
    return v.of[arg] if isinstance(arg, Node) else v.b.ints(int(arg))


ARITHMETIC: dict[Any, Translation] = {
    aten.add.Tensor: _binary("Add"), aten.add.Scalar: _binary("Add"),
    aten.sub.Tensor: _binary("Sub"), aten.sub.Scalar: _binary("Sub"),
    aten.rsub.Scalar: _binary("Sub", swapped=True), aten.rsub.Tensor: _binary("Sub", swapped=True),
    aten.mul.Tensor: _binary("Mul"), aten.mul.Scalar: _binary("Mul"),
    aten.div.Tensor: _divide, aten.div.Scalar: _divide,
    aten.div.Tensor_mode: _divide, aten.div.Scalar_mode: _divide,
    aten.floor_divide.default: _floor_divide,
    aten.remainder.Scalar: _remainder, aten.remainder.Tensor: _remainder,
    aten.pow.Tensor_Scalar: _power, aten.pow.Tensor_Tensor: _power, aten.pow.Scalar: _power,
    aten.maximum.default: _binary("Max"), aten.minimum.default: _binary("Min"),
    aten.neg.default: _unary("Neg"), aten.abs.default: _unary("Abs"), aten.exp.default: _unary("Exp"),
    aten.log.default: _unary("Log"), aten.sqrt.default: _unary("Sqrt"),
    aten.log1p.default: _log1p,
    aten.rsqrt.default: _unary("Sqrt", "Reciprocal"),
    aten.reciprocal.default: _unary("Reciprocal"), aten.sin.default: _unary("Sin"), aten.cos.default: _unary("Cos"),
    aten.tanh.default: _unary("Tanh"), aten.sigmoid.default: _unary("Sigmoid"), aten.relu.default: _unary("Relu"),
    aten.erf.default: _unary("Erf"), aten.floor.default: _unary("Floor"), aten.ceil.default: _unary("Ceil"),
    aten.round.default: _unary("Round"), aten.sign.default: _unary("Sign"),
    aten.silu.default: _silu, aten.gelu.default: _gelu, aten.softplus.default: _softplus,
    aten.clamp.default: _clamp, aten.clamp.Tensor: _clamp, aten.clamp_min.default: _clamp,
    aten.clamp_max.default: lambda v, node, x, most: _clamp(v, node, x, max=most),
    operator.add: _pair("Add"), operator.sub: _pair("Sub"), operator.mul: _pair("Mul"), operator.floordiv: _pair("Div"),
}  # fmt: skip

COMPARISONS: dict[Any, Translation] = {
    getattr(getattr(aten, name), overload): _comparison(onnx, negated)
    for name, onnx, negated in (
        ("eq", "Equal", False), ("ne", "Equal", True), ("lt", "Less", False), ("le", "LessOrEqual", False),
        ("gt", "Greater", False), ("ge", "GreaterOrEqual", False),
    )
    for overload in ("Tensor", "Scalar")
}  # fmt: skip

OPERATORS: dict[Any, Translation] = {
    **ARITHMETIC, **COMPARISONS, **SHAPES,
    aten.logical_and.default: _logical("And"), aten.logical_or.default: _logical("Or"),
    aten.logical_xor.default: _logical("Xor"),
    aten.logical_not.default: lambda v, node, x: v.b.op("Not", v.tensor(x, torch.bool)),
    aten.bitwise_and.Tensor: _bitwise("And", "BitwiseAnd"), aten.bitwise_or.Tensor: _bitwise("Or", "BitwiseOr"),
    aten.bitwise_and.Scalar: _bitwise("And", "BitwiseAnd"), aten.bitwise_or.Scalar: _bitwise("Or", "BitwiseOr"),
    aten.__and__.Tensor: _bitwise("And", "BitwiseAnd"), aten.__or__.Tensor: _bitwise("Or", "BitwiseOr"),
    aten.bitwise_not.default: lambda v, node, x: v.b.op("Not", v.tensor(x)),
    aten.to.dtype: _cast, aten.to.dtype_layout: _cast, aten.to.device: _cast, aten._to_copy.default: _cast,
    aten.type_as.default: _cast, aten.to.other: _cast,
    aten.where.self: _where, aten.where.ScalarSelf: _where, aten.where.ScalarOther: _where, aten.where.Scalar: _where,
    aten.masked_fill.Scalar: _masked_fill, aten.masked_fill.Tensor: _masked_fill,
    aten.softmax.int: _softmax, aten._softmax.default: _softmax, aten.log_softmax.int: _log_softmax,
    aten.sum.dim_IntList: _reduce("ReduceSum"), aten.sum.default: _reduce("ReduceSum"),
    aten.mean.dim: _reduce("ReduceMean"), aten.mean.default: _reduce("ReduceMean"),
    aten.amax.default: _reduce("ReduceMax"), aten.amin.default: _reduce("ReduceMin"),
    aten.prod.dim_int: _reduce("ReduceProd"), aten.logsumexp.default: _reduce("ReduceLogSumExp"),
    aten.any.dim: _any, aten.any.default: _any,
    aten.linear.default: _linear, aten.matmul.default: _matmul, aten.mm.default: _matmul, aten.bmm.default: _matmul,
    aten.addmm.default: _addmm, aten.einsum.default: _einsum,
    aten.topk.default: _topk, aten.sort.stable: _sort, aten.sort.default: _sort_default,
    aten.argmax.default: _argmax, aten.max.dim: _max_dim, aten.cumsum.default: _cumsum,
    aten.layer_norm.default: _layer_norm,
}  # fmt: skip

"""The expert activations on f32 registers; names as in passes/ir/activation.py."""

from __future__ import annotations

from tvm.tirx.script import builder as T

from moec.compiler.kernels.cuda.emit import Expr
from moec.passes.ir.activation import Activation


def sigmoid(x: Expr) -> Expr:
    """f32; infinite x give 0 and 1."""
    return T.float32(1) / (T.float32(1) + T.exp(T.float32(0) - x))


def _gelu(x: Expr) -> Expr:
    return T.float32(0.5) * x * (T.float32(1) + T.erf(x * T.float32(0.7071067811865476)))


def _gelu_tanh(x: Expr) -> Expr:
    inner = T.float32(0.7978845608028654) * (x + T.float32(0.044715) * x * x * x)
    return T.float32(0.5) * x * (T.float32(1) + T.tanh(inner))


def _relu(x: Expr) -> Expr:
    return T.Select(x < T.float32(0), T.float32(0), x)  # NaN stays


def _softcap(x: Expr, cap: float) -> Expr:
    return T.tanh(x / T.float32(cap)) * T.float32(cap)


_FUNCTIONS = {
    "silu": lambda x: x * sigmoid(x),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "relu2": lambda x: _relu(x) * _relu(x),
    "sigmoid": sigmoid,
    "identity": lambda x: x,
}


def activate(activation: Activation, gate: Expr, up: Expr | None) -> Expr:
    """f32 gate and up (gate alone where not gated) -> f32."""
    gate = T.Bind(gate)
    if up is None:
        return _FUNCTIONS[activation.fn](gate)
    up = T.Bind(up)
    if activation.fn == "softcapglu":
        capped = _softcap(gate, activation.limit or 1.0), _softcap(up, activation.alpha)
        return capped[0] * sigmoid(gate) * capped[1]
    if activation.limit is not None:
        limit, low = T.float32(activation.limit), T.float32(-activation.limit)
        gate = T.Bind(T.Select(gate > limit, limit, gate))
        up = T.Bind(T.Select(up > limit, limit, T.Select(up < low, low, up)))
    if activation.fn == "swigluoai":
        return (up + T.float32(1)) * (gate * sigmoid(gate * T.float32(activation.alpha)))
    return _FUNCTIONS[activation.fn](gate) * up

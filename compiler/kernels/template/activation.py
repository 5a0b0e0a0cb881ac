"""Vector code for the expert activations, in f32: errors stay below 3e-7 of the result's scale.

exp: Cody-Waite reduction, the degree-6 polynomial of Cephes' expf; erf: Abramowitz and Stegun 7.1.26, |error| < 1.5e-7.
NaN in gives NaN out; every maximum and minimum has its constant first, because the processor's keep the second operand.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from moec.passes.ir.activation import Activation

_EXP_COEFFICIENTS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
_ERF_COEFFICIENTS = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
_EXP_MIN, _EXP_MAX = -87.3, 88.0
SUPPORTED = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "identity", "swigluoai")


def constant(value: float, lanes: int) -> Any:
    """A vector of one f32 value."""
    return T.broadcast(T.float32(value), lanes)


def exp(x: Any, lanes: int) -> Any:
    """e**x, held between e**-87.3 and e**88. A NaN may come out as a number: multiply by x."""
    x = T.Bind(T.max(constant(_EXP_MIN, lanes), T.min(constant(_EXP_MAX, lanes), x)))
    n = T.Bind(T.floor(x * constant(1.44269504088896341, lanes) + constant(0.5, lanes)))
    r = T.fma(n, constant(-0.693359375, lanes), x)
    r = T.Bind(T.fma(n, constant(2.12194440e-4, lanes), r))
    p = constant(_EXP_COEFFICIENTS[0], lanes)
    for coefficient in _EXP_COEFFICIENTS[1:]:
        p = T.fma(p, r, constant(coefficient, lanes))
    p = T.fma(p, r * r, r) + constant(1.0, lanes)
    exponent = T.Cast(f"int32x{lanes}", n) + T.broadcast(T.int32(127), lanes)
    return p * T.reinterpret(f"float32x{lanes}", T.shift_left(exponent, T.broadcast(T.int32(23), lanes)))


def sigmoid(x: Any, lanes: int) -> Any:
    """1 / (1 + e**-x)."""
    one = constant(1.0, lanes)
    return one / (one + exp(constant(0.0, lanes) - x, lanes))


def _gelu_erf(x: Any, lanes: int) -> Any:
    z = T.Bind(x * constant(0.7071067811865476, lanes))
    size = T.Bind(T.max(z, constant(0.0, lanes) - z))
    t = T.Bind(constant(1.0, lanes) / T.fma(size, constant(0.3275911, lanes), constant(1.0, lanes)))
    p = constant(_ERF_COEFFICIENTS[0], lanes)
    for coefficient in _ERF_COEFFICIENTS[1:]:
        p = T.fma(p, t, constant(coefficient, lanes))
    tail = T.Bind(p * t * exp(constant(0.0, lanes) - z * z, lanes))  # 1 - erf(|z|)
    cumulative = T.Select(z < constant(0.0, lanes), tail, constant(2.0, lanes) - tail)
    return constant(0.5, lanes) * x * cumulative


def _apply(fn: str, x: Any, lanes: int) -> Any:
    if fn == "silu":
        return x * sigmoid(x, lanes)
    if fn == "gelu_tanh":
        inner = T.fma(constant(0.044715, lanes) * x * x, x, x)
        return x * sigmoid(constant(2 * 0.7978845608028654, lanes) * inner, lanes)
    if fn == "gelu":
        return _gelu_erf(x, lanes)
    if fn == "sigmoid":
        return sigmoid(x, lanes) + x * constant(0.0, lanes)
    if fn == "identity":
        return x
    positive = T.Bind(T.max(constant(0.0, lanes), x))
    return positive * positive if fn == "relu2" else positive


def activate(activation: Activation, gate: Any, up: Any, lanes: int) -> Any:
    """f32 vectors of the gate and up halves (gate None where not gated) -> the activated vector."""
    if gate is None:
        return _apply(activation.fn, T.Bind(up), lanes)
    if activation.limit is not None:
        limit = activation.limit
        gate = T.min(constant(limit, lanes), gate)
        up = T.max(constant(-limit, lanes), T.min(constant(limit, lanes), up))
    gate = T.Bind(gate)
    if activation.fn == "swigluoai":
        sloped = sigmoid(constant(activation.alpha, lanes) * gate, lanes)
        return (up + constant(1.0, lanes)) * (gate * sloped)
    return _apply(activation.fn, gate, lanes) * up

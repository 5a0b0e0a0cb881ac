"""ONNX operators that work element by element, on tensors and on numbers of the host."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moec.compiler.capture.onnx import host
from moec.compiler.capture.onnx.file import DTYPES
from moec.compiler.errors import UnsupportedModel


def _of_two(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Tensor]:
    """A function of two tensors, of which one may be given as a number."""

    def of_two(a: Any, b: Any) -> Tensor:
        kind = a if isinstance(a, Tensor) else b
        return function(host.tensor(a, kind), host.tensor(b, kind))

    return of_two


def _divided(a: Any, b: Any) -> Tensor:
    kind = a if isinstance(a, Tensor) else b
    if kind.is_floating_point():
        return a / b
    return torch.div(host.tensor(a, kind), b, rounding_mode="trunc")


def _pairwise(
    on_numbers: Callable[[Any, Any], Any], on_tensors: Callable[[Any, Any], Any]
) -> Callable[[Any, Any], Any]:
    """An operator of two values: numbers of the host with each other, anything else as tensors."""

    def pairwise(a: Any, b: Any) -> Any:
        return host.paired(a, b, on_numbers, on_tensors)

    return pairwise


add = _pairwise(operator.add, operator.add)
sub = _pairwise(operator.sub, operator.sub)
mul = _pairwise(operator.mul, operator.mul)
div = _pairwise(host.truncated, _divided)
equal = _pairwise(operator.eq, operator.eq)
less = _pairwise(operator.lt, operator.lt)
less_equal = _pairwise(operator.le, operator.le)
greater = _pairwise(operator.gt, operator.gt)
greater_equal = _pairwise(operator.ge, operator.ge)
both = _pairwise(lambda x, y: x and y, _of_two(torch.logical_and))
either = _pairwise(lambda x, y: x or y, _of_two(torch.logical_or))
differ = _pairwise(operator.ne, _of_two(torch.logical_xor))


def mod(a: Any, b: Any, *, fmod: int = 0) -> Any:
    """Mod: the sign of the divisor, as Python has it; with fmod that of the dividend, as C has it."""
    of_tensors = _of_two(torch.fmod if fmod else torch.remainder)
    return host.paired(a, b, math.fmod if fmod else operator.mod, of_tensors)


def power(a: Any, b: Any) -> Any:
    """The exponent may be of another type than the base, which gives the result's."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.pow(a, b).to(a.dtype)
    if isinstance(a, Tensor) and isinstance(b, float) and b.is_integer():
        b = int(b)
    return host.paired(a, b, operator.pow, torch.pow)


def negated(a: Any) -> Any:
    """Not, of truth values."""
    return host.each(a, operator.not_, torch.logical_not)


def neg(a: Any) -> Any:
    """Neg, of tensors and of numbers."""
    return host.each(a, operator.neg, operator.neg)


def absolute(a: Any) -> Any:
    """Abs, of tensors and of numbers."""
    return host.each(a, abs, torch.abs)


def sqrt(a: Any) -> Any:
    """Sqrt; of a symbolic size it stays symbolic."""
    return host.each(a, lambda v: torch.sym_sqrt(v) if isinstance(v, torch.SymFloat) else math.sqrt(v), torch.sqrt)


def reciprocal(a: Any) -> Any:
    """Reciprocal; of a number of the host a float."""
    return host.each(a, lambda v: 1 / v, torch.reciprocal)


def identity(a: Any) -> Any:
    """Identity: the value itself, not a copy."""
    return a


def dropout(data: Any, ratio: Any = None, training_mode: Any = None, *, seed: int = 0) -> Any:
    """Nothing, as in every graph for inference; its second result is a mask of ones."""
    if training_mode is not None and host.number(training_mode):
        raise UnsupportedModel("it is in training mode; export the model in evaluation mode")
    return data, torch.ones_like(data, dtype=torch.bool)


def extreme(name: str, *values: Any) -> Any:
    """Max and Min of any number of values. name: "max" or "min"."""
    of_two, of_numbers = _of_two(getattr(torch, f"{name}imum")), getattr(torch, f"sym_{name}")
    return functools.reduce(lambda a, b: host.paired(a, b, of_numbers, of_two), values)


def mean(*values: Any) -> Any:
    """Mean of any number of values."""
    return functools.reduce(add, values) / len(values)


def total(*values: Any) -> Any:
    """Sum of any number of values."""
    return functools.reduce(add, values)


def clip(x: Any, low: Any = None, high: Any = None) -> Any:
    """Clip; a bound that is not given does not bind."""
    host.same_type(x, low, high)
    if not isinstance(x, Tensor):
        x = x if low is None else extreme("max", x, low)
        return x if high is None else extreme("min", x, high)
    return x if low is None and high is None else torch.clamp(x, low, high)


def cast(x: Any, *, to: int, saturate: int = 1, round_mode: str = "up") -> Any:
    """Cast. to: a data type by ONNX's number. Raises: UnsupportedModel: a type that is not read."""
    if to not in DTYPES:
        raise UnsupportedModel(f"casts to the ONNX data type {to}, which is not read")
    return host.cast(x, DTYPES[to])


def cast_like(x: Any, target: Any, *, saturate: int = 1, round_mode: str = "up") -> Any:
    """CastLike: to the type of `target`."""
    return host.cast(x, host.tensor(target).dtype)


def where(condition: Any, a: Any, b: Any) -> Any:
    """Where: of values on the host alone the result stays there."""
    if not isinstance(condition, Tensor) and not isinstance(a, Tensor) and not isinstance(b, Tensor):
        pairs = host.paired(a, b, lambda x, y: (x, y), lambda x, y: None)
        return host.paired(condition, pairs, lambda c, p: p[0] if c else p[1], lambda c, p: None)
    host.same_type(a, b)
    kind = next((v for v in (a, b) if isinstance(v, Tensor)), None)
    a, b = (host.tensor(v, kind) if isinstance(v, list) or kind is None else v for v in (a, b))
    return torch.where(host.tensor(condition), a, b)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """Gelu. approximate: "none" or "tanh"."""
    return F.gelu(x, approximate=approximate)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """BiasGelu of com.microsoft: exact."""
    return F.gelu(x + bias)


def fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """FastGelu of com.microsoft: by tanh."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def quick_gelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    """QuickGelu of com.microsoft: x * sigmoid(alpha * x)."""
    return x * torch.sigmoid(x if alpha == 1 else x * alpha)


def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Swish: x * sigmoid(alpha * x)."""
    return quick_gelu(x, alpha=alpha)


def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """LeakyRelu: alpha * x below 0."""
    return F.leaky_relu(x, alpha)


def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Elu: alpha * (exp(x) - 1) below 0."""
    return F.elu(x, alpha)


def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """HardSigmoid: alpha * x + beta between 0 and 1."""
    return torch.clamp(x * alpha + beta, 0, 1)


def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """IsInf of both signs. Raises: UnsupportedModel: only one is asked for."""
    if not (detect_negative and detect_positive):
        raise UnsupportedModel("asks for infinities of one sign")
    return torch.isinf(x)

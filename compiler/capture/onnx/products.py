"""ONNX operators that multiply, reduce and normalise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moec.compiler.capture.onnx import host
from moec.compiler.capture.onnx.file import DTYPES
from moec.compiler.errors import UnsupportedModel


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """MatMul. Raises: MixedTypes."""
    host.same_type(a, b)
    return torch.matmul(a, b)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A MatMul with a constant matrix, or a Gemm, whose weight code.py has turned round: weight [out, in]."""
    host.same_type(x, weight, bias)
    return F.linear(x, weight, bias)


def gemm(
    a: Tensor, b: Tensor, c: Any = None, *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0
) -> Tensor:
    """Gemm: alpha * a b + beta * c, each matrix transposed where asked; linear where it is one. Raises: MixedTypes."""
    host.same_type(a, b, c)
    a = a.t() if transA else a
    if transB and alpha == beta == 1 and (c is None or (isinstance(c, Tensor) and c.dim() == 1)):
        return F.linear(a, b, c)
    y = torch.matmul(a, b.t() if transB else b)
    y = y if alpha == 1 else y * alpha
    return y if c is None else y + (c if beta == 1 else c * beta)


def einsum(*operands: Tensor, equation: str) -> Tensor:
    """Einsum. Raises: MixedTypes."""
    host.same_type(*operands)
    return torch.einsum(equation, *operands)


def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Softmax, of opset 13 and later: along one axis."""
    return torch.softmax(x, axis)


def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """LogSoftmax, of opset 13 and later: along one axis."""
    return torch.log_softmax(x, axis)


def reduce(kind: str, data: Any, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
    """kind: sum, mean, max, min, prod, l1, l2, sum_square, log_sum_exp. axes: an attribute in older opsets."""
    if not isinstance(data, Tensor):
        data = host.tensor(data) if kind not in _OF_SIZES else data
    if not isinstance(data, Tensor):
        value = _OF_SIZES[kind](data if isinstance(data, list) else [data])
        return [value] if keepdims else value
    chosen = [] if axes is None else [a % data.dim() for a in host.ints(axes)]
    if not chosen:
        if noop_with_empty_axes:
            return data
        chosen = list(range(data.dim()))
    return _REDUCED[kind](data, chosen, bool(keepdims))


def _product(values: list[Any]) -> Any:
    total = 1
    for v in values:
        total = total * v
    return total


def _prod(data: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        data = torch.prod(data, axis, keep).to(data.dtype)
    return data


_OF_SIZES: dict[str, Any] = {"sum": sum, "prod": _product, "max": max, "min": min}
_REDUCED: dict[str, Any] = {
    "sum": lambda x, axes, keep: torch.sum(x, axes, keep, dtype=x.dtype),
    "mean": lambda x, axes, keep: torch.mean(x, axes, keep),
    "max": lambda x, axes, keep: torch.amax(x, axes, keep),
    "min": lambda x, axes, keep: torch.amin(x, axes, keep),
    "prod": _prod,
    "l1": lambda x, axes, keep: torch.sum(torch.abs(x), axes, keep),
    "l2": lambda x, axes, keep: torch.sqrt(torch.sum(torch.square(x), axes, keep)),
    "sum_square": lambda x, axes, keep: torch.sum(torch.square(x), axes, keep),
    "log_sum_exp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
}


def layer_norm(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """LayerNormalization over the axes from `axis` on; its further results are not made."""
    return F.layer_norm(x, _last(x, axis), scale, bias, epsilon)


def rms_norm(x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    """In stash_type, rounded to the type of x before it is scaled."""
    wide = x.to(DTYPES[stash_type])
    axes = list(range(axis % x.dim(), x.dim()))
    normed = wide * torch.rsqrt(wide.pow(2).mean(axes, keepdim=True) + epsilon)
    return normed.to(x.dtype) * scale


def skip_rms_norm(
    x: Tensor, skip: Tensor, gamma: Tensor, bias: Tensor | None = None, *, epsilon: float = 1e-5
) -> tuple[Any, ...]:
    """com.microsoft: the norm of x + skip + bias, and as its fourth result that sum."""
    total = x + skip if bias is None else x + skip + bias
    return rms_norm(total, gamma, epsilon=epsilon), None, None, total


def skip_layer_norm(
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-5,
) -> tuple[Any, ...]:
    """com.microsoft: the norm of x + skip + bias, and as its fourth result that sum."""
    total = x + skip if bias is None else x + skip + bias
    return F.layer_norm(total, _last(total, -1), gamma, beta, epsilon), None, None, total


def _last(x: Tensor, axis: int) -> list[int]:
    return [int(n) for n in x.shape[axis % x.dim() :]]


def dequantize_linear(
    x: Tensor, scale: Any, zero_point: Any = None, *, axis: int = 1, block_size: int = 0, output_dtype: int = 0
) -> Tensor:
    """(x - zero_point) * scale, with a scale for everything, for each entry of an axis, or for blocks along it."""
    scale = host.tensor(scale)
    shift = None if zero_point is None else host.tensor(zero_point)
    if output_dtype not in (0, 1):
        raise UnsupportedModel(f"dequantises to the ONNX data type {output_dtype}; float is read")

    def spread(t: Tensor) -> Tensor:
        if block_size:
            return t.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])
        if t.dim() == 1 and t.numel() > 1:
            return t.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])
        return t.reshape(()) if t.numel() == 1 else t

    values = x.to(scale.dtype) if shift is None else x.to(scale.dtype) - spread(shift).to(scale.dtype)
    return values * spread(scale)

"""Which function computes which ONNX operator. What is not here is refused by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from moec.compiler.capture.onnx import attention, elementwise, experts, indexing, products, shapes

TABLE: dict[str, Callable[..., Any]] = {
    # element by element
    "Abs": elementwise.absolute,
    "Add": elementwise.add,
    "And": elementwise.both,
    "Cast": elementwise.cast,
    "CastLike": elementwise.cast_like,
    "Ceil": torch.ceil,
    "Clip": elementwise.clip,
    "Cos": torch.cos,
    "Div": elementwise.div,
    "Dropout": elementwise.dropout,
    "Elu": elementwise.elu,
    "Equal": elementwise.equal,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Gelu": elementwise.gelu,
    "Greater": elementwise.greater,
    "GreaterOrEqual": elementwise.greater_equal,
    "HardSigmoid": elementwise.hard_sigmoid,
    "HardSwish": F.hardswish,
    "Identity": elementwise.identity,
    "IsInf": elementwise.is_inf,
    "IsNaN": torch.isnan,
    "LeakyRelu": elementwise.leaky_relu,
    "Less": elementwise.less,
    "LessOrEqual": elementwise.less_equal,
    "Log": torch.log,
    "Max": functools.partial(elementwise.extreme, "max"),
    "Mean": elementwise.mean,
    "Min": functools.partial(elementwise.extreme, "min"),
    "Mod": elementwise.mod,
    "Mul": elementwise.mul,
    "Neg": elementwise.neg,
    "Not": elementwise.negated,
    "Or": elementwise.either,
    "Pow": elementwise.power,
    "Reciprocal": elementwise.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Softplus": F.softplus,
    "Sqrt": elementwise.sqrt,
    "Sub": elementwise.sub,
    "Sum": elementwise.total,
    "Swish": elementwise.swish,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "Where": elementwise.where,
    "Xor": elementwise.differ,
    # shapes
    "Concat": shapes.concat,
    "ConcatFromSequence": shapes.concat_sequence,
    "ConstantOfShape": shapes.constant_of_shape,
    "Expand": shapes.expand,
    "Flatten": shapes.flatten,
    "Pad": shapes.pad,
    "Range": shapes.range_,
    "Reshape": shapes.reshape,
    "SequenceAt": shapes.sequence_at,
    "SequenceConstruct": shapes.sequence,
    "Shape": shapes.shape,
    "Size": shapes.size,
    "Slice": shapes.slice_,
    "Split": shapes.split,
    "SplitToSequence": shapes.split_to_sequence,
    "Squeeze": shapes.squeeze,
    "Tile": shapes.tile,
    "Transpose": shapes.transpose,
    "Unsqueeze": shapes.unsqueeze,
    # gather, scatter, choose
    "ArgMax": indexing.argmax,
    "ArgMin": indexing.argmin,
    "CumSum": indexing.cumsum,
    "Gather": indexing.gather,
    "GatherElements": indexing.gather_elements,
    "GatherND": indexing.gather_nd,
    "NonZero": indexing.nonzero,
    "OneHot": indexing.one_hot,
    "ScatterElements": indexing.scatter_elements,
    "ScatterND": indexing.scatter_nd,
    "TopK": indexing.topk,
    "Trilu": indexing.trilu,
    # products, reductions, norms
    "DequantizeLinear": products.dequantize_linear,
    "Einsum": products.einsum,
    "Gemm": products.gemm,
    "LayerNormalization": products.layer_norm,
    "LogSoftmax": products.log_softmax,
    "MatMul": products.matmul,
    "RMSNormalization": products.rms_norm,
    "ReduceL1": functools.partial(products.reduce, "l1"),
    "ReduceL2": functools.partial(products.reduce, "l2"),
    "ReduceLogSumExp": functools.partial(products.reduce, "log_sum_exp"),
    "ReduceMax": functools.partial(products.reduce, "max"),
    "ReduceMean": functools.partial(products.reduce, "mean"),
    "ReduceMin": functools.partial(products.reduce, "min"),
    "ReduceProd": functools.partial(products.reduce, "prod"),
    "ReduceSum": functools.partial(products.reduce, "sum"),
    "ReduceSumSquare": functools.partial(products.reduce, "sum_square"),
    "SimplifiedLayerNormalization": products.rms_norm,
    "Softmax": products.softmax,
    # attention
    "Attention": attention.attention,
    "RotaryEmbedding": attention.rotary,
    # ONNX Runtime's own
    "com.microsoft.BiasGelu": elementwise.bias_gelu,
    "com.microsoft.FastGelu": elementwise.fast_gelu,
    "com.microsoft.Gelu": elementwise.gelu,
    "com.microsoft.MoE": experts.moe,
    "com.microsoft.QuickGelu": elementwise.quick_gelu,
    "com.microsoft.SimplifiedLayerNormalization": products.rms_norm,
    "com.microsoft.SkipLayerNormalization": products.skip_layer_norm,
    "com.microsoft.SkipSimplifiedLayerNormalization": products.skip_rms_norm,
    # ours (code.py writes it for products with a constant matrix)
    "moec.linear": products.linear,
}


SEVERAL = frozenset(
    {
        "Attention",
        "Dropout",
        "Split",
        "TopK",
        "com.microsoft.SkipLayerNormalization",
        "com.microsoft.SkipSimplifiedLayerNormalization",
    }
)
"""Operators whose functions give a tuple, with more results than a node may name."""
PORTABLE = "moec.Experts_"
PORTABLE_ATTRIBUTES = frozenset({"act", "num_experts", "top_k", "layer"})


@functools.cache
def attributes_of(op: str) -> frozenset[str]:
    """The attributes that an operator's function takes."""
    if op.startswith(PORTABLE):
        return PORTABLE_ATTRIBUTES
    try:
        parameters = inspect.signature(TABLE[op]).parameters.values()
    except ValueError:  # a builtin of torch, whose ONNX operator has none
        return frozenset()
    named = frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    return named | {"axes"} if op.startswith("Reduce") else named  # before opset 18


@functools.cache
def function_of(op: str) -> Callable[..., Any] | None:
    """The function of an operator; None: it is not read."""
    if op.startswith(PORTABLE):
        return functools.partial(experts.portable, op)
    return TABLE.get(op)

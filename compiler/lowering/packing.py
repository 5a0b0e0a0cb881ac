"""Weights in a kernel's own layout: named in the program when it is lowered, made one expert at a time at export."""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.kernels.experts import layout
from moec.compiler.kernels.experts.call import weight_layout
from moec.compiler.kernels.spec import ExpertsProblem
from moec.passes.ir.activation import Activation
from moec.passes.ir.weights import Read, Weight, pack

GATE_UP, DOWN, BIAS_GATE_UP, BIAS_DOWN = "experts-gate-up", "experts-down", "experts-bias-gate-up", "experts-bias-down"
DTYPES = {"vnni32": torch.bfloat16, "row32": torch.float32}


def packed_gate_up(problem: ExpertsProblem, weight: Weight) -> Weight:
    """[E+s, 2F, H] ([E+s, F, H] without gate) -> the kernels' panels."""
    name, gated = weight_layout(problem), Activation.parse(problem.act).gated
    columns = layout.padded(problem.inner) * (2 if gated else 1)
    shape = layout.packed_shape(weight.shape[0], columns, weight.shape[2])
    return pack(weight, f"{GATE_UP}:{name}:{'gated' if gated else 'plain'}", (), shape, DTYPES[name])


def packed_down(problem: ExpertsProblem, weight: Weight) -> Weight:
    """[E+s, H, F] -> the kernels' panels."""
    name = weight_layout(problem)
    shape = layout.packed_shape(*weight.shape)
    return pack(weight, f"{DOWN}:{name}:plain", (), shape, DTYPES[name])


def packed_bias_gate_up(problem: ExpertsProblem, weight: Weight) -> Weight:
    """[E+s, 2F] -> f32 in panel order."""
    gated = Activation.parse(problem.act).gated
    columns = layout.padded(problem.inner) * (2 if gated else 1)
    name = f"{BIAS_GATE_UP}:row32:{'gated' if gated else 'plain'}"
    return pack(weight, name, (), (weight.shape[0], columns), torch.float32)


def packed_bias_down(weight: Weight) -> Weight:
    """[E+s, H] -> f32, padded."""
    columns = layout.padded(weight.shape[1])
    return pack(weight, f"{BIAS_DOWN}:row32:plain", (), (weight.shape[0], columns), torch.float32)


def make(weight: Weight, read: Read) -> Tensor:
    """The tensor of a weight. A packed stack is filled expert by expert, so one expert more than it is in memory."""
    if weight.op != "pack":
        return weight.materialise(read, pack_whole)
    (inner,) = weight.inputs
    kind, name, shape = weight.args[0].split(":")
    if kind not in (GATE_UP, DOWN) or inner.op != "stack":
        return weight.materialise(read, pack_whole)
    out = torch.empty(weight.shape, dtype=weight.dtype)
    for target, one in zip(out, inner.inputs, strict=True):
        rows = one.materialise(read, pack_whole)
        rows = layout.interleave_gate_up(rows, shape == "gated") if kind == GATE_UP else _pad_rows(rows)
        layout.pack_rows(rows, name, target)
    return out


def pack_whole(text: str, numbers: tuple[int, ...], tensor: Tensor) -> Tensor:
    """A layout by name applied to a whole tensor; see Weight.materialise."""
    kind, name, shape = text.split(":")
    if kind == GATE_UP:
        return layout.pack_gate_up(tensor, name, shape == "gated")
    if kind == DOWN:
        return layout.pack_down(tensor, name)
    if kind == BIAS_GATE_UP:
        return layout.pack_bias_gate_up(tensor, shape == "gated")
    return layout.pack_bias_down(tensor)


def _pad_rows(rows: Tensor) -> Tensor:
    missing = layout.padded(rows.shape[0]) - rows.shape[0]
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows

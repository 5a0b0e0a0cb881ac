"""Weights in a kernel's own layout: named in the program when it is lowered, made one expert at a time at export."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from moec.compiler.kernels.cuda.codes import pack as pack_fragments
from moec.compiler.kernels.cuda.gemm_problem import UNIT_DEPTH, UNIT_ROWS
from moec.compiler.kernels.experts import codes as codes_of
from moec.compiler.kernels.experts import layout
from moec.compiler.kernels.experts.call import packed_shape, weight_layout
from moec.compiler.kernels.spec import ExpertsProblem
from moec.passes.ir.activation import Activation
from moec.passes.ir.quantise import Parts
from moec.passes.ir.quantised import formats_of, parts_by_expert, unstacked
from moec.passes.ir.weights import Read, Weight, pack

GATE_UP, DOWN, BIAS_GATE_UP, BIAS_DOWN = "experts-gate-up", "experts-down", "experts-bias-gate-up", "experts-bias-down"
CODES = "codes/"  # before the name of a format
E4M3_CODES, E4M3_SCALES = "e4m3-codes", "e4m3-scales"  # of fp8 weights, as the CUDA kernels read them
CUDA_CODES, CUDA_SCALES = "cuda-codes", "cuda-scales"  # of int8 and int4 weights, in the order of their fragments
DTYPES = {"vnni32": torch.bfloat16, "row32": torch.float32}


def packed_gate_up(problem: ExpertsProblem, weight: Weight) -> Weight:
    """[E+s, 2F, H] ([E+s, F, H] without gate) -> the kernels' panels."""
    gated = Activation.parse(problem.act).gated
    kind = "gated" if gated else "plain"
    if problem.format_up:
        return _packed_codes(weight, problem.format_up, gated, f"{GATE_UP}:{CODES}{problem.format_up}:{kind}")
    name = weight_layout(problem)
    columns = layout.padded(problem.inner) * (2 if gated else 1)
    shape = layout.packed_shape(weight.shape[0], columns, weight.shape[2])
    return pack(weight, f"{GATE_UP}:{name}:{kind}", (), shape, DTYPES[name])


def packed_down(problem: ExpertsProblem, weight: Weight) -> Weight:
    """[E+s, H, F] -> the kernels' panels."""
    if problem.format_down:
        return _packed_codes(weight, problem.format_down, None, f"{DOWN}:{CODES}{problem.format_down}:plain")
    name = weight_layout(problem)
    shape = layout.packed_shape(*weight.shape)
    return pack(weight, f"{DOWN}:{name}:plain", (), shape, DTYPES[name])


def _packed_codes(weight: Weight, format: str, gated: bool | None, name: str) -> Weight:
    codes = codes_of.of_format(format, weight.shape[2])
    return pack(weight, name, (), packed_shape(codes, weight.shape[0], weight.shape[1], gated), torch.uint8)


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


def e4m3_codes(weight: Weight) -> Weight:
    """The codes of a stack in fp8: e4m3[E, N, K]."""
    return pack(weight, f"{E4M3_CODES}:row:plain", (), weight.shape, torch.float8_e4m3fn)


def e4m3_scales(weight: Weight) -> Weight:
    """The scales of a stack in fp8, one for each row: f32[E, N]."""
    return pack(weight, f"{E4M3_SCALES}:row:plain", (), weight.shape[:2], torch.float32)


def cuda_codes(weight: Weight) -> Weight:
    """The codes of a stack in int8 or int4: i32[E, N/16, K/64, 32 * bits]; see compiler/kernels/cuda/codes.py."""
    format, (experts, rows, depth) = formats_of(weight)[0], weight.shape
    shape = (experts, rows // UNIT_ROWS, depth // UNIT_DEPTH, 32 * int(format.bits))
    return pack(weight, f"{CUDA_CODES}:row:plain", (), shape, torch.int32)


def cuda_scales(weight: Weight) -> Weight:
    """Their scales: bf16[E, K/group, N], or f32[E, N] where a row has one."""
    format, (experts, rows, depth) = formats_of(weight)[0], weight.shape
    grouped = (experts, depth // format.group, rows) if format.group else (experts, rows)
    return pack(weight, f"{CUDA_SCALES}:row:plain", (), grouped, torch.bfloat16 if format.group else torch.float32)


Scales = dict[int, list[Tensor]]
"""id of a quantised stack -> the scales of its experts, kept from when its codes were made."""


def make(weight: Weight, read: Read, scales: Scales | None = None) -> Tensor:
    """The tensor of a weight. A packed stack is filled expert by expert, so one expert more than it is in memory.

    scales: of calls for the weights of one file; a stack whose codes and scales are two weights is then quantised once.
    """
    making = steps(weight, read, {} if scales is None else scales)
    while True:
        try:
            next(making)
        except StopIteration as done:
            made: Tensor = done.value
            return made


def steps(weight: Weight, read: Read, scales: Scales) -> Generator[None, None, Tensor]:
    """As make; stops after every expert of a packed stack, so that others that read the same tensors can keep pace."""
    if weight.op != "pack":
        return weight.materialise(read, pack_whole)
    (inner,) = weight.inputs
    kind, name, shape = weight.args[0].split(":")
    if name.startswith(CODES):
        return (yield from _codes(weight, kind, name.removeprefix(CODES), shape == "gated", read))
    if kind in (E4M3_CODES, CUDA_CODES):
        return (yield from _stored(weight, kind, read, scales))
    if kind in (E4M3_SCALES, CUDA_SCALES):
        return _make_scales(weight, kind, read, scales)
    experts = unstacked(inner) if kind in (GATE_UP, DOWN) else None
    if experts is None:
        return weight.materialise(read, pack_whole)
    out = torch.empty(weight.shape, dtype=weight.dtype)
    for target, one in zip(out, experts, strict=True):
        rows = one.materialise(read, pack_whole)
        rows = layout.interleave_gate_up(rows, shape == "gated") if kind == GATE_UP else _pad_rows(rows)
        layout.pack_rows(rows, name, target)
        del rows  # before others make theirs
        yield
    return out


def sources_read(weight: Weight) -> list[str]:
    """The tensors that make reads, as often as it does: of experts chosen from a stack those of no other expert."""
    experts = unstacked(weight.inputs[0]) if weight.op in ("pack", "stored") else None
    return [name for one in experts or [weight] for name in one.sources()]


def _codes(weight: Weight, kind: str, format: str, gated: bool, read: Read) -> Generator[None, None, Tensor]:
    """Panels of codes and scales, as they are stored, expert by expert."""
    (inner,) = weight.inputs
    codes = codes_of.of_format(format, inner.shape[2])
    out = torch.empty(weight.shape, dtype=torch.uint8)
    for target, parts in zip(out, parts_by_expert(inner, read), strict=True):
        codes_of.pack_expert(parts, codes, gated if kind == GATE_UP else None, target)
        yield
    return out


def _stored(weight: Weight, kind: str, read: Read, scales: Scales) -> Generator[None, None, Tensor]:
    """The codes of a stack as CUDA kernels read them, expert by expert; their scales are kept."""
    out, kept = torch.empty(weight.shape, dtype=weight.dtype), []
    for target, parts in zip(out, parts_by_expert(weight.inputs[0], read), strict=True):
        codes, scale = _e4m3(parts) if kind == E4M3_CODES else pack_fragments(parts)
        target.copy_(codes)
        kept.append(scale)
        yield
    scales[id(weight.inputs[0])] = kept
    return out


def _make_scales(weight: Weight, kind: str, read: Read, scales: Scales) -> Tensor:
    """The scales of a stack, those that are kept where its codes were made before."""
    kept = scales.pop(id(weight.inputs[0]), None)
    if kept is None:
        parts = parts_by_expert(weight.inputs[0], read)
        kept = [(_e4m3(one) if kind == E4M3_SCALES else pack_fragments(one))[1] for one in parts]
    return torch.stack(kept).to(weight.dtype)


def _e4m3(parts: Parts) -> tuple[Tensor, Tensor]:
    return parts.codes.view(torch.float8_e4m3fn), parts.scales.reshape(-1)


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

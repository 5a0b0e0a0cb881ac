"""Bytes of weights: of a model in every format, and of an engine by what it stores.

A model in a format is what `moec compile --weights FORMAT` stores: experts in the format. Everything else is counted as
bf16 (f32 in the format f32). The rules are passes/ir/formats.py's. Experts are the stacks of moec::experts; shared
experts beside them count with everything else, though compile stacks those that have the routed experts' shape with
them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Graph, Node

from moec.compiler.export.flop_rule import EXPERTS
from moec.passes.ir.experts_call import ExpertsCall
from moec.passes.ir.formats import NAMES, FormatError, parse_format
from moec.passes.ir.quantised import formats_of, is_stored_quantised
from moec.passes.ir.weights import Weight

BF16_BYTES, F32_BYTES = 2, 4
Stack = tuple[int, int, int]


def weight_bytes(graph: Graph, total_params: int) -> dict[str, int]:
    """Format -> bytes; formats whose groups do not divide the experts' widths are left out.

    graph: as captured or later, with its moec::experts.
    """
    stacks = _stacks(graph)
    rest = total_params - sum(e * n * k for e, n, k in stacks)
    sizes = {}
    for name in (*NAMES, "int3", "int2"):
        try:
            experts = sum(e * parse_format(name).matrix_bytes(n, k) for e, n, k in stacks)
        except FormatError:
            continue
        sizes[name] = experts + rest * (F32_BYTES if name == "f32" else BF16_BYTES)
    return sizes


def stored_sizes(weights: Iterable[Weight]) -> dict[str, int]:
    """Format or dtype -> bytes of an engine's weights, largest first.

    What a checkpoint stores quantised and the engine does not is "bfloat16, quantised in the checkpoint".
    """
    sizes: dict[str, int] = {}
    for weight in weights:
        for name, num_bytes in _stored(weight):
            sizes[name] = sizes.get(name, 0) + num_bytes
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _stored(weight: Weight) -> list[tuple[str, int]]:
    """(format or dtype, bytes) of one weight of an engine; where experts differ, one entry for each of them."""
    inner = weight.inputs[0] if weight.op in ("stored", "pack") else weight
    formats = formats_of(inner) if inner is not weight else ()
    if len(formats) > 1:
        return [(f.name, f.matrix_bytes(*inner.shape[-2:])) for f in formats]
    if formats:
        unpacked = formats[0].is_packed and weight.op == "stored"  # no kernel reads it: see passes/ir/stored.py
        return [("bf16" if unpacked else formats[0].name, weight.num_bytes)]
    expanded = ", quantised in the checkpoint" if is_stored_quantised(inner) else ""
    return [(str(inner.dtype).removeprefix("torch.") + expanded, weight.num_bytes)]


def _stacks(graph: Graph) -> list[Stack]:
    """(experts, outputs, inputs) of every stack that the graph reads, once each."""
    found: dict[str, Stack] = {}
    for node in graph.find_nodes(op="call_function", target=EXPERTS):
        call = ExpertsCall.of(node)
        for stack in (call.w_gate_up, call.w_down):
            if isinstance(stack, Node) and stack.op == "get_attr":
                found[str(stack.target)] = _shape(stack.meta["val"], call.transposed)
    return list(found.values())


def _shape(stack: torch.Tensor, transposed: bool) -> Stack:
    count, rows, columns = (int(n) for n in stack.shape)
    return (count, columns, rows) if transposed else (count, rows, columns)

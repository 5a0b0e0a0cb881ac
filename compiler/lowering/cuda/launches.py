"""Steps that launch CUDA kernels: arguments by the kernels' parameter names, sizes as expressions of the rows.

A step names more sizes than a kernel may take in the end: what its device code does not use is dropped when the kernels
are built (build.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from moec.compiler.kernels.cuda.kernel import CudaKernel
from moec.compiler.lowering.candidates import Candidate, Predict, Results, Write
from moec.compiler.lowering.writer import Writer
from moec.runtime.expressions import Size
from moec.runtime.program import Step

Argument = Any
MULTIPROCESSORS = {"multiprocessors": 1}
"""An argument: as many blocks as the device has multiprocessors."""
ALIGN_ELEMENTS = 8  # of bf16: kernels load 16 bytes at a time


def named(kernel: CudaKernel, *content: Any) -> CudaKernel:
    """The kernel under a name that tells its content: equal content in one engine is one kernel."""
    digest = hashlib.sha256(repr((kernel.name, kernel.arch, *content)).encode()).hexdigest()[:10]
    return dataclasses.replace(kernel, name=f"{kernel.name}_{digest}")


def candidate(name: str, predict: Predict, write: Write, kernels: Sequence[CudaKernel]) -> Candidate:
    """A candidate that launches these kernels."""
    by_name = {k.name: k for k in kernels}
    return Candidate(name, predict, write, None, lambda: by_name, tuple(by_name))


def absorbing(name: str, predict: Predict, write: Write, kernel: CudaKernel, other: fx.Node) -> Candidate:
    """A candidate of one kernel that does another site's work too, and fills that site's results."""
    return dataclasses.replace(candidate(name, predict, write, [kernel]), absorbs=(other,))


def refused(name: str, reason: str) -> Candidate:
    """A candidate that is never chosen, for the report to say why."""
    return Candidate(name, lambda tokens: float("inf"), lambda writer, results: None, reason)


def launch(writer: Writer, kernel: CudaKernel, node: fx.Node, values: Mapping[str, Argument], outputs: Results) -> None:
    """Appends a launch. outputs: buffers that it is the first to fill."""
    writer.steps.append(Step("kernel", kernel.name, node.name, kwargs=dict(values), outputs=tuple(outputs)))


def times(rows: Size, factor: int) -> Size:
    """rows * factor."""
    return rows * factor if isinstance(rows, int) else f"({rows})*{factor}"


def size(value: Size) -> Argument:
    """A size as an argument."""
    return value if isinstance(value, int) else {"size": value}


def rows_of(writer: Writer, node: fx.Node) -> Size:
    """The first dimension of a node's (first) result."""
    val = node.meta["val"]
    return writer.buffers.size((val[0] if isinstance(val, list | tuple) else val).shape[0], node)


def strided_rows(writer: Writer, node: fx.Node) -> tuple[Argument, int]:
    """A tensor [T, ..] whose rows are dense -> its argument and the elements from row to row.

    Copied first where the inside of a row is not dense, or rows do not start at multiples of 16 bytes.
    """
    val = node.meta["val"]
    width = 1
    for n in val.shape[1:]:
        width *= int(n)
    stride, start = val.stride(0), val.storage_offset()
    inner, dense = 1, True
    for n, s in zip(reversed(val.shape[1:]), reversed(val.stride()[1:]), strict=True):
        dense &= bool(s == inner or n == 1)
        inner *= int(n)
    aligned = all(isinstance(n, int) and n % ALIGN_ELEMENTS == 0 for n in (stride, start))
    if dense and aligned:
        return writer.tensor(node), stride
    return writer.dense(node, whole=True), width


def shared_numbers(writer: Writer, node: fx.Node, dtype: torch.dtype) -> Argument:
    """As numbers, made once for all steps outside of choices: every layer turns by the same angles."""
    key = (node, dtype)
    if key not in writer.converted:
        writer.converted[key] = numbers(writer, node, dtype)
    return writer.converted[key]


def numbers(writer: Writer, node: fx.Node, dtype: torch.dtype) -> Argument:
    """A dense argument in a dtype."""
    return writer.dense(node, whole=True, dtype=dtype)

"""Checks that the kernels' wrappers make before they hand tensors to compiled code."""

from __future__ import annotations

from torch import Tensor

from moec.compiler.errors import CompileError


class KernelArgumentError(CompileError):
    """A kernel's wrapper was called with tensors that the kernel was not built for."""


def require(holds: bool, op: str, what: str) -> None:
    """Raises KernelArgumentError naming the op where the condition does not hold."""
    if not holds:
        raise KernelArgumentError(f"{op}: {what}; build the kernel for this problem or mend the arguments")


def rows_readable(x: Tensor) -> Tensor:
    """x itself where its last axis is dense, else a contiguous copy: kernels read whole rows at any row stride."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()

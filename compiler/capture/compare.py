"""Compares the graph of a plain module with the module itself at other sizes than it was traced with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moec.compiler.capture.captured import Captured
from moec.compiler.errors import UnsupportedModel
from moec.passes.ir.evaluate import evaluate

# relative to the output's greatest magnitude: a graph runs the module's own ops, so only the moec ops' sums differ
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
SIZES = (1, 2, 7)
OTHERS = 3  # the size of the other dimensions while one alone is 1

DynamicDims = dict[int, dict[int, str]]  # flat input -> dimension -> name


def each_dim(dims: DynamicDims) -> Iterator[tuple[int, int, str]]:
    """(flat input, dimension, name) of every dynamic dimension."""
    for i, ds in dims.items():
        for d, name in ds.items():
            yield i, d, name


def resized(value: Any, dims: dict[int, str], sizes: dict[str, int]) -> Any:
    """A tensor with other sizes, its entries repeated or cut."""
    for d, name in dims.items():
        if value.shape[d] != sizes[name]:
            index = torch.arange(sizes[name], device=value.device) % max(1, value.shape[d])
            value = (
                value.index_select(d, index)
                if value.shape[d]
                else value.new_zeros([*value.shape[:d], sizes[name], *value.shape[d + 1 :]])
            )
    return value


@torch.no_grad()
def compare(module: nn.Module, captured: Captured, inputs: tuple[Any, ...], dims: DynamicDims) -> None:
    """Runs both at 1, 2 and 7 of all symbolic sizes, and with each alone 1. Raises: UnsupportedModel: they differ."""
    flat, spec = pytree.tree_flatten(inputs)
    if any(t.is_meta for t in [*module.parameters(), *(v for v in flat if isinstance(v, Tensor))]):
        return
    for sizes in _probes({name for _, _, name in each_dim(dims)}):
        values = [resized(v, dims.get(i, {}), sizes) for i, v in enumerate(flat)]
        compare_at(module, captured, pytree.tree_unflatten(values, spec), sizes)


@torch.no_grad()
def compare_at(module: nn.Module, captured: Captured, inputs: tuple[Any, ...], sizes: dict[str, int]) -> None:
    """Runs both on inputs of these sizes. Raises: UnsupportedModel: they differ."""
    values, spec = pytree.tree_flatten(inputs)
    try:
        expected = pytree.tree_leaves(module(*pytree.tree_unflatten([_copy(v) for v in values], spec)))
    except (RuntimeError, ValueError, IndexError):
        return  # the module itself does not take this size
    found = pytree.tree_leaves(
        evaluate(captured.graph_module, [v for v in values if isinstance(v, Tensor)], captured.read)
    )
    for a, b in zip(expected, found, strict=True):
        _check_close(module, a, b, sizes)


def _probes(names: set[str]) -> list[dict[str, int]]:
    """All sizes together, then each alone as 1."""
    together = [dict.fromkeys(names, size) for size in SIZES] if names else [{}]
    return together + ([{**dict.fromkeys(names, OTHERS), n: 1} for n in sorted(names)] if len(names) > 1 else [])


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _check_close(module: nn.Module, expected: Any, found: Tensor, sizes: dict[str, int]) -> None:
    if not isinstance(expected, Tensor):
        return
    named = ", ".join(f"{n} = {s}" for n, s in sorted(sizes.items()))
    where = f"{type(module).__name__}: for sizes {named or 'of the example'} its graph"
    if expected.shape != found.shape:
        raise UnsupportedModel(f"{where} gives shape {list(found.shape)}, the module {list(expected.shape)}")
    if not expected.is_floating_point():
        if not torch.equal(expected, found):
            raise UnsupportedModel(f"{where} gives other integers than the module")
        return
    if expected.numel() == 0:
        return
    scale = expected.float().abs().max().clamp(min=1e-30)
    error = float((expected.float() - found.float()).abs().max() / scale)
    if not error <= TOLERANCE.get(expected.dtype, 1e-5):
        raise UnsupportedModel(
            f"{where} differs from the module by {error:.1e} (relative); "
            "does it branch on a size or draw random numbers?"
        )

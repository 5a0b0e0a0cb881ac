"""How each tensor of a transformers model is made from checkpoint tensors, read from the library's conversion mapping.

The mapping is data: renamings, and converters with a list of operations. The operations become expressions of
passes/ir/weights.py, so that experts can be read one at a time.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from moec.compiler.errors import CheckpointError, UnsupportedModel
from moec.passes.ir.weights import Weight, concat, reshape, slice_, stack, transpose

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass
class _Group:
    """The checkpoint tensors of one model tensor: by the converter's source pattern, in natural order."""

    converter: WeightConverter | None
    names: dict[str, list[str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Job:
    """One conversion under way. values: by source pattern, later by target pattern; a list until it is merged."""

    target: str
    converter: WeightConverter
    shapes: Shapes
    names: Mapping[str, list[str]]


def transformers_recipes(model: Any, stored: Mapping[str, Weight]) -> dict[str, Weight]:
    """Model tensor -> Weight, for everything that the checkpoint's tensors make; model may be on the meta device.

    stored: the checkpoint's tensors by their unquantised names.

    Raises: CheckpointError: a tensor of a list (an expert) is missing.  UnsupportedModel: an unknown operation.
    """
    state = model.state_dict()
    shapes = {name: tuple(t.shape) for name, t in state.items()}
    made: dict[str, Weight] = {}
    for target, group in _groups(model, stored, state).items():
        if group.converter is None:
            ((name,),) = group.names.values()
            made[target] = stored[name]
            continue
        order = {p: i for i, p in enumerate(group.converter.source_patterns)}
        names = dict(sorted(group.names.items(), key=lambda item: order[item[0]]))
        job = _Job(target, group.converter, shapes, names)
        values: dict[str, Any] = {pattern: [stored[n] for n in listed] for pattern, listed in names.items()}
        made |= _convert(job, values)
    return made


def _groups(model: Any, stored: Mapping[str, Weight], state: dict[str, Any]) -> dict[str, _Group]:
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    groups: dict[str, _Group] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:  # the library's own second try: a name of the model stays
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        group = groups.setdefault(target, _Group(by_pattern.get(pattern) if pattern is not None else None))
        listed = group.names.setdefault(pattern or target, [])
        if listed and group.converter is None:
            raise CheckpointError(f"tensors {listed[0]} and {name} both become {target}; remove one")
        listed.append(name)
    return groups


def _convert(job: _Job, values: dict[str, Any]) -> dict[str, Weight]:
    for operation in job.converter.operations:
        kind = type(operation).__name__
        if kind not in _OPERATIONS:
            raise UnsupportedModel(f"{job.target}: the checkpoint conversion {kind} has no expression here")
        values = _OPERATIONS[kind](job, operation, values)
    single = {k: (v[0] if isinstance(v, list) else v) for k, v in values.items()}
    targets = job.converter.target_patterns
    if len(single) == 1 and len(targets) == 1:
        return {job.target: next(iter(single.values()))}
    full = job.target.replace("*.", "0.")
    key = next((k for k in single if k in full), None)
    if key is None:
        raise UnsupportedModel(f"{job.target}: its checkpoint conversion names no target of the model")
    prefix, _, suffix = full.partition(key)
    return {prefix + k + suffix: v for k, v in single.items()}


def _only(job: _Job, values: dict[str, Any]) -> Weight:
    if len(values) != 1:
        raise UnsupportedModel(f"{job.target}: a checkpoint conversion of {len(values)} tensors where one is known")
    (value,) = values.values()
    return value[0] if isinstance(value, list) else value


def _merge(job: _Job, operation: Any, values: dict[str, Any]) -> dict[str, Any]:
    if operation.dim not in (0, 1):
        raise UnsupportedModel(f"{job.target}: experts stacked along dimension {operation.dim}")
    count = job.shapes[job.target][operation.dim] if job.target in job.shapes else None
    merged: dict[str, Any] = {}
    for pattern, parts in values.items():
        _check_list(job, pattern, parts, count)
        merged[pattern] = stack(parts) if operation.dim == 0 else transpose(stack(parts), 0, 1)
    return merged


def _check_list(job: _Job, pattern: str, parts: list[Weight], count: int | None) -> None:
    """Every member of a list of experts must be there and have one shape."""
    names = job.names[pattern]
    numbers = {int(m[1]): n for n in names if (m := _member(n))}
    if count is not None and len(numbers) == len(names):
        for i in range(count):
            if i not in numbers:
                lost = _renumber(names[0], i)
                raise CheckpointError(f"tensor {lost} is missing; config.json says {count} experts; download it again")
    for part in parts[1:]:
        if part.shape != parts[0].shape:
            raise CheckpointError(f"tensor {part}: expected shape {list(parts[0].shape)}, got {list(part.shape)}")


_MEMBER = re.compile(r"experts\.(\d+)\.")


def _member(name: str) -> re.Match[str] | None:
    return _MEMBER.search(name)


def _renumber(name: str, index: int) -> str:
    return _MEMBER.sub(f"experts.{index}.", name, count=1)


def _concatenate(job: _Job, operation: Any, values: dict[str, Any]) -> dict[str, Any]:
    parts = [p for v in values.values() for p in (v if isinstance(v, list) else [v])]
    return {job.converter.target_patterns[0]: concat(parts, operation.dim)}


def _transpose(job: _Job, operation: Any, values: dict[str, Any]) -> dict[str, Any]:
    weight = _only(job, values)
    if operation.check_dims and weight.shape == job.shapes.get(job.target):
        return {job.converter.target_patterns[0]: weight}
    key = job.converter.target_patterns[0] if len(job.converter.target_patterns) == 1 else next(iter(values))
    return {key: transpose(weight, operation.dim0, operation.dim1)}


def _chunk(job: _Job, operation: Any, values: dict[str, Any]) -> dict[str, Any]:
    weight, targets = _only(job, values), job.converter.target_patterns
    if operation.num_shards_attribute is not None:
        raise UnsupportedModel(f"{job.target}: a checkpoint tensor cut by {operation.num_shards_attribute}")
    dim = operation.dim % len(weight.shape)
    width = -(-weight.shape[dim] // len(targets))
    return {t: slice_(weight, dim, i * width, min((i + 1) * width, weight.shape[dim])) for i, t in enumerate(targets)}


def _split(job: _Job, operation: Any, values: dict[str, Any]) -> dict[str, Any]:
    weight, targets = _only(job, values), job.converter.target_patterns
    at, parts = 0, {}
    for target in targets:
        width = job.shapes[job.target.replace(targets[0], target)][operation.dim]
        parts[target] = slice_(weight, operation.dim, at, at + width)
        at += width
    return parts


def _interleave(job: _Job, operation: Any, values: dict[str, Any]) -> dict[str, Any]:
    weight, dim = _only(job, values), operation.dim
    half = weight.shape[dim] // 2
    pair = (2, half) if operation.inverse else (half, 2)
    split = reshape(weight, (*weight.shape[:dim], *pair, *weight.shape[dim + 1 :]))
    return {job.converter.target_patterns[0]: reshape(transpose(split, dim, dim + 1), weight.shape)}


_OPERATIONS: dict[str, Callable[[_Job, Any, dict[str, Any]], dict[str, Any]]] = {
    "MergeModulelist": _merge,
    "Concatenate": _concatenate,
    "Transpose": _transpose,
    "Chunk": _chunk,
    "Split": _split,
    "Interleave": _interleave,
}

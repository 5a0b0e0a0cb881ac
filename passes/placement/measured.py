"""Measured kernel times in the cost model: where a tuning database has them, they replace the fitted efficiency.

A measured time says how much slower or faster an operation is than the model takes it to be. The factor of an operation
on a device is the geometric mean over the sizes and numbers of tokens that were measured; it multiplies the operation's
time at every load, so that the model keeps the properties that bounds rest on (cost.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from moec.passes.hardware.device import Device
from moec.passes.hardware.errors import PlacementError
from moec.passes.placement.cost import CostParameters
from moec.passes.placement.model_shape import ModelShape
from moec.passes.placement.weight_format import WeightFormat, attention_format

TOKENS = (1, 8, 64, 512, 4096)
"""Where times are asked for."""
Shape = tuple[int, ...]


class KernelTimes(Protocol):
    """Times of kernels on one device. A tuning database implements it, and so does TimesTable."""

    def measured(self, op: str, shape: Shape, tokens: int) -> float | None:
        """Microseconds, None where nothing was measured.

        Args:
            op: "linear", shape (out, in); "gated_mlp", (width, hidden); "experts", (experts, width, hidden, top_k), a
                whole layer of routed experts under even use.
        """
        ...


class TimesTable:
    """Times from JSON: {"times": [{"op": "linear", "shape": [4096, 4096], "tokens": 64, "us": 41.5}, ..]}."""

    def __init__(self, data: object, where: str) -> None:
        """Raises: PlacementError: a field is missing or no positive number."""
        try:
            rows = data["times"]  # type: ignore[index]
            self._us = {(str(r["op"]), tuple(map(int, r["shape"])), int(r["tokens"])): float(r["us"]) for r in rows}
        except (KeyError, TypeError, ValueError) as error:
            raise PlacementError(
                f"{where}: expected times with op, shape, tokens and us, found no good {error}"
            ) from error
        bad = next((key for key, us in self._us.items() if not (math.isfinite(us) and us > 0)), None)
        if bad is not None:
            raise PlacementError(
                f"{where}: {bad[0]} {list(bad[1])} at {bad[2]} tokens takes {self._us[bad]} us; expected > 0"
            )

    def measured(self, op: str, shape: Shape, tokens: int) -> float | None:
        """Microseconds, as KernelTimes; only sizes and token counts that stand in the table."""
        return self._us.get((op, shape, tokens))


@dataclass(frozen=True)
class Factor:
    """How much slower than modelled an operation was measured to be, over how many points."""

    factor: float
    points: int


def with_measured(
    params: CostParameters,
    shape: ModelShape,
    weights: WeightFormat,
    devices: Mapping[str, Device],
    times: Mapping[str, KernelTimes],
) -> tuple[CostParameters, dict[str, dict[str, Factor]]]:
    """The parameters with measured factors, and those factors by device and part of the step.

    Args:
        devices: by name, those of the mesh. times: by device name; a device without any keeps the fitted efficiency.
    """
    found: dict[str, dict[str, Factor]] = {}
    for name, device in devices.items():
        ratios: dict[str, list[float]] = {}
        for part, op, sizes, fmt in _operations(shape, weights) if name in times else ():
            for tokens in TOKENS:
                us = times[name].measured(op, sizes, tokens)
                if us is not None:
                    ratios.setdefault(part, []).append(us * 1e-6 / _modelled(params, device, op, sizes, tokens, fmt))
        made = {part: Factor(math.exp(sum(map(math.log, r)) / len(r)), len(r)) for part, r in ratios.items()}
        found |= {name: made} if made else {}
    factors = {name: {part: f.factor for part, f in made.items()} for name, made in found.items()}
    return replace(params, measured=factors), found


def _operations(shape: ModelShape, weights: WeightFormat) -> Iterator[tuple[str, str, Shape, WeightFormat]]:
    """(part of the step, operation, sizes, format) of every kind of product in the model, whole."""
    hidden, projections = shape.hidden, attention_format(weights)
    for c in shape.layers:
        a = c.attention
        if not a.is_latent:
            yield "attention", "linear", (a.heads * a.head_dim, hidden), projections
            yield "attention", "linear", (a.kv_heads * a.head_dim, hidden), projections
            yield "attention", "linear", (hidden, a.heads * a.head_dim), projections
        if c.dense is not None:
            yield "dense", "gated_mlp", (c.dense.width, hidden), weights
        if c.moe is not None:
            yield "experts", "experts", (c.moe.num_experts, c.moe.width, hidden, c.moe.top_k), weights
    yield "head", "linear", (shape.vocab, hidden), replace(weights, bits=16, groups=(), arithmetic="bf16")


def _modelled(
    params: CostParameters, device: Device, op: str, sizes: Shape, tokens: int, weights: WeightFormat
) -> float:
    """Seconds that the fitted model gives the operation on one device."""
    used, top_k = 1.0, 1
    if op == "experts":
        num_experts, width, hidden, top_k = sizes
        used = num_experts * (1 - (1 - top_k / num_experts) ** tokens)
        values = 3 * width * hidden
    else:
        values = sizes[0] * sizes[1] * (3 if op == "gated_mlp" else 1)
    read = used * values * weights.bits / 8 / params.bytes_per_s(device)
    return max(read, 2.0 * values * top_k * tokens / params.flops(device, weights.arithmetic))


def measured_json(found: Mapping[str, Mapping[str, Factor]]) -> dict[str, Any]:
    """What a plan says of the times it used: by device and part."""
    return {d: {p: {"factor": f.factor, "points": f.points} for p, f in parts.items()} for d, parts in found.items()}

"""How much work a tuned problem is, from its key alone: bytes that must move and operations."""

from __future__ import annotations

import dataclasses
import re

from moec.compiler.tune.record import Key, shape_sizes

_BITS = {
    "float32": 32.0,
    "f32": 32.0,
    "bfloat16": 16.0,
    "bf16": 16.0,
    "bf16-packed": 12.125,
    "float16": 16.0,
    "fp8": 8.0,
    "float8_e4m3fn": 8.0,
}
_BITS |= {"int8": 8.0, "mxfp4": 4.25, "nf4": 4.0, "ternary": 2.0}
_GROUP_SCALE_BITS = 16


@dataclasses.dataclass(frozen=True)
class Work:
    """num_bytes: weights of the experts in use, x and y once. flops: multiplications and additions."""

    num_bytes: float
    flops: float

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.num_bytes


def work_of(key: Key) -> Work | None:
    """Of a layer of experts, or of one of its GEMMs ("mode" in the shape); None: the key does not say enough.

    Experts in use: as many as tokens * K different draws hit when all are as likely; fewer are with skewed routing, so
    that the bytes are an upper limit of what must move.
    """
    sizes = shape_sizes(key.shape)
    if not all(type(sizes.get(name)) is int for name in "EFHK"):
        return None
    experts, inner, hidden, top_k = (int(sizes[name]) for name in "EFHK")
    shared = int(sizes.get("S", 0))
    used = experts * (1 - (1 - top_k / experts) ** key.tokens) + shared
    matrices = {"gate_up": 2, "down": 1}.get(str(sizes.get("mode")), 3)
    values = matrices * inner * hidden
    width = {"gate_up": hidden + inner * (top_k + shared), "down": hidden + inner * (top_k + shared)}
    rows = width.get(str(sizes.get("mode")), 2 * hidden)
    num_bytes = used * values * bits_of(key.weight_format) / 8 + 2 * key.tokens * rows
    return Work(num_bytes, 2.0 * key.tokens * (top_k + shared) * values)


def bits_of(weight_format: str) -> float:
    """Bits of a weight with its share of a scale: "int4-g64" -> 4.25; 16 for a name that says nothing."""
    name, _, group = weight_format.split("/")[0].partition("-g")
    found = re.match(r"int(\d+)", name)
    bits = _BITS.get(name, float(found[1]) if found else 16.0)
    size = re.match(r"\d+", group)
    return bits + (_GROUP_SCALE_BITS / int(size[0]) if size else 0.0)

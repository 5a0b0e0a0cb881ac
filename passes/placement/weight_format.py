"""Bytes of a weight matrix in each storage format, and where a matrix may be cut.

Definitions (one line each; "K" is the dimension that a dot product runs over):
    f32      4 bytes a value.
    bf16     2 bytes a value; fp16 the same.
    fp8      e4m3, 1 byte a value, one f32 scale per matrix. The scales (4 bytes a matrix) are part of the reserve.
    int8     1 byte a value, one f32 scale per output channel.
    int4     4 bits a value, symmetric, one bf16 scale per group of 128 along K, or of 64, 32, 16 where 128 does not
             divide the width that is cut (4.125 bits a value at 128).
    int2     2 bits a value, one bf16 scale per group of 64 (or 32, 16) along K; experts only.
    ternary  2 bits a value (-1, 0, 1), one f32 scale per output channel; experts only.
    mxfp4    4-bit floats, one 8-bit exponent per 32 along K (OCP MX 1.0); experts only.
Router, norms, embedding and output projection stay bf16 in every format.
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.passes.hardware.errors import PlacementError


@dataclass(frozen=True)
class WeightFormat:
    """How weights are stored.

    Args:
        bits: bits of one value.
        groups: group sizes along K in order of preference; empty where scales are not grouped.
        group_scale_bytes: bytes of one group's scale.
        channel_scale_bytes: bytes of one output channel's scale.
        arithmetic: the format that the matrix multiplication runs in.
        experts_only: attention projections stay bf16.
    """

    name: str
    bits: int
    groups: tuple[int, ...] = ()
    group_scale_bytes: int = 0
    channel_scale_bytes: int = 0
    arithmetic: str = "bf16"
    experts_only: bool = False

    def group_for(self, width: int, what: str) -> int:
        """The group size that divides `width`, 0 where the format has none.

        Raises:
            PlacementError: no group size divides the width.
        """
        if not self.groups:
            return 0
        found = next((g for g in self.groups if width % g == 0), None)
        if found is None:
            sizes = ", ".join(map(str, self.groups))
            raise PlacementError(
                f"{what}: width {width} is no multiple of a {self.name} group ({sizes}); choose bf16, fp8 or int8"
            )
        return found

    def cut_granule(self, width: int, what: str) -> int:
        """Values between legal cuts of a dimension of `width`: the quantisation group, else 16 (one MMA tile) or
        less."""
        return self.group_for(width, what) or next(g for g in (16, 8, 4, 2, 1) if width % g == 0)

    def matrix_bytes(self, num_out: int, num_in: int, group: int) -> float:
        """Bytes of num_out x num_in values whose groups along num_in hold `group` values (0: no groups)."""
        scales = num_out * num_in / group * self.group_scale_bytes if group else 0
        return num_out * num_in * self.bits / 8 + scales


FORMATS: dict[str, WeightFormat] = {
    f.name: f
    for f in (
        WeightFormat("f32", 32),
        WeightFormat("bf16", 16),
        WeightFormat("fp16", 16),
        WeightFormat("fp8", 8, arithmetic="fp8"),
        WeightFormat("int8", 8, channel_scale_bytes=4, arithmetic="int8"),
        WeightFormat("int4", 4, (128, 64, 32, 16), 2),
        WeightFormat("int2", 2, (64, 32, 16), 2, experts_only=True),
        WeightFormat("ternary", 2, channel_scale_bytes=4, experts_only=True),
        WeightFormat("mxfp4", 4, (32,), 1, experts_only=True),
    )
}


def weight_format(name: str) -> WeightFormat:
    """The format called `name`; raises PlacementError with the known names."""
    if name not in FORMATS:
        raise PlacementError(f"weights '{name}': unknown format; expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def attention_format(weights: WeightFormat) -> WeightFormat:
    """The format of the attention projections where experts are stored in `weights`."""
    return FORMATS["bf16"] if weights.experts_only else weights

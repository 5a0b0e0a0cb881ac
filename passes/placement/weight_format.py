"""Bytes of a weight matrix in each storage format, and where a matrix may be cut.

The formats are those of passes/ir/formats.py (see docs/formats.md), with what a plan assumes of each:
    f32, bf16, fp16
    fp8      fp8-tensor: the one scale of a matrix is part of the reserve.
    int8     per output channel; products run in int8.
    int4     groups of 128, 64, 32 or 16 along K, the first that divides the width that is cut.
    int2     groups of 64, 32 or 16; experts only.
    ternary  counted with 2 bits a value, as kernels keep it (1.6 where it is only stored); experts only.
    mxfp4    experts only.
    fp8-experts, int8-experts, int4-experts    the same for the experts alone: what compile's `--weights int4` stores.
Router, norms, embedding and output projection stay bf16 in every format. Where compile's `--weights int4` means the
experts, a plan's means attention too.
"""

from __future__ import annotations

from dataclasses import dataclass

from moec.passes.hardware.errors import PlacementError
from moec.passes.ir.formats import SCALE_BYTES, parse_format


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

    def grouped_bytes(self, num_out: int, num_in: int, group: int) -> float:
        """Bytes of num_out x num_in values and of the scales of their groups along num_in, which hold `group` values
        (0: no groups); the scales of channels are counted apart."""
        scales = num_out * num_in / group * self.group_scale_bytes if group else 0
        return num_out * num_in * self.bits / 8 + scales


def _as_stored(
    name: str,
    stored: str = "",
    *,
    more_groups: tuple[int, ...] = (),
    arithmetic: str = "bf16",
    experts_only: bool = False,
) -> WeightFormat:
    """A plan's format from the definition of the stored one (by default of the same name)."""
    f = parse_format(stored or name)
    scale_bytes = SCALE_BYTES[f.scale]
    return WeightFormat(
        name,
        max(2, int(f.bits)),
        (*f.groups, *more_groups),
        scale_bytes if f.groups else 0,
        scale_bytes if f.block == (1, 0) else 0,
        arithmetic,
        experts_only,
    )


FORMATS: dict[str, WeightFormat] = {
    f.name: f
    for f in (
        _as_stored("f32"),
        _as_stored("bf16"),
        _as_stored("fp16", "f16"),
        _as_stored("fp8", "fp8-tensor", arithmetic="fp8"),
        _as_stored("int8", arithmetic="int8"),
        _as_stored("int4", more_groups=(16,)),
        _as_stored("int2", experts_only=True),
        _as_stored("ternary", experts_only=True),
        _as_stored("mxfp4", experts_only=True),
        _as_stored("fp8-experts", "fp8-tensor", arithmetic="fp8", experts_only=True),
        _as_stored("int8-experts", "int8", arithmetic="int8", experts_only=True),
        _as_stored("int4-experts", "int4", more_groups=(16,), experts_only=True),
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

"""Weight formats: what the codes of a stored weight mean, which values share a scale, and how many bytes that takes.

A weight matrix is [N, K]: N outputs, K inputs, so a dot product runs along K. Its value is
    float      the code read as a number (bf16, f16, f32), or e4m3 * scale (fp8)
    int        (code - zero) * scale; symmetric formats have no zero, and their scale may be negative
    codebook   codebook[code] * scale
Names:
    f32 bf16 f16             no scales
    bf16-packed              bf16 in 12 bits without loss (passes/ir/packed.py), for experts on CPUs
    fp8                      e4m3 (largest number 448), f32 scales: fp8-channel (the same as fp8), fp8-tensor (one for a
                             matrix), fp8-block128 (one for 128 x 128 values)
      fp8-w8a8               activations too are rounded to e4m3, a scale for each token, when they meet these weights
    int8 int4 int3 int2      signed codes, -127..127, -8..7, -4..3, -2..1. -gN: one bf16 scale for N values along K;
                             without it, int8 has one f32 scale per row, int4 the first of g128, g64, g32 that divides
                             K, int3 of g64, g32, int2 of g64, g32, g16
      -asym                  unsigned codes and a zero (one byte) beside each scale
      -f16, -f32             scales in that type
      -a8                    activations are rounded to int8 with a scale for each token when they meet these weights;
                             int8-w8a8 is int8-a8
    nf4                      16 quantiles of a normal distribution, groups as int4 (g64 first)
    mxfp4                    4-bit floats e2m1, one e8m0 exponent (a power of two) for 32 values along K
    ternary                  -1, 0, 1, one f32 scale per row; five in a byte
Sources: OCP 8-bit floats 1.0; OCP Microscaling Formats 1.0; QLoRA (arXiv 2305.14314), appendix E, for NF4's numbers.
"""

from __future__ import annotations

import dataclasses
import re

import torch

from moec.passes.ir import packed
from moec.passes.ir.dequantise import E2M1

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SCALE_NAMES = {dtype: name for name, dtype in FLOATS.items()}
SCALE_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "e8m0": 1, "none": 0}
TRITS_PER_BYTE = 5


class FormatError(ValueError):
    """An unknown format, a weight that a format cannot hold, or scales that are no scales."""


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """How a weight is stored; see the module.

    Args:
        name: canonical: parse_format(name) gives this format again.
        bits: of a code as it is stored; 1.6 for ternary.
        kind: "float", "int" or "codebook".
        block: (rows, columns) of the values that share a scale; 0 means all of that axis.
        symmetric: False: there are zeros.
        scale: "f32", "bf16", "f16", "e8m0", or "none" where there are no scales.
        codebook: the 16 numbers by code.
        act: "int8", "fp8": activations are rounded to int8 or e4m3 per token; None: they stay as they are.
        wider: other group sizes that the name also stands for, tried in order where the first does not divide K.
    """

    name: str
    bits: float
    kind: str
    block: tuple[int, int] = (1, 0)
    symmetric: bool = True
    scale: str = "none"
    codebook: tuple[float, ...] = ()
    act: str | None = None
    wider: tuple[int, ...] = ()

    @property
    def group(self) -> int:
        """Values along K that share a scale; 0: a whole row or more."""
        return self.block[1]

    @property
    def groups(self) -> tuple[int, ...]:
        """The group sizes that the name stands for, in order of preference; empty where groups have no size."""
        return (self.group, *self.wider) if self.group and self.block[0] == 1 else ()

    @property
    def is_plain(self) -> bool:
        """Codes are the numbers themselves, without scales."""
        return self.scale == "none"

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers of a plain format."""
        return torch.bfloat16 if self.is_packed else FLOATS[self.name]

    @property
    def is_packed(self) -> bool:
        """Its numbers are bf16; kernels of experts read them in fewer bits."""
        return self.name == packed.NAME

    @property
    def code_range(self) -> tuple[int, int]:
        """The smallest and the largest code of an int format."""
        if self.bits < 2:
            return -1, 1
        bits = int(self.bits)
        if not self.symmetric:
            return 0, (1 << bits) - 1
        return (-127, 127) if bits == 8 else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)

    def fitted(self, columns: int, what: str = "weight") -> WeightFormat:
        """The format with the one group size that divides K = columns. Raises: FormatError: none does."""
        if not self.groups:
            return self
        found = next((g for g in self.groups if columns % g == 0), None)
        if found is None:
            sizes = " or ".join(map(str, self.groups))
            raise FormatError(
                f"{what}: its rows of {columns} values are no multiple of {self.name}'s groups of {sizes}; "
                f"choose a smaller group, or int8 or fp8"
            )
        if found == self.group and not self.wider:
            return self
        stem, _, rest = self.name.partition("-")
        name = self.name if rest.startswith("g") or stem == "mxfp4" else f"{stem}-g{found}" + (rest and f"-{rest}")
        return dataclasses.replace(self, name=name, block=(1, found), wider=())

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """The shape of a matrix's scales."""
        height, width = self.block[0] or max(rows, 1), self.block[1] or max(columns, 1)
        return -(-rows // height), -(-columns // width)

    def row_bytes(self, columns: int) -> int:
        """Bytes of the codes of one row: 5 ternary codes in a byte, else bits after bits, filled up to a byte."""
        if self.bits < 2:
            return -(-columns // TRITS_PER_BYTE)
        return -(-columns * int(self.bits) // 8)

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix: codes, scales and zeros."""
        fitted = self.fitted(columns)
        height, width = fitted.grid(rows, columns)
        per_scale = SCALE_BYTES[self.scale] + (not self.symmetric)
        if self.is_packed:
            return rows * (fitted.row_bytes(columns) + 4) + -(-rows // packed.ROWS) * packed.exception_bytes(columns)
        return rows * fitted.row_bytes(columns) + (0 if self.is_plain else height * width * per_scale)


_GROUPS = {8: (0,), 4: (128, 64, 32), 3: (64, 32), 2: (64, 32, 16)}
_INT = re.compile(r"int([8432])(?:-g(16|32|64|128|256))?(-asym)?(?:-(bf16|f16|f32))?(-a8|-w8a8)?")
_NF4 = re.compile(r"nf4(?:-g(16|32|64|128|256))?")
_FP8 = {
    "fp8": (1, 0),
    "fp8-channel": (1, 0),
    "fp8-w8a8": (1, 0),
    "fp8-tensor": (0, 0),
    "fp8-block128": (128, 128),
}

NAMES = (
    "f32", "bf16", "bf16-packed", "f16", "fp8", "fp8-tensor", "fp8-block128", "int8", "int8-w8a8", "int4", "int4-g32",
    "int4-g64", "int4-g128", "int4-g32-asym", "int4-g64-asym", "int4-g128-asym", "nf4", "nf4-g32", "nf4-g64",
    "nf4-g128", "mxfp4", "int3-g32", "int3-g64", "int2-g16", "int2-g32", "int2-g64", "ternary",
)  # fmt: skip
"""The formats that are measured and documented; the grammar in the module gives more."""


def parse_format(name: str) -> WeightFormat:
    """The format that a name stands for. Raises: FormatError: it is none; the message lists the names."""
    if name in FLOATS:
        return WeightFormat(name, 8 * FLOATS[name].itemsize, "float")
    if name == packed.NAME:
        return WeightFormat(name, packed.BITS, "float")
    if name in _FP8:
        canonical = "fp8" if name == "fp8-channel" else name
        return WeightFormat(canonical, 8, "float", _FP8[name], scale="f32", act="fp8" if name == "fp8-w8a8" else None)
    if name == "mxfp4":
        return WeightFormat(name, 4, "codebook", (1, 32), scale="e8m0", codebook=E2M1)
    if name == "ternary":
        return WeightFormat(name, 8 / TRITS_PER_BYTE, "int", scale="f32")
    if found := _NF4.fullmatch(name):
        first, *wider = (int(found[1]),) if found[1] else (64, 32, 128)
        return WeightFormat(name, 4, "codebook", (1, first), scale="bf16", codebook=NF4, wider=tuple(wider))
    if found := _INT.fullmatch(name):
        return _int_format(found)
    raise FormatError(f"weight format {name!r} is unknown; known: {', '.join(NAMES)}")


def _int_format(found: re.Match[str]) -> WeightFormat:
    bits, group, asym, scale, act = found.groups()
    first, *wider = (int(group),) if group else _GROUPS[int(bits)]
    usual = "bf16" if first else "f32"
    name = f"int{bits}" + (f"-g{group}" if group else "") + (asym or "")
    name += (f"-{scale}" if scale and scale != usual else "") + ("-a8" if act else "")
    return WeightFormat(
        "int8-w8a8" if name == "int8-a8" else name,
        int(bits),
        "int",
        (1, first),
        symmetric=not asym,
        scale=scale or usual,
        act="int8" if act else None,
        wider=tuple(wider),
    )

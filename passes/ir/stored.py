"""The bytes of a quantised matrix as an engine without a kernel for its format keeps them.

A matrix is three sections, each filled up to 64 bytes: codes row by row, scales, zeros. A row's codes are
    8 bits       a byte each, signed codes as two's complement
    4 and 2 bits the first code in the lowest bits of a byte; signed codes have their range's low end subtracted
    3 bits       the low two bits of all codes as 2-bit codes, then the high bits, eight in a byte
    ternary      five digits 0, 1, 2 for -1, 0, 1 in a byte: d0 + 3 d1 + 9 d2 + 27 d3 + 81 d4
    plain        the numbers themselves; those of bf16-packed too
The runtime's reader is runtime/launch/stored.py; tests compare the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.passes.ir.formats import FLOATS, SCALE_BYTES, TRITS_PER_BYTE, WeightFormat
from moec.passes.ir.quantise import Parts

ALIGN_BYTES = 64


def section_bytes(format: WeightFormat, rows: int, columns: int) -> tuple[int, int, int]:
    """Bytes of codes, scales and zeros of one matrix, each a multiple of 64."""
    height, width = format.grid(rows, columns)
    scales = 0 if format.is_plain else height * width
    row_bytes = columns * format.dtype.itemsize if format.is_plain else format.row_bytes(columns)
    sizes = rows * row_bytes, scales * SCALE_BYTES[format.scale], 0 if format.symmetric else scales
    return tuple(size + -size % ALIGN_BYTES for size in sizes)  # type: ignore[return-value]


def stored_matrix_bytes(format: WeightFormat, rows: int, columns: int) -> int:
    """Bytes of one matrix, the filling of its sections included; without it, see WeightFormat.matrix_bytes."""
    return sum(section_bytes(format, rows, columns))


def store(parts: Parts) -> Tensor:
    """[.., N, K] parts -> u8[number of matrices * stored_matrix_bytes]."""
    format = parts.format
    rows, columns = parts.codes.shape[-2:]
    sizes = section_bytes(format, rows, columns)
    codes = parts.codes.reshape(-1, rows, columns)
    out = torch.zeros(len(codes), sum(sizes), dtype=torch.uint8)
    packed = _packed(codes, format).reshape(len(codes), -1)
    out[:, : packed.shape[1]] = packed
    if parts.scales is not None:
        scales = _scale_bytes(parts.scales.reshape(len(codes), -1), format)
        out[:, sizes[0] : sizes[0] + scales.shape[1]] = scales
    if parts.zeros is not None:
        zeros = parts.zeros.reshape(len(codes), -1)
        out[:, sizes[0] + sizes[1] : sizes[0] + sizes[1] + zeros.shape[1]] = zeros
    return out.flatten()


def _scale_bytes(scales: Tensor, format: WeightFormat) -> Tensor:
    if format.scale == "e8m0":
        return scales.to(torch.float8_e8m0fnu).view(torch.uint8)
    return scales.to(FLOATS[format.scale]).contiguous().view(torch.uint8)


def _packed(codes: Tensor, format: WeightFormat) -> Tensor:
    """[E, N, K] -> u8[E, N, row_bytes]."""
    if format.is_plain:
        return codes.contiguous().view(torch.uint8)
    if format.bits == 8:
        return codes.view(torch.uint8)
    low = format.code_range[0] if format.kind == "int" else 0
    digits = (codes.view(torch.uint8) - low).to(torch.uint8)  # modulo 256, so signs need no wider type
    if format.bits < 2:
        return _joined(digits, TRITS_PER_BYTE, 3)
    if format.bits == 3:
        return torch.cat([_joined(digits & 3, 4, 4), _joined(digits >> 2, 8, 2)], -1)
    per_byte = 8 // int(format.bits)
    return _joined(digits, per_byte, 1 << int(format.bits))


def _joined(digits: Tensor, count: int, base: int) -> Tensor:
    """[.., K] digits below `base` -> [.., ceil(K / count)] bytes, the first digit counting 1."""
    digits = torch.nn.functional.pad(digits, (0, -digits.shape[-1] % count)).unflatten(-1, (-1, count))
    joined = digits[..., count - 1].clone()
    for i in range(count - 2, -1, -1):
        joined.mul_(base).add_(digits[..., i])
    return joined

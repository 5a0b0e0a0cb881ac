"""Codes and scales from numbers, and numbers from codes and scales: what every weight format means, in plain torch.

The scale of a group is the one with the smallest squared error among a few clipped ones, rounded to the format's scale
type before the codes are chosen, then improved by least squares: where few codes are left, the largest value of a group
is worth less than the rest. Formats of 8 bits take the largest value as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from moec.passes.ir.formats import FLOATS, FormatError, WeightFormat

CHUNK_VALUES = 1 << 17  # values at a time: float32 copies of them stay in a core's cache
LARGEST_E4M3 = 448.0
SMALLEST_SCALE = 2.0**-126  # below it float32 has fewer bits; a group of zeros has this scale
CLIPS = (0.76, 0.84, 0.92, 1.0, 1.14)
TERNARY_CLIPS = (0.9, 1.2, 1.5, 1.8, 2.2)  # of the mean magnitude
REFINEMENTS = 2


@dataclasses.dataclass(frozen=True)
class Parts:
    """A weight of shape [.., N, K] as it is stored, unpacked.

    format: with one group size (WeightFormat.fitted).
    codes: [.., N, K]: i8 (symmetric int formats), u8 (asymmetric, codebook, and the bits of e4m3), or the numbers
        themselves in a plain float format.
    scales: f32[.., *format.grid(N, K)], each exact in the format's scale type, finite, never 0; None for plain formats.
    zeros: u8 of the scales' shape where the format is not symmetric.
    """

    format: WeightFormat
    codes: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None


def quantise(weight: Tensor, format: WeightFormat, what: str = "weight") -> Parts:
    """[.., N, K] in any floating dtype -> its codes and scales.

    Raises: FormatError: no group size divides K; NaN or infinity in the weight; a number too large for the format.
    """
    if weight.dim() < 2:
        raise FormatError(f"{what}: {format.name} holds matrices, this has shape {list(weight.shape)}")
    format = format.fitted(weight.shape[-1], what)
    if not _is_finite(weight):
        raise FormatError(f"{what}: holds NaN or infinity, which {format.name} cannot; the checkpoint is damaged")
    if format.is_plain:
        codes = weight.to(format.dtype)
        if not _is_finite(codes):
            raise FormatError(f"{what}: its numbers are too large for {format.name}; choose bf16 or f32")
        return Parts(format, codes)
    if format.kind == "float":
        return _quantise_fp8(weight, format)
    rows, columns = weight.shape[-2:]
    group = format.group or columns
    flat = weight.reshape(-1, group)
    codes = torch.empty(flat.shape, dtype=_code_dtype(format))
    scales = torch.empty(len(flat))
    zeros = None if format.symmetric else torch.empty(len(flat), dtype=torch.uint8)
    step = max(1, CHUNK_VALUES // max(group, 1))
    for start in range(0, len(flat), step):
        some = slice(start, start + step)
        code, scale, zero = _best(flat[some].float(), format)
        codes[some], scales[some] = code, scale
        if zeros is not None and zero is not None:
            zeros[some] = zero
    shape = (*weight.shape[:-2], *format.grid(rows, columns))
    return Parts(
        format,
        codes.reshape(weight.shape),
        scales.reshape(shape),
        None if zeros is None else zeros.reshape(shape),
    )


def _is_finite(weight: Tensor) -> bool:
    """Without NaN and infinity. Cost: one pass, no copy."""
    return not weight.numel() or all(math.isfinite(float(end)) for end in torch.aminmax(weight))


def dequantise_parts(parts: Parts, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that the parts mean: [.., N, K]. Each is one float32 product, rounded once; then it becomes `dtype`.

    Cost: float32 copies of CHUNK_VALUES values beside the result.
    """
    if parts.scales is None:
        return parts.codes.to(dtype)
    out = torch.empty(parts.codes.shape, dtype=dtype)
    *lead, rows, columns = out.shape
    height = parts.format.block[0] or max(rows, 1)
    step = max(CHUNK_VALUES // max(columns * math.prod(lead), 1) // height, 1) * height
    for start in range(0, rows, step):
        some, blocks = slice(start, start + step), slice(start // height, (start + step) // height)
        zeros = None if parts.zeros is None else parts.zeros[..., blocks, :]
        out[..., some, :] = _numbers(parts.format, parts.codes[..., some, :], parts.scales[..., blocks, :], zeros)
    return out


def _numbers(format: WeightFormat, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """f32[.., n, K], of rows that begin with a block."""
    if format.kind == "float":
        numbers = codes.view(torch.float8_e4m3fn).float()
    elif format.kind == "codebook":
        numbers = torch.tensor(format.codebook)[codes.int()]
    else:
        numbers = codes.float()
    rows, columns = codes.shape[-2:]
    if zeros is not None:
        numbers -= spread(zeros.float(), format, rows, columns)
    return numbers.mul_(spread(scales, format, rows, columns))


def check_parts(parts: Parts, what: str) -> Parts:
    """The parts as they are. Raises: FormatError: a scale is 0, NaN or infinite, or a code is a NaN of e4m3."""
    if parts.scales is not None and parts.scales.numel():
        bad = ~parts.scales.isfinite() | (parts.scales == 0)
        if bool(bad.any()):
            number = float(parts.scales[bad][0])
            raise FormatError(
                f"{what}: a scale is {number:g}, expected a finite number other than 0; the checkpoint is damaged"
            )
    if parts.format.bits == 8 and parts.format.kind == "float" and bool(((parts.codes & 0x7F) == 0x7F).any()):
        raise FormatError(f"{what}: holds NaN; the checkpoint is damaged")
    return parts


def spread(grid: Tensor, format: WeightFormat, rows: int, columns: int) -> Tensor:
    """One number for each block [.., a, b] -> for each value, [.., N or 1, K or 1]: axes with one block stay 1."""
    height, width = format.block
    if height > 1 and grid.shape[-2] > 1:
        grid = grid.repeat_interleave(height, -2)[..., :rows, :]
    if width and grid.shape[-1] > 1:
        grid = grid.repeat_interleave(width, -1)[..., :columns]
    return grid


def _code_dtype(format: WeightFormat) -> torch.dtype:
    return torch.int8 if format.kind == "int" and format.symmetric else torch.uint8


def _quantise_fp8(weight: Tensor, format: WeightFormat) -> Parts:
    """Codes as the bits of e4m3; the largest magnitude of a block becomes 448."""
    *lead, rows, columns = weight.shape
    height, width = format.block[0] or max(rows, 1), format.block[1] or max(columns, 1)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    scales = torch.empty((*lead, *format.grid(rows, columns)))
    for one, code, scale in zip(*(t.reshape(-1, *t.shape[-2:]) for t in (weight, codes, scales)), strict=True):
        padded = F.pad(one.abs(), (0, -columns % width, 0, -rows % height))
        blocks = padded.reshape(scale.shape[0], height, scale.shape[1], width)
        scale.copy_((blocks.amax((1, 3)).float() / LARGEST_E4M3).clamp_(min=SMALLEST_SCALE))
        for start in range(0, rows, 128):
            some = slice(start, start + 128)
            factor = spread(scale, format, rows, columns)
            factor = factor[some] if len(factor) > 1 else factor
            numbers = (one[some].float() / factor).clamp_(-LARGEST_E4M3, LARGEST_E4M3)
            code[some] = numbers.to(torch.float8_e4m3fn).view(torch.uint8)
    return Parts(format, codes, scales)


def _best(w: Tensor, format: WeightFormat) -> tuple[Tensor, Tensor, Tensor | None]:
    """f32[M, g] groups -> codes [M, g], scales f32[M], zeros u8[M]: the candidate of least squared error."""
    (scale, zero), *others = _candidates(w, format)
    code, least = _encode(w, scale, zero, format)
    for other, shift in others:
        _, error = _encode(w, other, shift, format)
        better = error < least
        scale, least = torch.where(better, other, scale), torch.where(better, error, least)
        zero = None if zero is None or shift is None else torch.where(better, shift, zero)
    if others:
        code, least = _encode(w, scale, zero, format)
    for _ in range(0 if format.scale == "e8m0" or format.bits == 8 else REFINEMENTS):
        other = _rounded(_least_squares(w, code, scale, zero, format), format)
        recoded, error = _encode(w, other, zero, format)
        better = error < least
        scale, least = torch.where(better, other, scale), torch.where(better, error, least)
        code = torch.where(better[:, None], recoded, code)
    return _as_codes(code, format), scale, zero


def _candidates(w: Tensor, format: WeightFormat) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(scales f32[M], zeros f32[M] or None), each scale exact in the format's scale type."""
    largest = w.abs().amax(1)
    if format.scale == "e8m0":
        exponent = torch.frexp(largest)[1] - 1 - 2  # OCP: the largest power of two below it over e2m1's largest, 4
        for more in (0, 1, -1):
            yield torch.exp2((exponent + more).clamp(-126, 127).float()), None
        return
    if not format.symmetric:
        low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
        for clip in CLIPS if format.bits < 8 else (1.0,):
            scale = _rounded((high - low) * (clip / format.code_range[1]), format)
            yield scale, (-low * clip / scale).round_().clamp_(0, format.code_range[1])
        return
    if format.kind == "codebook":
        for clip in CLIPS:
            yield _rounded(largest * clip, format), None
        return
    low_code, high_code = format.code_range
    if low_code == -high_code:
        ternary = high_code == 1
        start = w.abs().mean(1) if ternary else largest / high_code
        for clip in TERNARY_CLIPS if ternary else (1.0,):
            yield _rounded(start * clip, format), None
        return
    side = w.gather(1, w.abs().argmax(1, keepdim=True))[:, 0]  # the end with one code more is for the largest value
    for clip in CLIPS:
        yield _rounded(side * (clip / low_code), format), None
        if format.bits == 2:  # with four codes the other way round may be better
            yield _rounded(side * (-clip / low_code), format), None


def _rounded(scale: Tensor, format: WeightFormat) -> Tensor:
    """The scale in the format's scale type, kept away from 0 (and from f16's infinity)."""
    least = 2.0**-24 if format.scale == "f16" else SMALLEST_SCALE
    sign = torch.where(scale < 0, -1.0, 1.0)
    magnitude = scale.abs().clamp(min=least, max=torch.finfo(FLOATS[format.scale]).max)
    return (sign * magnitude).to(FLOATS[format.scale]).float()


def _encode(w: Tensor, scale: Tensor, zero: Tensor | None, format: WeightFormat) -> tuple[Tensor, Tensor]:
    """Nearest codes f32[M, g] (of a codebook: places in its sorted numbers) and the squared error [M]."""
    ratio = w / scale[:, None]
    if format.kind == "codebook":
        numbers = _sorted_codebook(format)[0]
        code = torch.bucketize(ratio, (numbers[1:] + numbers[:-1]) / 2)
        return code, ratio.sub_(numbers[code]).square_().sum(1) * scale.square()
    if zero is not None:
        ratio += zero[:, None]
    code = ratio.round().clamp_(*format.code_range)
    return code, ratio.sub_(code).square_().sum(1) * scale.square()


def _sorted_codebook(format: WeightFormat) -> tuple[Tensor, Tensor]:
    """The codebook's numbers, rising, and the code of each."""
    found = torch.tensor(format.codebook).sort(stable=True)
    return found.values, found.indices


def _as_codes(code: Tensor, format: WeightFormat) -> Tensor:
    if format.kind == "codebook":
        return _sorted_codebook(format)[1][code].to(torch.uint8)
    return code.to(_code_dtype(format))


def _least_squares(w: Tensor, code: Tensor, scale: Tensor, zero: Tensor | None, format: WeightFormat) -> Tensor:
    """The scale f32[M] that fits the chosen codes best."""
    numbers = _sorted_codebook(format)[0][code] if format.kind == "codebook" else code
    if zero is not None:
        numbers = numbers - zero[:, None]
    power = numbers.square().sum(1)
    return torch.where(power > 0, (numbers * w).sum(1) / power.clamp(min=1e-30), scale)

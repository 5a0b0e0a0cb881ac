"""Numbers out of the quantised forms that checkpoints store: packed words, scales of blocks, zero points.

Everything is computed in float32 and rounded once to the wanted dtype. All codes are small integers or have at most
four significant bits, so float32 holds code - zero exactly, and its product with a scale is the correctly rounded one.
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The 16 numbers of a 4-bit float, by code. Source: OCP Microscaling Formats 1.0, section 5.3.3."""

STEP_ROWS = 1024  # rows at a time, so that the float32 copy stays small


def unpack(words: Tensor, bits: int, dim: int, order: tuple[int, ...], plus: int = 0) -> Tensor:
    """Unsigned numbers out of words: integers [.., n, ..] -> u8 [.., n * len(order), ..].

    The j-th number of a word begins at bit bits * order[j], counted from the lowest. plus: added to each, modulo
    2 ** bits.
    """
    mask = (1 << bits) - 1
    parts = [(((words >> (bits * place)) + plus) & mask).to(torch.uint8) for place in order]
    return torch.stack(parts, dim + 1).flatten(dim, dim + 1)


def dequantise(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    block: tuple[int, int],
    offset: int = 0,
    kind: str = "number",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(code - zero - offset) * scale, for matrices in the last two dimensions.

    Args:
        codes: [.., N, K], float8, int8 or u8.
        scales: [.., ceil(N / block[0]), ceil(K / block[1])]; u8 are E8M0 exponents: 2 ** (scale - 127).
        zeros: of the scales' shape, or None.
        kind: "number": a code is its own value; "e2m1": the code of a 4-bit float.
    Returns: dtype[.., N, K].
    Raises: ValueError: the scales are of another shape.
    """
    rows, columns = codes.shape[-2:]
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    for what, tensor in (("scales", scales), ("zero points", zeros)):
        if tensor is not None and tensor.shape != (*codes.shape[:-2], *grid):
            expected = [*codes.shape[:-2], *grid]
            raise ValueError(f"quantised tensor: expected {what} of shape {expected}, got {list(tensor.shape)}")
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    table = torch.tensor(E2M1)
    out = torch.empty(codes.shape, dtype=dtype)
    parts = [t.reshape(-1, *t.shape[-2:]) for t in (codes, scales, out)]
    shifts = zeros.reshape(-1, *grid) if zeros is not None else [None] * len(parts[0])
    for code, scale, target, zero in zip(*parts, shifts, strict=True):
        for start in range(0, rows, STEP_ROWS):
            some = code[start : start + STEP_ROWS]
            numbers = table[some.int()] if kind == "e2m1" else some.float()
            where = torch.arange(start, start + len(some)) // block[0]
            if zero is not None:
                numbers = numbers - _spread(zero, where, block[1], columns)
            numbers = (numbers - offset) * _spread(scale, where, block[1], columns)
            target[start : start + STEP_ROWS] = numbers.to(dtype)
    return out


def _spread(grid: Tensor, rows: Tensor, width: int, columns: int) -> Tensor:
    """[a, b] -> f32[len(rows), columns], or [len(rows), 1] where all columns share."""
    chosen = grid.float()[rows]
    return chosen if chosen.shape[1] == 1 else chosen.repeat_interleave(width, 1)[:, :columns]

"""The tensors of a quantised checkpoint under their unquantised names, as expressions over what is stored.

    fp8                 W + W_scale_inv                     W [N, K] float8; a scale for each block, or one for all
    mxfp4               W_blocks [E, N, G, 16], W_scales    two E2M1 codes a byte, an E8M0 scale for 32 of them
    compressed-tensors  M.weight + M.weight_scale [+ zero points]                       float8 or int8
                        M.weight_packed + M.weight_scale [+ zero points, g_idx]         4 or 8 bits in int32
    gptq                M.qweight [K/8, N], M.scales, M.qzeros, M.g_idx                 transposed, zero points less 1
    awq                 M.qweight [K, N/8], M.scales, M.qzeros                          transposed, in AWQ's order

Scales of activations are left out: activations are not quantised here. Sources: transformers' integrations, AutoGPTQ
and AutoAWQ (layouts of the two int4 forms), compressed-tensors (pack-quantized).
"""

from __future__ import annotations

from collections.abc import Callable

from moec.compiler.capture.checkpoint import Checkpoint
from moec.compiler.capture.quantisation import Quantisation
from moec.compiler.errors import CheckpointError
from moec.passes.ir.weights import Weight, dequantised, gathered, reshape, source, transpose, unpacked

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of a word that holds column 0, 1, ..
_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "activation_scale")


class _Stored:
    """The checkpoint's tensors as sources; each is taken once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.directory = checkpoint.directory
        self.left = {n: source(n, t.shape, t.dtype) for n, t in checkpoint.tensors.items()}

    def ending(self, suffix: str) -> list[str]:
        """The names that end so, without the ending."""
        return [n.removesuffix(suffix) for n in self.left if n.endswith(suffix)]

    def take(self, name: str) -> Weight:
        found = self.left.pop(name, None)
        if found is None:
            raise CheckpointError(f"{self.directory}: tensor {name} is missing, though the weight is stored quantised")
        return found

    def may_take(self, name: str) -> Weight | None:
        return self.left.pop(name, None)


def dequantised_tensors(checkpoint: Checkpoint, quantisation: Quantisation | None) -> dict[str, Weight]:
    """Name -> Weight of every tensor of the checkpoint, under the names that it has unquantised.

    Raises: CheckpointError: scales or zero points are missing or of a wrong shape; nothing is stored quantised.
    """
    stored = _Stored(checkpoint)
    if quantisation is None:
        return stored.left
    made = _FORMS[quantisation.method](stored, quantisation)
    if not made:
        raise CheckpointError(
            f"{checkpoint.directory}: config.json says {quantisation.method}, but no tensor is stored that way"
        )
    twice = sorted(made.keys() & stored.left.keys())
    if twice:
        raise CheckpointError(f"{checkpoint.directory}: tensor {twice[0]} is stored both quantised and not")
    plain = {n: w for n, w in stored.left.items() if n.rpartition(".")[2] not in _OF_ACTIVATIONS}
    return plain | made


def _fp8(stored: _Stored, q: Quantisation) -> dict[str, Weight]:
    made = {}
    for name in stored.ending("_scale_inv"):
        codes, scales = stored.take(name), stored.take(f"{name}_scale_inv")
        made[name] = _scaled(name, codes, scales, None, q.block)
    return made


def _mxfp4(stored: _Stored, q: Quantisation) -> dict[str, Weight]:
    made = {}
    for name in stored.ending("_blocks"):
        blocks, scales = stored.take(f"{name}_blocks"), stored.take(f"{name}_scales")
        codes = unpacked(blocks, 4, len(blocks.shape) - 1)  # [E, N, G, 32]
        codes = reshape(codes, (*codes.shape[:-2], codes.shape[-2] * codes.shape[-1]))
        made[name] = transpose(_scaled(name, codes, scales, None, q.block, kind="e2m1"), 1, 2)
    return made


def _compressed_tensors(stored: _Stored, q: Quantisation) -> dict[str, Weight]:
    made = {}
    for module in stored.ending(".weight_scale"):
        scales = stored.take(f"{module}.weight_scale")
        zeros, groups = stored.may_take(f"{module}.weight_zero_point"), stored.may_take(f"{module}.weight_g_idx")
        packed = stored.may_take(f"{module}.weight_packed")
        if packed is None:
            codes, offset = stored.take(f"{module}.weight"), 0
        else:
            if not q.bits:
                raise CheckpointError(
                    f"{stored.directory}: {module}.weight_packed: config.json names no num_bits for it"
                )
            stored.may_take(f"{module}.weight_shape")  # the shape that config.json implies is compared in any case
            codes, offset = unpacked(packed, q.bits, 1), 0 if zeros is not None else 1 << (q.bits - 1)
            zeros = None if zeros is None else unpacked(zeros, q.bits, 0)
        block = q.block if codes.dtype.itemsize == 1 and codes.dtype.is_floating_point else None
        if groups is not None:
            _check_equal(module, scales, zeros)
            scales = _columns(scales, groups)
            zeros = None if zeros is None else _columns(zeros, groups)
        made[f"{module}.weight"] = _scaled(module, codes, scales, zeros, block, offset)
    return made


def _columns(grid: Weight, groups: Weight) -> Weight:
    """[N, G] and the group of each of K columns -> [N, K]."""
    return transpose(gathered(transpose(grid, 0, 1), groups), 0, 1)


def _gptq(stored: _Stored, q: Quantisation) -> dict[str, Weight]:
    made = {}
    for module in stored.ending(".qweight"):
        codes = unpacked(stored.take(f"{module}.qweight"), q.bits, 0)  # [K, N]
        scales = stored.take(f"{module}.scales")
        # version 1 stores a zero point less 1, so that 0 is stored as the greatest number (AutoGPTQ masks after adding)
        zeros = unpacked(stored.take(f"{module}.qzeros"), q.bits, 1, plus=q.zero_offset)
        groups = stored.may_take(f"{module}.g_idx")
        if groups is not None:
            _check_equal(module, scales, zeros)
            scales, zeros = gathered(scales, groups), gathered(zeros, groups)
        made[f"{module}.weight"] = transpose(_scaled(module, codes, scales, zeros, None), 0, 1)
    return made


def _awq(stored: _Stored, q: Quantisation) -> dict[str, Weight]:
    made = {}
    for module in stored.ending(".qweight"):
        codes = unpacked(stored.take(f"{module}.qweight"), q.bits, 1, AWQ_ORDER)  # [K, N]
        scales = stored.take(f"{module}.scales")
        zeros = unpacked(stored.take(f"{module}.qzeros"), q.bits, 1, AWQ_ORDER)
        made[f"{module}.weight"] = transpose(_scaled(module, codes, scales, zeros, None), 0, 1)
    return made


def _scaled(
    name: str,
    codes: Weight,
    scales: Weight,
    zeros: Weight | None,
    block: tuple[int, int] | None,
    offset: int = 0,
    kind: str = "number",
) -> Weight:
    """Codes [.., N, K] with the scales of blocks; without a block size the scales' shape must divide the codes'.

    One scale alone may have any shape of one element, one scale for each row may be [N].
    """
    lead, (rows, columns) = codes.shape[:-2], codes.shape[-2:]
    if block is None or len(scales.shape) < 2:
        count = _numel(scales.shape)
        if count == _numel(lead):
            scales, zeros = _as_grid((*lead, 1, 1), scales, zeros)
        elif len(scales.shape) == len(codes.shape) - 1 and scales.shape[-1] == rows:
            scales, zeros = _as_grid((*scales.shape, 1), scales, zeros)
        if len(scales.shape) != len(codes.shape) or rows % scales.shape[-2] or columns % scales.shape[-1]:
            raise CheckpointError(
                f"{name}: scales of shape {list(scales.shape)} do not fit {list(codes.shape)} weights"
            )
        block = (rows // scales.shape[-2], columns // scales.shape[-1])
    grid = (*lead, -(-rows // block[0]), -(-columns // block[1]))
    for what, weight in (("scales", scales), ("zero points", zeros)):
        if weight is not None and weight.shape != grid:
            raise CheckpointError(f"{name}: expected {what} of shape {list(grid)}, got {list(weight.shape)}")
    return dequantised(codes, scales, zeros, block, offset, kind)


def _check_equal(name: str, scales: Weight, zeros: Weight | None) -> None:
    """Groups in any order choose rows of both, after which a row too few is seen no more."""
    if zeros is not None and zeros.shape != scales.shape:
        expected = list(scales.shape)
        raise CheckpointError(f"{name}: expected zero points of shape {expected}, got {list(zeros.shape)}")


def _as_grid(shape: tuple[int, ...], scales: Weight, zeros: Weight | None) -> tuple[Weight, Weight | None]:
    fits = zeros is not None and _numel(zeros.shape) == _numel(shape)
    return reshape(scales, shape), reshape(zeros, shape) if zeros is not None and fits else zeros


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


_FORMS: dict[str, Callable[[_Stored, Quantisation], dict[str, Weight]]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
}

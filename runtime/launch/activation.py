"""Expert activations by name, for the library kernels. The names are those of the IR: `[!][f32:]FN[@LIMIT[@ALPHA]]`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from moec.runtime.errors import FormatError

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


def _swigluoai(gate: Tensor, up: Tensor, limit: float | None, alpha: float) -> Tensor:
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


def _softcapglu(gate: Tensor, up: Tensor, limit: float | None, alpha: float) -> Tensor:
    capped_gate, capped_up = (torch.tanh(x / cap) * cap for x, cap in ((gate, limit or 1.0), (up, alpha)))
    return capped_gate * torch.sigmoid(gate) * capped_up


PRODUCTS: dict[str, Callable[[Tensor, Tensor, float | None, float], Tensor]] = {
    "swigluoai": _swigluoai,
    "softcapglu": _softcapglu,
}
"""Those that are no function of the gate times up: (gate, up, LIMIT, ALPHA) -> product."""


def activation(name: str, interleaved: bool = False) -> Callable[[Tensor], Tensor]:
    """-> f: h [.., 2F] -> [.., F] ([.., F] -> [.., F] for `!FN`).

    The gate half comes first; interleaved: gate and up columns in turn. LIMIT clamps the gate above and up on both
    sides; f32: the product is computed in float32 and rounded once; swigluoai: (up + 1) * gate * sigmoid(ALPHA * gate).
    softcapglu@G@U: softcap(gate) * sigmoid(gate) * softcap(up), where softcap(x) = G tanh(x / G), of up with U.
    Raises: FormatError: an unknown name.
    """
    text = name.removeprefix("!")
    wide = text.startswith("f32:")
    fn_name, *numbers = text.removeprefix("f32:").split("@")
    known = FUNCTIONS if name.startswith("!") else {**FUNCTIONS, **PRODUCTS}
    if fn_name not in known:
        raise FormatError(f"activation {name!r} is not one of {', '.join(known)}; make the engine again")
    if name.startswith("!"):
        return FUNCTIONS[fn_name]
    limit = float(numbers[0]) if numbers else None
    alpha = float(numbers[1]) if len(numbers) > 1 else 1.0

    def gated(h: Tensor) -> Tensor:
        gate, up = (h[..., ::2], h[..., 1::2]) if interleaved else h.chunk(2, -1)
        if wide:
            gate, up = gate.float(), up.float()
        if fn_name in PRODUCTS:
            return PRODUCTS[fn_name](gate, up, limit, alpha).to(h.dtype)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (FUNCTIONS[fn_name](gate) * up).to(h.dtype)

    return gated

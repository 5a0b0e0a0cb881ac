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
    "swigluoai": lambda x: x,  # the products below are the whole meaning of these two
    "softcapglu": lambda x: x,
}


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
    if fn_name not in FUNCTIONS:
        raise FormatError(f"activation {name!r} is not one of {', '.join(FUNCTIONS)}; make the engine again")
    fn = FUNCTIONS[fn_name]
    if name.startswith("!"):
        return fn
    limit = float(numbers[0]) if numbers else None
    alpha = float(numbers[1]) if len(numbers) > 1 else 1.0

    def gated(h: Tensor) -> Tensor:
        gate, up = (h[..., ::2], h[..., 1::2]) if interleaved else h.chunk(2, -1)
        if wide:
            gate, up = gate.float(), up.float()
        if fn_name == "softcapglu":
            capped = (torch.tanh(x / cap) * cap for x, cap in ((gate, limit or 1.0), (up, alpha)))
            return (next(capped) * torch.sigmoid(gate) * next(capped)).to(h.dtype)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        if fn_name == "swigluoai":
            return ((up + 1) * (gate * torch.sigmoid(gate * alpha))).to(h.dtype)
        return (fn(gate) * up).to(h.dtype)

    return gated

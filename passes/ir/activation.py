"""The expert activations: how a name in the IR becomes a function of the gate and up halves.

A name is `[f32:]FN[@LIMIT]`, `swigluoai@LIMIT@ALPHA`, `f32:softcapglu@GATE@UP`, or `!FN` for experts without a gate
(the up projection alone):
    silu                act(gate) * up
    f32:silu            the same, computed in float32 and rounded once
    silu@7.0            gate clamped to at most 7, up clamped to [-7, 7], then as above
    swigluoai@7.0@1.702 (up + 1) * gate * sigmoid(1.702 * gate), clamped as above      (GPT-OSS)
    f32:softcapglu@7.0@9.0  7 tanh(gate / 7) * sigmoid(gate) * 9 tanh(up / 9)         (Inkling 2)
    !relu2              relu(h)**2, no gate                                           (Nemotron)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}
OF_BOTH = ("swigluoai", "softcapglu")  # functions of gate and up together, of two numbers


@dataclasses.dataclass(frozen=True)
class Activation:
    """A parsed activation name.

    Args: fn: a key of FUNCTIONS, "swigluoai" or "softcapglu".  gated: False where the projection has no gate half.
          limit: clamp of gate (above) and up (both sides); None: none.  alpha: swigluoai's slope.
              Of softcapglu, the soft caps of gate and up.
          in_float32: the product is computed in float32 and rounded once.
    """

    fn: str
    gated: bool = True
    limit: float | None = None
    alpha: float = 1.0
    in_float32: bool = False

    @classmethod
    def parse(cls, name: str) -> Activation:
        """Reads an activation name. Raises: ValueError on a name that the grammar does not have."""
        text, gated, in_float32 = name, True, False
        if text.startswith("!"):
            text, gated = text[1:], False
        if text.startswith("f32:"):
            text, in_float32 = text[4:], True
        fn, *numbers = text.split("@")
        if (fn not in FUNCTIONS and fn not in OF_BOTH) or len(numbers) > (2 if fn in OF_BOTH else 1):
            known = ", ".join(FUNCTIONS)
            raise ValueError(f"unknown activation {name!r}; known: swigluoai@LIMIT@ALPHA, softcapglu@GATE@UP, {known}")
        if fn == "softcapglu" and len(numbers) != 2:
            raise ValueError(f"activation {name!r}: softcapglu takes two soft caps")
        values = [float(n) for n in numbers]
        limit = values[0] if values else None
        alpha = values[1] if len(values) > 1 else 1.0
        return cls(fn, gated, limit, alpha, in_float32)

    def __str__(self) -> str:
        text = ("" if self.gated else "!") + ("f32:" if self.in_float32 else "") + self.fn
        if self.limit is not None:
            text += f"@{self.limit!r}"
        return text + (f"@{self.alpha!r}" if self.fn in OF_BOTH else "")

    def __call__(self, h: Tensor) -> Tensor:
        """h: [.., 2F] with the gate half first ([.., F] where not gated) -> [.., F]."""
        if not self.gated:
            return FUNCTIONS[self.fn](h)
        gate, up = h.chunk(2, -1)
        if self.in_float32:
            gate, up = gate.float(), up.float()
        if self.fn == "softcapglu":
            return (_softcap(gate, self.limit or 1.0) * torch.sigmoid(gate) * _softcap(up, self.alpha)).to(h.dtype)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        if self.fn == "swigluoai":
            y = (up + 1) * (gate * torch.sigmoid(gate * self.alpha))
        else:
            y = FUNCTIONS[self.fn](gate) * up
        return y.to(h.dtype)


def _softcap(x: Tensor, cap: float) -> Tensor:
    return torch.tanh(x / cap) * cap

"""Names an experts module's activation by evaluation: its own code against every name of the IR, bit for bit.

Reading the source or the configuration instead gave a silently wrong result for one family (MiniMax-M3).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moec.compiler.errors import UnsupportedModel
from moec.passes.ir.activation import FUNCTIONS, Activation

ACTIVATION = "_moec_activation"
"""Where an experts module keeps its activation's IR name during a trace."""
_PROBE_ROWS, _PROBE_WIDTH, _PROBE_SCALE = 64, 32, 12.0  # wide enough to reach every clamp limit in use (7 to 10)


def activation_name(experts: Any) -> str:
    """The IR name of a transformers experts module's activation.

    Raises: UnsupportedModel: no candidate is equal in both float32 and bfloat16.
    """
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(_PROBE_ROWS, _PROBE_WIDTH, generator=generator) * _PROBE_SCALE
    probes = (probe, probe.to(torch.bfloat16))
    if experts.has_gate:
        own, halves = experts._apply_gate, not experts.is_concatenated
        candidates = list(_gated_candidates(experts))
    else:
        own, halves = experts.act_fn, False
        candidates = [Activation(fn, gated=False) for fn in FUNCTIONS]
    expected = [own(p) for p in probes]
    for candidate in candidates:
        found = [candidate(gate_first(p) if halves else p) for p in probes]
        if all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)):
            return str(candidate)
    raise UnsupportedModel(
        f"{type(experts).__name__}: its expert activation equals none of {len(candidates)} known ones; "
        "add its name to passes/ir/activation.py"
    )


def function_name(act_fn: Any) -> str:
    """The IR name of a function of one tensor, found as activation_name does.

    Raises: UnsupportedModel: none of the IR's functions is equal to it.
    """
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(_PROBE_ROWS, _PROBE_WIDTH, generator=generator) * _PROBE_SCALE
    for name, function in FUNCTIONS.items():
        if all(torch.equal(act_fn(p), function(p)) for p in (probe, probe.to(torch.bfloat16))):
            return name
    raise UnsupportedModel(
        f"the expert activation {act_fn} equals none of {', '.join(FUNCTIONS)}; add its name to passes/ir/activation.py"
    )


def gate_first(h: Tensor) -> Tensor:
    """Interleaved columns (gate, up, gate, up, ..) -> the gate half, then the up half."""
    return torch.cat([h[..., ::2], h[..., 1::2]], -1)


def _numbers(module: nn.Module, word: str) -> list[float]:
    found = {float(v) for k, v in vars(module).items() if word in k and isinstance(v, int | float)}
    return sorted(found)


def _gated_candidates(experts: nn.Module) -> Iterator[Activation]:
    limits = _numbers(experts, "limit")
    for fn in FUNCTIONS:
        yield Activation(fn)
        yield Activation(fn, in_float32=True)
        for limit in limits:
            yield Activation(fn, limit=limit)
            yield Activation(fn, limit=limit, in_float32=True)
    for limit in limits:
        for alpha in _numbers(experts, "alpha"):
            yield Activation("swigluoai", limit=limit, alpha=alpha)
    caps = sorted({c for m in experts.modules() for c in _numbers(m, "softcap")})
    yield from (Activation("softcapglu", limit=g, alpha=u, in_float32=True) for g in caps for u in caps)

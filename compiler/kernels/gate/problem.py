"""The problem that the gate kernels solve, and what they refuse."""

from __future__ import annotations

import dataclasses
import hashlib

from moec.compiler.kernels.simd import DTYPE_BYTES
from moec.passes.ir.gate import GateSpec

MAX_EXPERTS = 4096


@dataclasses.dataclass(frozen=True)
class GateProblem:
    """moec::gate and moec::gate_linear for one GateSpec, any number of tokens.

    spec: GateSpec.encode().  logits_dtype: of moec::gate's logits; of gate_linear it is router_dtype.
    selection_bias_dtype: None where there is none.  hidden, x_dtype, weight_dtype, bias_dtype: of gate_linear's router
    (hidden 0: logits are given); bias_dtype None: no router bias.
    """

    spec: str
    num_experts: int
    logits_dtype: str = "float32"
    selection_bias_dtype: str | None = None
    hidden: int = 0
    x_dtype: str = "bfloat16"
    weight_dtype: str = "bfloat16"
    bias_dtype: str | None = None

    @property
    def gate(self) -> GateSpec:
        """The spec, decoded."""
        return GateSpec.decode(self.spec)

    @property
    def compute_dtype(self) -> str:
        """Where the scores are rounded: float32 or bfloat16."""
        return self.logits_dtype if self.gate.compute_dtype == "logits" else self.gate.compute_dtype

    @property
    def result_dtype(self) -> str:
        """What the weights are rounded to."""
        return self.logits_dtype if self.gate.weights_dtype == "logits" else self.gate.weights_dtype

    def tag(self) -> str:
        """What tells the code of two problems apart, as part of a symbol. The hidden width is no part of the code."""
        text = repr(dataclasses.replace(self, hidden=min(self.hidden, 1)))
        return f"e{self.num_experts}k{self.gate.top_k}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def refusal(self) -> str | None:
        """Why the gate kernels do not take the problem, or None."""
        gate = self.gate
        named = {
            "logits": self.logits_dtype,
            "selection bias": self.selection_bias_dtype or "float32",
            "scores": self.compute_dtype,
            "weights": self.result_dtype,
            "x": self.x_dtype,
            "the router": self.weight_dtype,
            "the router's bias": self.bias_dtype or "float32",
        }
        for what, dtype in named.items():
            if dtype not in DTYPE_BYTES:
                return f"{what} in {dtype}, only float32 and bfloat16 are built"
        if not gate.top_k <= self.num_experts <= MAX_EXPERTS:
            return f"{self.num_experts} experts with top {gate.top_k}"
        if self.num_experts % gate.num_groups:
            return f"{self.num_experts} experts do not divide into {gate.num_groups} groups"
        if (gate.bias_on != "none") and self.selection_bias_dtype is None:
            return "the selection bias is missing"
        if self.hidden and self.logits_dtype == "bfloat16" and "float32" in (self.x_dtype, self.weight_dtype):
            return "a router in bfloat16 whose input or weight is float32 rounds them first, which is not built"
        return None

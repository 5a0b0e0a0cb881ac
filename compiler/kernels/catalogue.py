"""Every compiled kernel that lowering may choose, by op; library functions stand beside them in compiler/lowering.

A kernel's specs differ in the instruction-set level alone. To add a kernel, write kernels/<op>/<kernel>.py and list it.
"""

from __future__ import annotations

from typing import Any

from moec.compiler.kernels.attention import cached_attention
from moec.compiler.kernels.experts import catalogue as experts
from moec.compiler.kernels.gate import gate, gate_linear
from moec.compiler.kernels.linear import linear, linear_codes
from moec.compiler.kernels.mlp import gated_mlp
from moec.compiler.kernels.norm import add_rms_norm, rms_norm
from moec.compiler.kernels.rope import rope
from moec.compiler.kernels.spec import KernelSpec

SPECS: tuple[KernelSpec[Any], ...] = (
    *experts.SPECS,
    *gate_linear.SPECS,
    *gate.SPECS,
    *add_rms_norm.SPECS,
    *rms_norm.SPECS,
    *rope.SPECS,
    *cached_attention.SPECS,
    *gated_mlp.SPECS,
    *linear.SPECS,
    *linear_codes.SPECS,
)

"""What all experts kernels share around the TIR: their spec's functions and the checked call on torch tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from moec.compiler.kernels.checks import require
from moec.compiler.kernels.experts import codes as codes_of
from moec.compiler.kernels.experts import layout
from moec.compiler.kernels.experts.plan import Plan
from moec.compiler.kernels.spec import Cost, ExpertsProblem
from moec.compiler.kernels.template.activation import SUPPORTED
from moec.passes.ir.activation import Activation
from moec.passes.ir.formats import parse_format
from moec.passes.ir.quantise import quantise

_OP = "moec::experts"
_WEIGHT_LAYOUT = {"bfloat16": "vnni32", "float32": "row32"}


def symbol(problem: ExpertsProblem) -> str:
    """The name of the problem's function in a library; the same for every kernel, so a library holds one of them."""
    p = problem
    flags = [n for n, on in (("b", p.has_bias), ("sw", p.has_shared_weight), ("wi", p.weight_on_input)) if on]
    act = "".join(c if c.isalnum() else {"!": "n", "@": "_", ".": "p", ":": "_", "-": "m"}.get(c, "_") for c in p.act)
    sizes = f"h{p.hidden}_f{p.inner}_e{p.num_experts}_k{p.top_k}_s{p.num_shared}"
    formats = ["".join(c if c.isalnum() else "" for c in f) for f in (p.format_up, p.format_down) if f]
    return "_".join(["moec_experts", p.dtype, *formats, sizes, act, *flags])


def weight_layout(problem: ExpertsProblem) -> str:
    """Name of the packed layout (moec.compiler.kernels.experts.layout) that the kernels read."""
    return _WEIGHT_LAYOUT[problem.dtype]


PLAIN, NUMBERS, INT8 = "plain", "numbers", "int8"  # what a kernel multiplies: as dtype says, codes' numbers, codes


def refusal(problem: ExpertsProblem, dtypes: tuple[str, ...], level: str, takes: str = PLAIN) -> str | None:
    """Why the template does not take the problem, or None."""
    if reason := _format_refusal(problem, level, takes):
        return reason
    if problem.dtype not in dtypes:
        return f"dtype {problem.dtype}, the kernel has {' and '.join(dtypes)}"
    try:
        activation = Activation.parse(problem.act)
    except ValueError as error:
        return str(error)
    if activation.fn not in SUPPORTED:
        return f"activation {problem.act!r} has no vector code"
    if activation.fn == "swigluoai" and not activation.gated:
        return f"activation {problem.act!r} needs a gate"
    if min(problem.hidden, problem.inner, problem.num_experts, problem.top_k) < 1:
        return f"an empty layer: hidden {problem.hidden}, inner {problem.inner}, experts {problem.num_experts}"
    if problem.has_shared_weight and not problem.num_shared:
        return "a weight for shared experts, but no shared expert"
    return None


def _format_refusal(problem: ExpertsProblem, level: str, takes: str) -> str | None:
    formats = (problem.format_up, problem.format_down)
    if takes == PLAIN:
        stored = next((f for f in formats if f), None)
        return f"weights in {stored}, the kernel has none of quantised weights" if stored else None
    if not all(formats):
        return f"weights in {problem.dtype}, the kernel is for quantised ones"
    for format, rows, depth, what in zip(
        formats, (problem.inner, problem.hidden), (problem.hidden, problem.inner), ("w_gate_up", "w_down"), strict=True
    ):
        if reason := codes_of.refusal(format, rows, depth, what):
            return reason
    if level == "amx_bf16" and (packed := next((f for f in formats if parse_format(f).is_packed), None)):
        return f"weights in {packed}, the kernel makes no tiles of them"
    rounds = [codes_of.of_format(f, 1 << 20).int8 for f in formats]
    if rounds != [takes == INT8] * 2:
        names, rows_are = " and ".join(dict.fromkeys(formats)), "int8" if takes == INT8 else "wide"
        return f"weights in {names}, the kernel has {rows_are} rows"
    return None


def cost(problem: ExpertsProblem, num_tokens: int) -> Cost:
    """Weights of the experts that random tokens touch, read once, and the products of all slots."""
    factor = 3 if Activation.parse(problem.act).gated else 2
    expert = factor * problem.hidden * problem.inner
    expert_bytes = _expert_bytes(problem, factor - 1)
    missed = (1 - min(1.0, problem.top_k / problem.num_experts)) ** num_tokens
    touched = problem.num_experts * (1 - missed) + (problem.num_shared if num_tokens else 0)
    width = 2 if problem.dtype == "bfloat16" else 4
    slots = num_tokens * (problem.top_k + problem.num_shared)
    return Cost(int(touched * expert_bytes) + 2 * num_tokens * problem.hidden * width, 2 * slots * expert)


def _expert_bytes(problem: ExpertsProblem, halves: int) -> int:
    """Of one expert's weights as stored."""
    width, total = 2 if problem.dtype == "bfloat16" else 4, 0
    for format, rows, depth in (
        (problem.format_up, halves * problem.inner, problem.hidden),
        (problem.format_down, problem.hidden, problem.inner),
    ):
        total += parse_format(format).matrix_bytes(rows, depth) if format else rows * depth * width
    return total


@dataclasses.dataclass(frozen=True)
class PackedExperts:
    """Weights of one layer in a kernel's layout; biases f32 in panel order, None where the problem has none."""

    w_gate_up: Tensor
    w_down: Tensor
    b_gate_up: Tensor | None = None
    b_down: Tensor | None = None


def pack(
    problem: ExpertsProblem,
    w_gate_up: Tensor,
    w_down: Tensor,
    b_gate_up: Tensor | None = None,
    b_down: Tensor | None = None,
) -> PackedExperts:
    """The op's weights ([E+s, 2F, H], [E+s, H, F], biases [E+s, 2F], [E+s, H]) in the layout of the kernels.

    Stacks of a quantised problem are quantised first.
    """
    gated, name = Activation.parse(problem.act).gated, weight_layout(problem)
    total = problem.num_experts + problem.num_shared
    width = problem.inner * (2 if gated else 1)
    shapes = {"w_gate_up": (total, width, problem.hidden), "w_down": (total, problem.hidden, problem.inner)}
    for what, given in (("w_gate_up", w_gate_up), ("w_down", w_down)):
        require(tuple(given.shape) == shapes[what], _OP, f"{what} is {tuple(given.shape)}, expected {shapes[what]}")
    has_bias = b_gate_up is not None and b_down is not None
    require(has_bias == problem.has_bias, _OP, f"biases are {'given' if has_bias else 'missing'}")
    return PackedExperts(
        pack_stack(problem.format_up, w_gate_up, name, gated),
        pack_stack(problem.format_down, w_down, name, None),
        layout.pack_bias_gate_up(b_gate_up, gated) if b_gate_up is not None else None,
        layout.pack_bias_down(b_down) if b_down is not None else None,
    )


def pack_stack(format: str, stack: Tensor, name: str, gated: bool | None, out: Tensor | None = None) -> Tensor:
    """[E, N, K] packed (into out, where given). gated None: the down stack. name: layout of a stack without format."""
    if not format:
        return layout.pack_down(stack, name, out) if gated is None else layout.pack_gate_up(stack, name, gated, out)
    codes = codes_of.of_format(format, stack.shape[2])
    shape = packed_shape(codes, stack.shape[0], stack.shape[1], gated)
    packed = torch.empty(shape, dtype=torch.uint8) if out is None else out
    for expert, target in zip(stack, packed, strict=True):
        codes_of.pack_expert(quantise(expert, codes.format), codes, gated, target)
    return packed


def packed_shape(codes: codes_of.Codes, num_experts: int, rows: int, gated: bool | None) -> tuple[int, int, int]:
    """[E, panels, bytes] of a stack [E, rows, K] of codes."""
    columns = 2 * layout.padded(rows // 2) if gated else layout.padded(rows)
    return num_experts, columns // layout.PANEL, codes.panel_bytes


def call(
    function: Any,
    plan: Plan,
    packed: PackedExperts,
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    shared_weight: Tensor | None = None,
) -> Tensor:
    """The kernel on torch tensors of any stride: x [T,H], weights [T,K], experts int [T,K] -> y [T,H].

    Raises: KernelArgumentError: a shape or dtype that the kernel was not built for.
    """
    problem, num_tokens = plan.problem, x.shape[0]
    slots = (num_tokens, problem.top_k)
    require(
        tuple(x.shape) == (num_tokens, problem.hidden), _OP, f"x is {tuple(x.shape)}, expected [T,{problem.hidden}]"
    )
    require(x.dtype == getattr(torch, problem.dtype), _OP, f"x is {x.dtype}, expected {problem.dtype}")
    require(tuple(weights.shape) == slots, _OP, f"weights are {tuple(weights.shape)}, expected {slots}")
    require(tuple(experts.shape) == slots, _OP, f"experts are {tuple(experts.shape)}, expected {slots}")
    given = shared_weight is not None
    require(given == problem.has_shared_weight, _OP, f"shared_weight is {'given' if given else 'missing'}")
    optional = [t for t in (packed.b_gate_up, packed.b_down) if t is not None]
    if shared_weight is not None:
        optional.append(shared_weight.reshape(num_tokens).float().contiguous())
    y = torch.empty(x.shape, dtype=x.dtype)
    workspace = torch.empty(plan.workspace_bytes(num_tokens), dtype=torch.uint8)
    function(
        x.contiguous(), weights.float().contiguous(), experts.int().contiguous(), packed.w_gate_up, packed.w_down,
        *optional, workspace, y,
    )  # fmt: skip
    return y

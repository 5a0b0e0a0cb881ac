"""moec::gated_mlp for one or few tokens: both projections of a dense FFN in one launch, weights as checkpoints store
them.

Call: symbol(x, w_gate_up, w_down, [b_gate_up,] [b_down,] h, y). x [T,H] any row stride, w_gate_up [2F,H] ([F,H] without
gate), w_down [H,F], h [T,F] scratch in the problem's dtype, y [T,H]. Sums and the activation are float32; h and y are
rounded once each (the op also rounds gate, up and the activation's parts in bfloat16). float32: within 2e-6 of a
float64 evaluation, relative to the largest result.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from moec.compiler.kernels.checks import require, rows_readable
from moec.compiler.kernels.linear.dot import COLUMNS, emit_column_block, emit_dots, for_token_blocks, token_blocks
from moec.compiler.kernels.simd import DTYPE_BYTES, Registers, Simd, for_rows, match
from moec.compiler.kernels.spec import DTYPE_TAGS, Cost, vector_specs
from moec.compiler.kernels.template.activation import SUPPORTED, activate
from moec.passes.ir.activation import Activation

SERIAL_PRODUCTS = 1 << 18  # products below which a second thread costs more than it saves
ACTIVATED = 16  # activations computed at a time: 4 tokens times up to 4 columns


@dataclasses.dataclass(frozen=True)
class MlpProblem:
    """moec::gated_mlp; the sizes are for the cost model alone. dtype: of x, weights, y.  bias_dtypes: gate_up, down."""

    hidden: int
    inner: int
    act: str = "silu"
    dtype: str = "bfloat16"
    bias_dtypes: tuple[str | None, str | None] = (None, None)

    @property
    def activation(self) -> Activation:
        """act, decoded."""
        return Activation.parse(self.act)

    def refusal(self) -> str | None:
        """Why the kernel does not take the problem, or None."""
        for what, dtype in (("x", self.dtype), *(("a bias", b) for b in self.bias_dtypes)):
            if dtype is not None and dtype not in DTYPE_BYTES:
                return f"{what} in {dtype}, only float32 and bfloat16 are built"
        if self.activation.fn not in SUPPORTED:
            return f"activation {self.act!r} is not built"
        return None


def symbol(problem: MlpProblem) -> str:
    """The name of the problem's function in a library of kernels."""
    dtypes = "_".join(DTYPE_TAGS[d] for d in (problem.dtype, *problem.bias_dtypes))
    act = "".join(c if c.isalnum() else f"x{ord(c):02x}" for c in problem.act)
    return f"moec_gated_mlp_{dtypes}_{act}"


def build(problem: MlpProblem, level: str) -> dict[str, Any]:
    """The kernel for an instruction-set level: {exported name: PrimFunc}."""
    v, dtype, gated = Simd.of(level), problem.dtype, problem.activation.gated
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name(symbol(problem))
        T.func_attr({"tirx.noalias": True})
        n, hidden, inner = T.int64(), T.int64(), T.int64()
        x = match("x", dtype, (n, hidden), strided=1)
        w_in = match("w_gate_up", dtype, (inner * (2 if gated else 1), hidden))
        w_out = match("w_down", dtype, (hidden, inner))
        in_dtype, out_dtype = problem.bias_dtypes
        b_in = match("b_gate_up", in_dtype, (inner * (2 if gated else 1),)) if in_dtype else None
        b_out = match("b_down", out_dtype, (hidden,)) if out_dtype else None
        h, y = match("h", dtype, (n, inner)), match("y", dtype, (n, hidden))
        per_task = COLUMNS // 2 if gated else COLUMNS

        def up(block: Any) -> None:
            _emit_up(v, problem, (n, hidden, inner), (x, w_in, b_in, h), block * per_task)

        def write(t: Any, c: Any, value: Any) -> None:
            if b_out is not None and out_dtype is not None:
                value = value + v.load(b_out[c], out_dtype, 1)
            v.store(y[t, c], value, dtype, 1)

        def down(block: Any) -> None:
            sizes = (n, hidden, inner)
            at = block * COLUMNS
            emit_column_block(v, (dtype, dtype), sizes, lambda t, k: h[t, k], lambda c, k: w_out[c, k], at, write)

        with v.prelude(ACTIVATED):
            small = n * hidden * inner <= SERIAL_PRODUCTS
            for_rows((inner + per_task - 1) // per_task, small, up)
            for_rows((hidden + COLUMNS - 1) // COLUMNS, small, down)
    return {symbol(problem): ib.get()}


def _emit_up(v: Simd, problem: MlpProblem, sizes: Any, tensors: Any, first: Any) -> None:
    """h[:, first .. first+2) (4 without gate) of every token. sizes: T, H, F."""
    (n, hidden, inner), (x, w, bias, h) = sizes, tensors
    gated, dtype = problem.activation.gated, problem.dtype
    outputs = [T.Bind(T.min(first + j, inner - 1)) for j in range(COLUMNS // 2 if gated else COLUMNS)]
    columns = outputs + [inner + f for f in outputs] if gated else outputs

    def block(tokens: list[Any]) -> None:
        sums = emit_dots(v, (dtype, dtype), hidden, lambda t, k: x[t, k], tokens, lambda c, k: w[c, k], columns)
        halves = [Registers(1, ACTIVATED) for _ in range(2 if gated else 1)]
        for half in halves:
            half.fill(0.0)
        for i in range(len(tokens)):
            for j, c in enumerate(columns):
                total = sums[i][j]
                if bias is not None and problem.bias_dtypes[0] is not None:
                    total = total + v.load(bias[c], problem.bias_dtypes[0], 1)
                halves[j // len(outputs)].set_element(i * len(outputs) + j % len(outputs), total)
        gate = halves[0][0] if gated else None
        result = Registers(1, ACTIVATED)
        result[0] = activate(problem.activation, gate, halves[-1][0], ACTIVATED)
        for i, t in enumerate(tokens):
            for j, f in enumerate(outputs):
                v.store(h[t, f], result.element(i * len(outputs) + j), dtype, 1)

    for_token_blocks(token_blocks(v), n, block)


def gated_mlp(
    library: Any,
    problem: MlpProblem,
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """The kernel on torch tensors: x [T,H], weights w_gate_up and w_down -> [T,H]. Raises: KernelArgumentError."""
    op, (w_in, w_out) = "moec::gated_mlp", weights
    require(problem.refusal() is None, op, f"{problem.refusal()}")
    rows = w_out.shape[1] * (2 if problem.activation.gated else 1)
    fits = x.dim() == 2 and w_in.shape == (rows, x.shape[1]) and w_out.shape[0] == x.shape[1]
    require(fits, op, f"x {tuple(x.shape)}, w_gate_up {tuple(w_in.shape)}, w_down {tuple(w_out.shape)}")
    for given, dtype in zip(biases, problem.bias_dtypes, strict=True):
        require((given is None) == (dtype is None), op, "a bias is given, or missing")
    h = torch.empty(x.shape[0], w_out.shape[1], dtype=x.dtype)
    y = torch.empty(x.shape, dtype=x.dtype)
    extra = tuple(b.contiguous() for b in biases if b is not None)
    library[symbol(problem)](rows_readable(x), w_in.contiguous(), w_out.contiguous(), *extra, h, y)
    return y


def workspace_bytes(problem: MlpProblem, num_tokens: int) -> int:
    """h [T,F]."""
    return num_tokens * problem.inner * DTYPE_BYTES[problem.dtype]


def _cost(problem: MlpProblem, num_tokens: int) -> Cost:
    products = problem.hidden * problem.inner * (3 if problem.activation.gated else 2)
    return Cost(products * DTYPE_BYTES[problem.dtype], 2 * num_tokens * products)


SPECS = vector_specs(
    "tir-gated-mlp",
    "moec::gated_mlp",
    supports=MlpProblem.refusal,
    cost=_cost,
    symbol=symbol,
    build=build,
    workspace_bytes=workspace_bytes,
)

"""Experts as one node of the domain `moec`, with a function body in standard operators that any runtime can run.

    y = moec.Experts_silu <act = "silu", num_experts = 8, top_k = 2> (x, weights, experts, w_in, w_out)

x [T,H], weights f32[T,K], experts i32[T,K], w_in [E,2F,H] (gate half first; [E,F,H] without a gate), w_out [E,H,F],
b_in [E,2F], b_out [E,H] -> y [T,H]: what moec::experts (passes/ir/ops.py) means. The body loops over the experts that
some token chose, so its size does not depend on their number, and experts without tokens cost nothing. One expert's
matrices are copied in each turn: ONNX has no view of a part of a tensor.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from moec.compiler.export.onnx.errors import ExportError
from moec.passes.ir.activation import Activation

DOMAIN, VERSION = "moec", 1

_FUNCTION = """
<domain: "moec", opset_import: ["" : {opset}]>
{name} <{attributes}> ({inputs}) => (y)
{{
  all = Constant <value_ints = [-1]> ()
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  columns = Constant <value_ints = [1]> ()
  go = Cast <to = 9> (one)
  wide = Cast <to = 7> (experts)
  flat = Reshape (wide, all)
  named = Unique <sorted = 1> (flat)
  shape = Shape (w_in)
  num_experts = Gather (shape, zero)
  held = Less (named, num_experts)
  active = Compress (named, held)
  count = Size (active)
  y_shape = Shape (x)
  y_start = ConstantOfShape <value = float[1] {{0}}> (y_shape)
  y_end = Loop (count, go, y_start) <body = step
    (int64 turn, bool on, float[T, H] y_before) => (bool next, float[T, H] y_after)
    {{
      next = Identity (on)
      e = Gather (active, turn)
      chosen = Equal (wide, e)
      where = NonZero (chosen)
      rows = Gather (where, zero)
      place = Transpose <perm = [1, 0]> (where)
      factor_of_row = GatherND (weights, place)
      factor = Unsqueeze (factor_of_row, columns)
      row_index = Unsqueeze (rows, columns)
      x_rows = Gather (x, rows)
{body}
      y_after = ScatterND <reduction = "add"> (y_before, row_index, share)
    }}>
  y = CastLike (y_end, x)
}}
"""

_UNARY = {
    "silu": ("{o}_s = Sigmoid ({i})", "{o} = Mul ({i}, {o}_s)"),
    "gelu": ('{o} = Gelu <approximate = "none"> ({i})',),
    "gelu_tanh": ('{o} = Gelu <approximate = "tanh"> ({i})',),
    "relu": ("{o} = Relu ({i})",),
    "relu2": ("{o}_r = Relu ({i})", "{o} = Mul ({o}_r, {o}_r)"),
    "sigmoid": ("{o} = Sigmoid ({i})",),
    "identity": ("{o} = Identity ({i})",),
}


@dataclasses.dataclass(frozen=True)
class Form:
    """What tells one body apart from another. act: see passes/ir/activation.py."""

    act: str
    bias_in: bool
    bias_out: bool
    weight_on_input: bool

    @property
    def name(self) -> str:
        parts = ["Experts", re.sub(r"\W+", "_", self.act.replace("!", "plain "))]
        parts += ["bias"] * self.bias_in + ["bias_out"] * self.bias_out + ["weighted_input"] * self.weight_on_input
        return "_".join(parts)

    @property
    def inputs(self) -> tuple[str, ...]:
        names = ("x", "weights", "experts", "w_in", "w_out")
        return names + ("b_in",) * self.bias_in + ("b_out",) * self.bias_out


ATTRIBUTES = ("act", "num_experts", "top_k", "layer")
"""What the node says of itself for readers; the body needs none of them."""


def function(form: Form, opset: int) -> Any:
    """The function as an onnx.FunctionProto. Raises: ExportError: the activation has no body here."""
    import onnx.parser

    text = _FUNCTION.format(
        name=form.name,
        opset=opset,
        attributes=", ".join(ATTRIBUTES),
        inputs=", ".join(form.inputs),
        body="\n".join(f"      {line}" for line in _body(form)),
    )
    return onnx.parser.parse_function(text)


def _body(form: Form) -> list[str]:
    """From x_rows, factor, e to share [n, H] in float32."""
    lines = []
    rows = "x_rows"
    if form.weight_on_input:
        lines += [
            "x_wide = Cast <to = 1> (x_rows)",
            "x_scaled = Mul (x_wide, factor)",
            "x_given = CastLike (x_scaled, x_rows)",
        ]
        rows = "x_given"
    lines += _linear("h", rows, "w_in", "b_in" if form.bias_in else None)
    lines += _activation(Activation.parse(form.act))
    lines += _linear("z", "a", "w_out", "b_out" if form.bias_out else None)
    lines.append("z_wide = Cast <to = 1> (z)")
    lines.append("share = Identity (z_wide)" if form.weight_on_input else "share = Mul (z_wide, factor)")
    return lines


def _linear(out: str, rows: str, weight: str, bias: str | None) -> list[str]:
    lines = [f"{weight}_e = Gather ({weight}, e)"]
    if bias is None:
        return [*lines, f"{out} = Gemm <transB = 1> ({rows}, {weight}_e)"]
    return [*lines, f"{bias}_e = Gather ({bias}, e)", f"{out} = Gemm <transB = 1> ({rows}, {weight}_e, {bias}_e)"]


def _apply(fn: str, given: str, out: str) -> list[str]:
    return [line.format(i=given, o=out) for line in _UNARY[fn]]


def _number(name: str, value: float) -> list[str]:
    """A constant of the dtype of h."""
    return [f"{name}_f = Constant <value_float = {value!r}> ()", f"{name} = CastLike ({name}_f, gate)"]


def _activation(act: Activation) -> list[str]:
    """h [n, 2F] -> a [n, F]."""
    if not act.gated:
        return _apply(act.fn, "h", "a")
    lines = ["gate, up = Split <axis = -1, num_outputs = 2> (h)"]
    if act.in_float32:
        lines = ["h_wide = Cast <to = 1> (h)", "gate, up = Split <axis = -1, num_outputs = 2> (h_wide)"]
    if act.fn == "softcapglu":
        return lines + _softcap_glu(act)
    gate, up = "gate", "up"
    if act.limit is not None:
        lines += [*_number("most", act.limit), *_number("least", -act.limit)]
        lines += ["gate_cut = Min (gate, most)", "up_cut = Clip (up, least, most)"]
        gate, up = "gate_cut", "up_cut"
    if act.fn == "swigluoai":
        lines += [*_number("alpha", act.alpha), *_number("unit", 1.0)]
        lines += [
            f"slope = Mul ({gate}, alpha)",
            "open = Sigmoid (slope)",
            f"gated = Mul ({gate}, open)",
            f"up_more = Add ({up}, unit)",
            "product = Mul (gated, up_more)",
        ]
    elif act.fn in _UNARY:
        lines += [*_apply(act.fn, gate, "gated"), f"product = Mul (gated, {up})"]
    else:
        raise ExportError(f"activation {act}: has no body in ONNX operators")
    return [*lines, "a = CastLike (product, h)"]


def _softcap_glu(act: Activation) -> list[str]:
    """cap tanh(gate / cap) * sigmoid(gate) * cap' tanh(up / cap')."""
    lines = [*_number("gate_cap", act.limit or 1.0), *_number("up_cap", act.alpha)]
    for half in ("gate", "up"):
        lines += [
            f"{half}_small = Div ({half}, {half}_cap)",
            f"{half}_tanh = Tanh ({half}_small)",
            f"{half}_soft = Mul ({half}_tanh, {half}_cap)",
        ]
    return [
        *lines,
        "open = Sigmoid (gate)",
        "gated = Mul (gate_soft, open)",
        "product = Mul (gated, up_soft)",
        "a = CastLike (product, h)",
    ]

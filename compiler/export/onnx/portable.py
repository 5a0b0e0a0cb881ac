"""Experts as one node of the domain `moec`, with a function body in standard operators that any runtime can run.

    y = moec.Experts_silu <act = "silu", num_experts = 8, top_k = 2> (x, weights, experts, w_in, w_out)

x [T,H], weights f32[T,K], experts i32[T,K], w_in [E,2F,H] (gate half first; [E,F,H] without a gate), w_out [E,H,F],
b_in [E,2F], b_out [E,H] -> y [T,H]: what moec::experts (passes/ir/ops.py) means. The body loops over the experts that
some token chose, so its size does not depend on their number, and experts without tokens cost nothing. One expert's
matrices are copied in each turn: ONNX has no view of a part of a tensor.

Stacks that are stored as codes come with their scales and zeros (codes.py): s_in, s_out, z_in, z_out behind the others.
The body takes the codes of one expert and makes its numbers, so no more than one expert is ever expanded. Stacks of
half the width of x are widened likewise.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from moec.compiler.export.onnx.errors import ExportError
from moec.passes.ir.activation import Activation
from moec.passes.ir.formats import WeightFormat

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
    """What tells one body apart from another. act: see passes/ir/activation.py.

    format: of both stacks where they are stored as codes.  narrow: their numbers have a narrower dtype than x.
    """

    act: str
    bias_in: bool
    bias_out: bool
    weight_on_input: bool
    format: WeightFormat | None = None
    narrow: bool = False

    @property
    def name(self) -> str:
        """The function's name in the domain `moec`, "Experts_silu_bias": one for each form."""
        parts = ["Experts", re.sub(r"\W+", "_", self.act.replace("!", "plain "))]
        parts += ["bias"] * self.bias_in + ["bias_out"] * self.bias_out + ["weighted_input"] * self.weight_on_input
        if self.format is not None:
            parts.append(re.sub(r"\W+", "_", self.format.name))
        return "_".join([*parts, "narrow"] if self.narrow else parts)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The function's inputs by name, in order."""
        names: tuple[str, ...] = ("x", "weights", "experts", "w_in", "w_out")
        names += ("b_in",) * self.bias_in + ("b_out",) * self.bias_out
        if self.format is None:
            return names
        return names + ("s_in", "s_out") + ("z_in", "z_out") * (not self.format.symmetric)


ATTRIBUTES = ("act", "num_experts", "top_k", "layer", "format")
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
    lines += _linear("h", rows, "in", form.bias_in, form)
    lines += _activation(Activation.parse(form.act))
    lines += _linear("z", "a", "out", form.bias_out, form)
    lines.append("z_wide = Cast <to = 1> (z)")
    lines.append("share = Identity (z_wide)" if form.weight_on_input else "share = Mul (z_wide, factor)")
    return lines


def _linear(out: str, rows: str, which: str, biased: bool, form: Form) -> list[str]:
    """rows [n, K] by the expert's matrix [N, K] of w_in or w_out."""
    lines = _matrix(which, form)
    if not biased:
        return [*lines, f"{out} = Gemm <transB = 1> ({rows}, m_{which})"]
    return [*lines, f"c_{which} = Gather (b_{which}, e)", f"{out} = Gemm <transB = 1> ({rows}, m_{which}, c_{which})"]


def _matrix(which: str, form: Form) -> list[str]:
    """One expert's matrix m_in or m_out, in the dtype of x."""
    if form.format is None:
        if not form.narrow:
            return [f"m_{which} = Gather (w_{which}, e)"]
        return [f"n_{which} = Gather (w_{which}, e)", f"m_{which} = CastLike (n_{which}, x)"]
    format = form.format
    lines = [f"q_{which} = Gather (w_{which}, e)", f"t_{which} = Gather (s_{which}, e)"]
    lines += _codes(f"q_{which}", f"k_{which}", int(format.bits))
    lines += [f"last_{which} = Constant <value_ints = [-1]> ()", f"u_{which} = Unsqueeze (t_{which}, last_{which})"]
    if format.symmetric:
        lines.append(f"o_{which} = Constant <value_float = {float(1 << (int(format.bits) - 1))}> ()")
    else:
        lines += _zeros(which, format)
    grouped = f"0, -1, {format.group}" if format.group else "0, -1"
    return [
        *lines,
        f"grid_{which} = Constant <value_ints = [{grouped}]> ()",
        f"g_{which} = Reshape (k_{which}, grid_{which})",
        f"d_{which} = Sub (g_{which}, o_{which})",
        f"p_{which} = Mul (d_{which}, u_{which})",
        f"whole_{which} = Constant <value_ints = [0, -1]> ()",
        f"r_{which} = Reshape (p_{which}, whole_{which})",
        f"m_{which} = CastLike (r_{which}, x)",
    ]


def _codes(given: str, out: str, bits: int) -> list[str]:
    """u8[N, n] -> f32[N, n * 8 / bits]: the codes in each byte, the lowest first."""
    if bits == 8:
        return [f"{out} = Cast <to = 1> ({given})"]
    lines = [f"{given}_mask = Constant <value = uint8 {{{(1 << bits) - 1}}}> ()"]
    lines.append(f"{given}_axis = Constant <value_ints = [-1]> ()")
    columns = []
    for place in range(8 // bits):
        name = f"{given}_{place}"
        lines += [
            f"{name}_by = Constant <value = uint8 {{{bits * place}}}> ()",
            f'{name}_down = BitShift <direction = "RIGHT"> ({given}, {name}_by)',
            f"{name}_low = BitwiseAnd ({name}_down, {given}_mask)",
            f"{name}_column = Unsqueeze ({name}_low, {given}_axis)",
        ]
        columns.append(f"{name}_column")
    return [
        *lines,
        f"{given}_all = Concat <axis = -1> ({', '.join(columns)})",
        f"{given}_flat = Constant <value_ints = [0, -1]> ()",
        f"{given}_row = Reshape ({given}_all, {given}_flat)",
        f"{out} = Cast <to = 1> ({given}_row)",
    ]


def _zeros(which: str, format: WeightFormat) -> list[str]:
    """o_in or o_out: the zero of each group, shaped as the scales u_in, u_out."""
    lines = [f"y_{which} = Gather (z_{which}, e)"]
    lines += _codes(f"y_{which}", f"v_{which}", int(format.bits))
    if not format.group:
        return [*lines, f"o_{which} = Unsqueeze (v_{which}, last_{which})"]
    return [  # the last byte of a row need not be full
        *lines,
        f"first_{which} = Constant <value_ints = [0]> ()",
        f"groups_{which} = Shape <start = 1> (t_{which})",
        f"axis_{which} = Constant <value_ints = [1]> ()",
        f"held_{which} = Slice (v_{which}, first_{which}, groups_{which}, axis_{which})",
        f"o_{which} = Unsqueeze (held_{which}, last_{which})",
    ]


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

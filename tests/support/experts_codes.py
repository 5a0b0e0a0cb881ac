"""A float64 reference of expert layers on quantised weights, and how far kernels may be from it.

Bounds, of whole outputs relative to their size: bf16 rows round h and y once, 2**-9 each (observed up to 2.7e-3); AMX
also rounds scaled numbers to bf16 where several steps share a panel, and NF4's table (observed up to 4.5e-3). int8 rows
are compared with the same rounding of x and h in float64: what is left is h's bf16 rounding before its int8 rounding,
which moves a code by one here and there (observed up to 4e-3); without it they differ by up to 2.3e-2. Rows of float32
meet codes as numbers of float32, so their bound is that of float32 weights (observed up to 4.6e-7).
"""

import torch
from experts_layer import TOLERANCE

from moec.passes.ir.activation import Activation
from moec.passes.ir.formats import parse_format
from moec.passes.ir.quantise import dequantise_parts, quantise

BOUND = {"numbers": 5e-3, "int8": 6e-3}


def bound(problem):
    """How far a layer of codes may be from the reference."""
    if problem.format_up.endswith("a8"):
        return BOUND["int8"]
    return TOLERANCE["float32"] if problem.dtype == "float32" else BOUND["numbers"]


def numbers(layer):
    """The layer's stacks as their codes mean them, float64; made once."""
    kept, p = vars(layer), layer.problem
    if "numbers" not in kept:
        formats = {"w_gate_up": p.format_up, "w_down": p.format_down}
        wide = {n: dequantise_parts(quantise(layer.tensors[n], parse_format(f))).double() for n, f in formats.items()}
        kept["numbers"] = wide
    return kept["numbers"]


def rounded(rows):
    """Rows as int8 activations mean them."""
    scale = rows.abs().amax(1, keepdim=True).float() / 127
    return (rows / scale.clamp_min(1e-30)).round().clamp(-127, 127).double() * scale.double()


def reference(layer, x, weights, experts, shared, int8):
    """The layer in float64; int8: x and h rounded per row."""
    p, stacks = layer.problem, numbers(layer)
    act, y = Activation.parse(p.act), torch.zeros(x.shape, dtype=torch.float64)
    b_in, b_out = layer.tensors["b_gate_up"], layer.tensors["b_down"]
    for e in range(p.num_experts + p.num_shared):
        if e < p.num_experts:
            rows, slot = (experts == e).nonzero(as_tuple=True)
            factor = weights[rows, slot].double()
        else:
            rows = torch.arange(len(x))
            factor = torch.ones(len(x), dtype=torch.float64) if shared is None else shared.double()
        if not len(rows):
            continue
        given = x[rows].double() * (factor[:, None] if p.weight_on_input else 1)
        h = (rounded(given) if int8 else given) @ stacks["w_gate_up"][e].T
        h = act(h if b_in is None else h + b_in[e].double())
        h = (rounded(h.bfloat16().double()) if int8 else h) @ stacks["w_down"][e].T
        h = h if b_out is None else h + b_out[e].double()
        y.index_add_(0, rows, h * (1 if p.weight_on_input else factor[:, None]))
    return y

"""The sparsemixer score: winner by winner, a softmax over the logits near the best one. Source: Phi-3.5-MoE."""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx.script import builder as T

from moec.compiler.kernels.gate.row import TAKEN, Row
from moec.compiler.kernels.simd import Expr, Registers, lanes_of


def emit_sparsemixer(
    row: Row, logits: Registers, keys: Registers, chosen: Registers, write_expert: Callable[[Expr, Expr], None]
) -> None:
    """The K winners into write_expert, their weights into chosen; see passes/ir/gate.py for the meaning."""
    v, lanes = row.v, row.v.lanes
    rest = Registers(row.layout.total, lanes)
    row.each(lambda i: rest.__setitem__(i, logits[i]))
    row.key_row(logits, keys)
    with T.serial(row.spec.top_k) as k:
        _, place = row.best(keys, 0, row.layout.total)
        best = T.Bind(rest.element(place))
        wide = row.splat(best)

        def near(i: Expr, wide: Expr = wide) -> Expr:
            """exp(rest - best) of the logits within 2*eps of the best one, 0 for the others."""
            logit = T.Bind(logits[i])
            size = T.Bind(T.call_llvm_pure_intrin(lanes_of("float32", lanes), "llvm.fabs", logit))
            bound = T.Select(size < wide, wide, size)
            gap = row.rounded(T.Bind(row.rounded(T.Bind(wide - logit)) / bound))
            far = gap > row.splat(T.float32(2 * row.spec.jitter_eps))
            return T.Select(far, row.splat(T.float32(0)), v.call("exp", rest[i] - wide, lanes))

        total = row.total(near)
        keys.set_element(place, T.int32(TAKEN))
        chosen.set_element(k, row.rounded(T.Bind(v.call("exp", best - best, 1) / total), 1))
        rest.set_element(place, T.float32(float("-inf")))
        write_expert(k, row.layout.expert(place))

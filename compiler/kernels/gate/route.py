"""The steps from scores to experts and weights: groups, the K best, renormalisation. See row.py."""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx.script import builder as T

from moec.compiler.kernels.gate.problem import GateProblem
from moec.compiler.kernels.gate.row import TAKEN, At, Row
from moec.compiler.kernels.gate.sparsemixer import emit_sparsemixer
from moec.compiler.kernels.simd import Expr, Registers, Simd

Write = Callable[[Expr, Expr], None]
"""(place among the K, value) -> stored."""


def emit_route(
    v: Simd, problem: GateProblem, logits: At, bias: At | None, write_weight: Write, write_expert: Write
) -> None:
    """One token: logits (expert -> element) to K weights and K experts, as GateSpec.apply means it."""
    row, spec = Row(v, problem), problem.gate
    lanes, vectors = v.lanes, row.layout.total
    scores, keys = Registers(vectors, lanes), Registers(vectors, lanes, "int32")
    chosen = Registers(-(-spec.top_k // lanes), lanes)
    row.read(logits, problem.logits_dtype, scores)
    row.transform(scores)
    if spec.score == "sparsemixer":
        emit_sparsemixer(row, scores, keys, chosen, write_expert)
    else:
        _choose(row, scores, keys, chosen, bias, write_expert)
    _weigh(row, chosen, write_weight)


def _choose(row: Row, scores: Registers, keys: Registers, chosen: Registers, bias: At | None, write: Write) -> None:
    """The K best into write, their scores into chosen."""
    spec, v = row.spec, row.v
    early = spec.order == "score_then_topk"
    biased = spec.bias_on != "none" and bias is not None
    choice = Registers(row.layout.total, v.lanes) if biased else scores
    if biased and spec.bias_on == "logits":
        _add_bias(row, scores, choice, bias)
    if early:
        row.score(scores)
    if biased and spec.bias_on == "scores":
        _add_bias(row, scores, choice, bias)
    row.key_row(choice, keys)
    if spec.num_groups > 1:
        _mask_groups(row, keys)
    with T.serial(spec.top_k) as k:
        _, place = row.best(keys, 0, row.layout.total)
        keys.set_element(place, T.int32(TAKEN))
        chosen.set_element(k, scores.element(place))
        write(k, row.layout.expert(place))
    if not early:
        _score_chosen(row, chosen)


def _add_bias(row: Row, scores: Registers, choice: Registers, bias: At | None) -> None:
    assert bias is not None and row.problem.selection_bias_dtype is not None  # GateProblem.refusal has seen to it
    row.read(bias, row.problem.selection_bias_dtype, choice)

    def one(i: Expr) -> None:
        choice[i] = row.rounded(scores[i] + choice[i])

    row.each(one)


def _mask_groups(row: Row, keys: Registers) -> None:
    """Experts outside the best groups get the key of group_mask."""
    spec, layout, v = row.spec, row.layout, row.v
    group_keys = Registers(spec.num_groups, 1, "int32")
    with T.serial(spec.num_groups) as g:
        key, place = row.best(keys, g * layout.vectors, layout.vectors)
        if spec.group_score == "sum_top2":
            keys.set_element(place, T.int32(TAKEN))
            second, _ = row.best(keys, g * layout.vectors, layout.vectors)
            keys.set_element(place, key)
            two = v.unkey(key, 1) if layout.group_size == 1 else v.unkey(key, 1) + v.unkey(second, 1)
            key = v.key(row.rounded(T.Bind(two), 1), 1)
        group_keys[g] = key
    best = Registers(2, 1, "int32")  # the greatest key so far, and its group
    with T.serial(spec.groups_kept):
        best[0], best[1] = T.int32(TAKEN), T.int32(0)
        with T.serial(spec.num_groups) as g, T.If(group_keys[g] > best[0]), T.Then():
            best[0] = group_keys[g]
            best[1] = g
        group_keys[best[1]] = T.int32(TAKEN)
    masked = v.key(T.float32(spec.group_mask), 1)
    # past a group's end the keys stay below everything
    with T.serial(spec.num_groups) as g, T.If(group_keys[g] != TAKEN), T.Then(), T.serial(layout.group_size) as j:
        keys.set_element(layout.place(g, j), masked)


def _score_chosen(row: Row, chosen: Registers) -> None:
    """topk_then_score: the score function over the K chosen logits."""
    spec, v = row.spec, row.v
    state = Registers(2, 1)  # greatest, sum
    if spec.score == "softmax":
        state[0] = chosen.element(0)  # the best comes first
        state[1] = T.float32(0)
        with T.serial(spec.top_k) as k:
            e = v.call("exp", chosen.element(k) - state[0], 1)
            chosen.set_element(k, e)
            state[1] = state[1] + e
        with T.serial(spec.top_k) as k:
            chosen.set_element(k, row.rounded(chosen.element(k) / state[1], 1))
    elif spec.score == "sigmoid":
        with T.serial(spec.top_k) as k:
            chosen.set_element(k, row.rounded(v.call("sigmoid", chosen.element(k), 1), 1))


def _weigh(row: Row, chosen: Registers, write: Write) -> None:
    """Renormalisation, scale, and the rounding of the result."""
    spec = row.spec
    total = Registers(1, 1)
    if spec.renormalise:
        total[0] = T.float32(0)
        with T.serial(spec.top_k) as k:
            total[0] = total[0] + chosen.element(k)
        eps, raw = T.float32(spec.renorm_eps), row.rounded(total[0], 1)
        if spec.renorm_rule == "clamp":
            total[0] = T.Select(raw < eps, eps, raw)  # NaN stays
        else:
            total[0] = row.rounded(raw + eps, 1)
    with T.serial(spec.top_k) as k:
        weight = chosen.element(k)
        if spec.renormalise:
            weight = row.rounded(weight / total[0], 1)
        if spec.scale != 1.0:
            weight = row.rounded(weight * T.float32(spec.scale), 1)
        write(k, row.v.rounded(weight, row.problem.result_dtype, 1))

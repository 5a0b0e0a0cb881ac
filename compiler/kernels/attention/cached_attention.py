"""moec::cached_attention for decode and prefill alike: the ragged batch against its caches, GQA, windows, chunks,
sinks.

Call: symbol(q, k, v, k_cache, v_cache, [k_scales, v_scales,] slots, positions, [sinks,] out, scale, window, chunk,
softcap); window and chunk are ints, 0 for none; the scales are there where the caches are int8. q, k, v may have any
stride on all axes but the last, caches on their first three (scales: two); out is contiguous [T,Q,Dv]. New keys and
values are written before anything is read, so tokens of a batch see each other. slots and positions must lie in the
caches: the caller checks. Scores, softmax and sums are float32: within 2e-6 of a float64 evaluation in float32, and in
bfloat16 one rounding of the result (the op's own bfloat16 rounds scores and weights too). Memory: every visible key
and value is read once per kv head and run of up to 64/G tokens of one sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from moec.compiler.kernels.attention import codes, one_token
from moec.compiler.kernels.attention.block import Block, Tensors, tokens_per_task
from moec.compiler.kernels.attention.one_token import OneToken
from moec.compiler.kernels.attention.problem import AttentionProblem
from moec.compiler.kernels.checks import require, rows_readable
from moec.compiler.kernels.simd import Simd, for_chunks, for_rows, match
from moec.compiler.kernels.spec import Cost, vector_specs

SERIAL_ELEMENTS = 32768  # cache elements written below which a second thread costs more than it saves
SERIAL_PRODUCTS = 1 << 18  # products below which a second thread costs more than it saves
TASKS_PER_THREAD = 4  # how far tokens are spread before runs are kept together


def symbol(problem: AttentionProblem) -> str:
    """The function's name in a library."""
    return f"moec_cached_attention_{problem.tag()}"


def build(problem: AttentionProblem, level: str) -> dict[str, Any]:
    """The kernel for an instruction-set level: {exported name: PrimFunc}."""
    v = Simd.of(level)
    heads, kv_heads, d, dv = problem.num_heads, problem.num_kv_heads, problem.head_dim, problem.value_dim
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name(symbol(problem))
        T.func_attr({"tirx.noalias": True})
        n, num_slots, length = T.int64(), T.int64(), T.int64()
        q = match("q", problem.dtype, (n, heads, d), strided=2)
        k = match("k", problem.dtype, (n, kv_heads, d), strided=2)
        value = match("v", problem.dtype, (n, kv_heads, dv), strided=2)
        k_cache = match("k_cache", problem.cache_dtype, (num_slots, length, kv_heads, d), strided=3)
        v_cache = match("v_cache", problem.cache_dtype, (num_slots, length, kv_heads, dv), strided=3)
        k_scales, v_scales = (
            match(name, "float32", (num_slots, length, kv_heads), strided=2) if problem.coded else None
            for name in ("k_scales", "v_scales")
        )
        slots, positions = match("slots", "int64", (n,)), match("positions", "int64", (n,))
        sinks = match("sinks", problem.sinks_dtype, (heads,)) if problem.sinks_dtype else None
        out = match("out", problem.dtype, (n, heads, dv))
        scale = T.arg("scale", T.float32())
        window, chunk = T.arg("window", T.int64()), T.arg("chunk", T.int64())
        softcap = T.arg("softcap", T.float32())
        tensors = Tensors(
            q, k_cache, v_cache, k_scales, v_scales, slots, positions, sinks, out, scale, window, chunk, softcap
        )
        with v.prelude(text=codes.INVERSE if problem.coded else ""):

            def write(t: Any) -> None:
                with T.serial(kv_heads) as c:
                    for new, cache, scales, width in ((k, k_cache, k_scales, d), (value, v_cache, v_scales, dv)):
                        where = t, c, slots[t], positions[t]
                        if scales is None:
                            _copy(v, problem, new, cache, width, where)
                        else:
                            codes.write_row(v, new, problem.dtype, (t, c), cache, scales, (*where[2:], c))

            for_rows(n, n * kv_heads * (d + dv) <= SERIAL_ELEMENTS, write)
            _attend(v, problem, n, tensors)
    return {symbol(problem): ib.get()}


def _copy(v: Simd, problem: AttentionProblem, new: Any, cache: Any, width: int, where: tuple[Any, ...]) -> None:
    t, c, slot, position = where

    def move(at: Any, lanes: int, _: int) -> None:
        value = v.load(new[t, c, at], problem.dtype, lanes)
        v.store(cache[slot, position, c, at], value, problem.cache_dtype, lanes)

    for_chunks(width, v.lanes, 1, move)


def _attend(v: Simd, problem: AttentionProblem, n: Any, tensors: Tensors) -> None:
    """Tasks of (a few tokens, a kv head); a task splits its tokens into runs of one sequence.

    Decode, where no two neighbours are of one sequence: one token. Else as many as leave enough tasks.
    """
    kv_heads, most = problem.num_kv_heads, tokens_per_task(problem)
    keys, runs = _count(n, tensors)
    threads = T.Cast("int64", T.call_extern("int32", "moec_num_threads"))
    spread = T.Bind(T.max(T.min(n * kv_heads // (threads * TASKS_PER_THREAD), most), 1))
    tokens = T.Bind(T.Select(runs == n, T.int64(1), spread))

    def task(at: Any) -> None:
        start, head = v.opaque(at // kv_heads * tokens), v.opaque(at % kv_heads)
        stop = v.opaque(T.min(start + tokens, n))
        block = Block(v, problem, tensors)
        one = OneToken(block) if one_token.takes(v, problem) else None

        def run(t: Any) -> None:
            end = v.opaque(_end_of_run(tensors.slots, t, stop))
            if one is None:
                block.run(t, end, head)
                return
            with T.If(end - t == 1):
                with T.Then():
                    one.run(t, head)
                with T.Else():
                    block.run(t, end, head)

        with T.serial(stop - start) as i:
            t = v.opaque(start + i)
            with T.If(T.Or(i == 0, tensors.slots[t] != tensors.slots[T.max(t - 1, 0)])), T.Then():
                run(t)

    products = T.Bind(keys * (problem.num_heads * (problem.head_dim + problem.value_dim)))
    for_rows((n + tokens - 1) // tokens * kv_heads, products <= SERIAL_PRODUCTS, task)


def _count(n: Any, tensors: Tensors) -> tuple[Any, Any]:
    """Keys before and at all tokens together, and runs of tokens of one sequence."""
    counts = T.alloc_buffer((2,), "int64", scope="global")
    T.buffer_store(counts, T.int64(0), [0])
    T.buffer_store(counts, T.int64(0), [1])
    with T.serial(n) as t:
        T.buffer_store(counts, counts[0] + tensors.positions[t] + 1, [0])
        with T.If(T.Or(t == 0, tensors.slots[t] != tensors.slots[T.max(t - 1, 0)])), T.Then():
            T.buffer_store(counts, counts[1] + 1, [1])
    return T.Bind(counts[0]), T.Bind(counts[1])


def _end_of_run(slots: Any, start: Any, stop: Any) -> Any:
    """The first token after `start`, before `stop`, of another sequence."""
    end = T.alloc_buffer((1,), "int64", scope="global")
    T.buffer_store(end, start + 1, [0])
    with T.serial(stop - start - 1) as j:
        at = start + 1 + j
        with T.If(T.And(end[0] == at, slots[at] == slots[start])), T.Then():
            T.buffer_store(end, at + 1, [0])
    return end[0]


def cached_attention(
    library: Any,
    problem: AttentionProblem,
    qkv: tuple[Tensor, Tensor, Tensor],
    caches: tuple[Tensor, ...],
    slots: Tensor,
    positions: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """The kernel on torch tensors, shapes as in the op -> [T,Q,Dv]; the caches change.

    caches: keys and values, and their scales where the problem's caches are int8. Raises: KernelArgumentError.
    """
    op, (q, k_cache) = "moec::cached_attention", (qkv[0], caches[0])
    require(problem.refusal() is None, op, f"{problem.refusal()}")
    require((sinks is None) == (problem.sinks_dtype is None), op, "sinks are given, or missing")
    require((softcap != 0) == problem.softcap, op, f"softcap {softcap} and the kernel's differ")
    require(len(caches) == (4 if problem.coded else 2), op, f"{len(caches)} caches are given")
    for name, tensor in zip(("k_cache", "v_cache", "k_scales", "v_scales"), caches, strict=False):
        require(tensor.stride(-1) == 1, op, f"{name} is not dense in its last axis")
    for name, index, size in (("slots", slots, k_cache.shape[0]), ("positions", positions, k_cache.shape[1])):
        inside = index.numel() == 0 or (int(index.min()) >= 0 and int(index.max()) < size)
        require(inside, op, f"{name} go past the cache {tuple(k_cache.shape)}")
    out = torch.empty(q.shape[0], problem.num_heads, problem.value_dim, dtype=q.dtype)
    extra = () if sinks is None else (sinks.contiguous(),)
    inputs = (*(rows_readable(x) for x in qkv), *caches, slots.contiguous(), positions.contiguous(), *extra)
    library[symbol(problem)](*inputs, out, scale, window, chunk, softcap)
    return out


DECODE_TOKENS = 64  # more tokens than this are taken for one prompt, fewer for a token each of as many sequences


def _cost(problem: AttentionProblem, num_tokens: int) -> Cost:
    """Decode at problem.mean_context keys per token, or the causal half of a prompt."""
    decode = num_tokens <= DECODE_TOKENS
    keys = num_tokens * (problem.mean_context if decode else 1)
    pairs = keys if decode else num_tokens * (num_tokens + 1) // 2
    widths = problem.head_dim + problem.value_dim
    num_bytes = keys * problem.num_kv_heads * problem.cache_bytes_per_key
    return Cost(num_bytes, 2 * pairs * problem.num_heads * widths)


def library_cost(problem: AttentionProblem, num_tokens: int) -> Cost:
    """What the library's attention does: it copies the visible caches where sequences are not the slots 0..T-1."""
    cost = _cost(problem, num_tokens)
    return Cost(3 * cost.num_bytes, cost.num_flops)


SPECS = vector_specs(
    "tir-cached-attention",
    "moec::cached_attention",
    supports=AttentionProblem.refusal,
    cost=_cost,
    symbol=symbol,
    build=build,
)

"""moec::gate_linear for few tokens: the router's products over many blocks, the gate in the block that ends last.

Call: kernel(x, w, [bias,] [selection_bias,] logits, arrived, weights, experts, n): x bf16 [T,H], w [E,H] as checkpoints
have it; logits f32[T,E] scratch; arrived i32[T], 0 before the launch and again after it. A block's warps make the
logits of four experts each; then the block counts itself in, and the one that finds all others counted reads the
token's logits and chooses. Which block that is changes nothing: the result is the same bits. Sums are f32, in one
order; logits are rounded where router_dtype is bfloat16. Few tokens: w is read once for each token, from the L2 cache.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.kernels.cuda import gate
from moec.compiler.kernels.cuda.emit import (
    WARP,
    Expr,
    Local,
    add,
    define,
    device,
    high_half,
    load_words,
    low_half,
    round_bf16,
    size,
    sync,
    tensor,
    warp_reduce,
    when,
)
from moec.compiler.kernels.gate.problem import GateProblem

WARPS, PER_WARP = 4, 4
THREADS, EXPERTS = WARPS * WARP, WARPS * PER_WARP  # experts of a block
VALUES = 8  # bf16 of one load
MOST_WORDS = 80  # registers of a thread for values on their way
MAX_TOKENS = 64  # beyond it a GEMM and `gate` read w less often; what the choice between them starts from


def refusal(problem: GateProblem) -> str | None:
    """Why the kernel does not take the problem, or None."""
    if reason := problem.refusal():
        return reason
    if problem.num_experts > gate.MAX_EXPERTS or problem.gate.top_k > WARP:
        return f"{problem.num_experts} experts with top {problem.gate.top_k}; at most {gate.MAX_EXPERTS} and {WARP}"
    if problem.hidden % VALUES or not problem.hidden:
        return f"rows of {problem.hidden}, not a multiple of {VALUES}"
    if problem.x_dtype != "bfloat16":
        return f"x in {problem.x_dtype}; only bfloat16 is built"
    return None


def build(problem: GateProblem) -> Any:
    """The TIRx function."""

    def body() -> None:
        n, num_experts, top_k, hidden = size("n"), problem.num_experts, problem.gate.top_k, problem.hidden
        x = tensor("x", (n, hidden), "bfloat16")
        w = tensor("w", (num_experts, hidden), problem.weight_dtype)
        bias = tensor("bias", (num_experts,), problem.bias_dtype) if problem.bias_dtype else None
        chosen_by = None
        if problem.gate.bias_on != "none":
            chosen_by = tensor("selection_bias", (num_experts,), problem.selection_bias_dtype or "float32")
        logits, arrived = tensor("logits", (n, num_experts), "float32"), tensor("arrived", (n,), "int32")
        weights, experts = tensor("weights", (n, top_k), "float32"), tensor("experts", (n, top_k), "int32")
        T.device_entry()
        blocks = -(-num_experts // EXPERTS)
        token, block = T.cta_id([n, blocks])
        warp, lane = T.warp_id([WARPS]), T.lane_id([WARP])
        is_last = T.alloc_buffer((1,), "int32", scope="shared")
        first = T.Bind(block * EXPERTS + warp * PER_WARP)
        router = Router(problem, x, w, bias)
        router.logits_of(token, first, PER_WARP, lane, lambda e, v: T.buffer_store(logits, v, [token, e]))
        sync()
        with when(T.thread_id([THREADS]) == 0):
            T.buffer_store(is_last, count_in(arrived.ptr_to([token]), T.int32(blocks)), [0])
        sync()
        with when(T.And(is_last[0] == 1, warp == 0)):
            by = None if chosen_by is None else lambda e: chosen_by[e]
            fresh = lambda e: read_fresh(logits.ptr_to([token, e]))  # noqa: E731
            gate.choose(problem, lane, fresh, by, (weights, experts), token)

    return define(body)


class Router:
    """The emitter of router logits by warps."""

    def __init__(self, problem: GateProblem, x: Any, w: Any, bias: Any) -> None:
        self.problem, self.x, self.w, self.bias = problem, x, w, bias
        self.float_w = problem.weight_dtype == "float32"
        self.words = 8 if self.float_w else 4  # of w in VALUES

    def logits_of(self, token: Expr, first: Expr, count: int, lane: Expr, store: Any) -> None:
        """store(expert, logit) for experts first .. first + count - 1 that there are; by lane 0 of a whole warp.

        All loads of a round stand before its products and none is conditional: memory answers them together. What is
        beyond the last column or expert is read from the last, and its x counts 0.
        """
        p, rounds = self.problem, rounds_together(self.problem, count)
        sums = Local(count, name="sums")
        x_words, w_words = Local(4 * rounds, "uint32"), Local(self.words * count * rounds, "uint32")
        sums.fill(0)
        with T.serial(-(-p.hidden // (WARP * VALUES * rounds))) as i:
            for r in range(rounds):
                column = T.Bind(((i * rounds + r) * WARP + lane) * VALUES)
                inside = T.Bind(T.min(column, T.int32(p.hidden - VALUES)))
                load_words(x_words, 4 * r, 4, self.x.ptr_to([token, inside]))
                for j in range(count):
                    expert = T.min(first + j, T.int32(p.num_experts - 1))
                    self._load_w(w_words, self.words * (r * count + j), expert, inside)
                if p.hidden % (WARP * VALUES * rounds):
                    for v in range(4 * r, 4 * r + 4):
                        x_words[v] = T.Select(column < p.hidden, x_words[v], T.uint32(0))
            for r in range(rounds):
                for j in range(count):
                    at = self.words * (r * count + j)
                    for v in range(VALUES):
                        sums[j] = sums[j] + _half(x_words, 8 * r + v) * self._w_value(w_words, at, v)
        for j in range(count):
            warp_reduce(sums, j, add)
            expert = T.Bind(first + j)
            with when(T.And(lane == 0, expert < p.num_experts)):
                value = sums[j]
                if self.bias is not None:
                    value = value + T.Cast("float32", self.bias[expert])
                store(expert, round_bf16(value) if p.logits_dtype == "bfloat16" else value)

    def _load_w(self, words: Local, at: int, expert: Expr, column: Expr) -> None:
        load_words(words, at, 4, self.w.ptr_to([expert, column]))
        if self.float_w:
            load_words(words, at + 4, 4, self.w.ptr_to([expert, column + 4]))

    def _w_value(self, words: Local, at: int, v: int) -> Expr:
        return T.reinterpret("float32", words[at + v]) if self.float_w else _half(words, 2 * at + v)


def rounds_together(problem: GateProblem, count: int) -> int:
    """How many groups of WARP * VALUES columns a warp asks for at a time, for `count` experts."""
    words = 8 if problem.weight_dtype == "float32" else 4
    return max(1, min(MOST_WORDS // (words * count + 4), -(-problem.hidden // (WARP * VALUES))))


def waits(problem: GateProblem, count: int) -> int:
    """How often a warp waits for memory, one round after the other."""
    return -(-problem.hidden // (WARP * VALUES * rounds_together(problem, count)))


def _half(words: Local, v: int) -> Expr:
    return high_half(words[v // 2]) if v % 2 else low_half(words[v // 2])


def count_in(counter: Expr, of: Expr) -> Expr:
    """1 for the last of `of` callers, 0 for the others; what they wrote before is visible to it. Leaves 0 behind."""
    source = """
__device__ __forceinline__ int moec_count_in(int* counter, int of) {
  __threadfence();
  if (atomicAdd(counter, 1) != of - 1) return 0;
  *counter = 0;
  __threadfence();
  return 1;
}
"""
    return device("moec_count_in", "int32", source, counter, of)


def read_fresh(pointer: Expr) -> Expr:
    """An f32 that another block wrote, past this multiprocessor's own cache."""
    source = """
__device__ __forceinline__ float moec_read_fresh(const float* p) { return __ldcg(p); }
"""
    return device("moec_read_fresh", "float32", source, pointer)

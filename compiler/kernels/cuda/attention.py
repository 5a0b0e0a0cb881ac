"""moec::cached_attention on bf16 caches: new keys written, then split over the keys, then merged in one order.

    append(k, k_stride, v, v_stride, k_cache, v_cache, slots, positions)
    decode(q, q_stride, k_cache, v_cache, slots, positions, part, stats; splits, parts, scale, window, chunk, softcap)
    merge(part, stats, [sinks,] out; splits, parts)
q, k, v [T, heads*width] with any row stride, caches [N,L,C,D] and [N,L,C,Dv] (cached = N*L, cache_length = L), slots
and positions i64[T], sinks f32[Q], part f32[splits*T,Q,Dv], stats f32[splits*T,Q,2], out bf16[T,Q,Dv];
parts = splits*T. A block of decode takes one token, one kv head and one of `splits` ranges of its visible keys; its
warps take 16 keys in turn and meet at the end. The query heads of a kv head are the rows of mma.sync. Any ragged batch
is right; a long prompt reads its keys once for each of its tokens, so prefill is torch's (catalogue.py). Scores,
softmax and sums are f32; weights are rounded to bf16 before they meet the values, as the op rounds them. `splits` is
the caller's: about 2 blocks per multiprocessor over T * C * splits.
Source: FlashDecoding (Dao et al. 2023) for the split; PTX ISA for the fragments.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from moec.compiler.codegen.cuda_archs import Architecture
from moec.compiler.kernels.attention.problem import AttentionProblem
from moec.compiler.kernels.cuda.emit import (
    WARP,
    Expr,
    Local,
    define,
    device,
    do,
    load_words,
    pack_bf16,
    ptx,
    rows,
    shuffle_xor,
    size,
    store_words,
    sync,
    tensor,
    warp_sync,
    when,
)
from moec.compiler.kernels.cuda.gemm_mma import COPY, LDMATRIX, MMA, swizzled

KEYS, STAGES = 16, 2  # KEYS: of one warp at a time
SMALL_BLOCK_BYTES = 101376  # what a block has everywhere (sm_89, sm_120a)
PANEL = 64  # columns of 128 bytes: rows of keys are cut into panels, each swizzled
MAX_GROUP, MAX_DIM = 16, 256
APPEND_THREADS = 128
LDMATRIX_TRANS = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"

# what is computed from it is computed in each step: kept over all steps, the places of the copies spill other registers
_ANEW = '__device__ __forceinline__ void moec_anew(int& v) { asm volatile("" : "+r"(v)); }'


def refusal(problem: AttentionProblem, arch: Architecture) -> str | None:
    """Why the kernels do not take the problem on the architecture, or None."""
    if reason := problem.refusal():
        return reason
    if (problem.dtype, problem.cache_dtype) != ("bfloat16", "bfloat16") or problem.sinks_dtype not in (None, "float32"):
        found = f"q in {problem.dtype}, caches in {problem.cache_dtype}, sinks in {problem.sinks_dtype}"
        return f"{found}; only bfloat16 with float32 sinks is built"
    if problem.group > MAX_GROUP:
        return f"{problem.group} query heads for one kv head, at most {MAX_GROUP}"
    widths = problem.head_dim, problem.value_dim
    if any(w % 16 or not 16 <= w <= MAX_DIM for w in widths):
        return f"heads of {widths[0]} and {widths[1]} columns, not multiples of 16 up to {MAX_DIM}"
    if (needed := shared_bytes(problem)) > arch.block_shared_bytes:
        return f"{needed} bytes of shared memory, a block on {arch.name} has {arch.block_shared_bytes}"
    return None


def _panel_bytes(width: int) -> int:
    """16 rows of `width` columns, cut into panels."""
    return -(-width // PANEL) * KEYS * 128


def warps(problem: AttentionProblem) -> int:
    """Of a block of decode: four, or two where the rings of four are too large for some architecture."""
    return 4 if _shared_bytes(problem, 4) <= SMALL_BLOCK_BYTES else 2


def shared_bytes(problem: AttentionProblem) -> int:
    """Of a block of decode: the queries, the rings of keys and values of all warps, and where they meet."""
    return _shared_bytes(problem, warps(problem))


def _shared_bytes(problem: AttentionProblem, warps: int) -> int:
    k, v = _panel_bytes(problem.head_dim), _panel_bytes(problem.value_dim)
    return k + warps * (STAGES * (k + v) + KEYS * 8)


def build_append(problem: AttentionProblem) -> Any:
    """The TIRx function of `append`: one block per token."""
    kv_heads = problem.num_kv_heads

    def body() -> None:
        n, cached = size("n"), size("cached")
        k_at, v_at = rows("k", "bfloat16"), rows("v", "bfloat16")
        length = T.arg("cache_length", T.int32())
        k_cache = tensor("k_cache", (cached, kv_heads * problem.head_dim), "bfloat16")
        v_cache = tensor("v_cache", (cached, kv_heads * problem.value_dim), "bfloat16")
        slots, positions = tensor("slots", (n,), "int64"), tensor("positions", (n,), "int64")
        T.device_entry()
        token, thread = T.cta_id([n]), T.thread_id([APPEND_THREADS])
        to = T.Bind(slots[token] * T.Cast("int64", length) + positions[token])
        words = Local(4, "uint32", "words")
        for at, cache, width in ((k_at, k_cache, problem.head_dim), (v_at, v_cache, problem.value_dim)):
            chunks = kv_heads * width // 8
            with T.serial(-(-chunks // APPEND_THREADS)) as i:
                column = T.Bind((i * APPEND_THREADS + thread) * 8)
                with when(column < chunks * 8):
                    load_words(words, 0, 4, at(token, column))
                    store_words(cache.ptr_to([to, column]), [words[j] for j in range(4)])

    return define(body)


def build_decode(problem: AttentionProblem) -> Any:
    """The TIRx function of `decode`; ask refusal first."""
    return define(lambda: _Decode(problem).emit())


class _Decode:
    """The emitter of one block; the queries at 0 of shared memory, then a ring for each warp, then maxima and sums."""

    def __init__(self, problem: AttentionProblem) -> None:
        self.problem, self.group, self.warps = problem, problem.group, warps(problem)
        self.threads = self.warps * WARP
        self.k_bytes, self.v_bytes = _panel_bytes(problem.head_dim), _panel_bytes(problem.value_dim)
        self.stage_bytes = self.k_bytes + self.v_bytes
        self.rings = self.k_bytes  # where they begin
        self.stats_at = self.rings + self.warps * STAGES * self.stage_bytes

    def emit(self) -> None:
        p = self.problem
        n, parts, cached, kv_heads = size("n"), size("parts"), size("cached"), p.num_kv_heads
        q_at = rows("q", "bfloat16")
        self.length = T.arg("cache_length", T.int32())
        self.k_cache = tensor("k_cache", (cached, kv_heads, p.head_dim), "bfloat16")
        self.v_cache = tensor("v_cache", (cached, kv_heads, p.value_dim), "bfloat16")
        slots, positions = tensor("slots", (n,), "int64"), tensor("positions", (n,), "int64")
        self.part = tensor("part", (parts, p.num_heads, p.value_dim), "float32")
        self.stats = tensor("stats", (parts, p.num_heads, 2), "float32")
        splits = T.arg("splits", T.int32())
        self.scale, window, chunk = T.arg("scale", T.float32()), T.arg("window", T.int32()), T.arg("chunk", T.int32())
        self.cap = T.arg("softcap", T.float32()) if p.softcap else None
        T.device_entry()
        self.row, self.head = T.cta_id([parts, kv_heads])  # split-major
        thread = self.thread = T.thread_id([self.threads])
        self.warp, self.lane = thread // WARP, thread % WARP
        self.shared = T.alloc_buffer((shared_bytes(p),), "uint8", scope="shared.dyn", align=128)
        token, split = T.Bind(self.row % n), T.Bind(self.row // n)
        self.sequence = T.Bind(slots[token] * T.Cast("int64", self.length))
        self._range(T.Bind(T.Cast("int32", positions[token])), split, splits, window, chunk)
        self._copy_queries(lambda column: q_at(token, column))
        self._loop()
        self._meet()

    def _range(self, position: Expr, split: Expr, splits: Expr, window: Expr, chunk: Expr) -> None:
        """The keys begin .. end of this block: whole steps of the warps, of those that the token sees."""
        first = Local(1, "int32", "first")
        first[0] = T.int32(0)
        with when(window > 0):
            first[0] = T.max(first[0], position - window + 1)
        with when(chunk > 0):
            first[0] = T.max(first[0], position // T.max(chunk, T.int32(1)) * chunk)
        step = self.warps * KEYS
        steps = T.Bind((position + 1 - first[0] + (step - 1)) // step)
        per_split = T.Bind((steps + splits - 1) // splits * step)
        bounds = Local(3, "int32", "bounds")  # in registers: TVM would write these divisions wherever they are used
        bounds[0] = first[0] + split * per_split
        bounds[1] = T.min(bounds[0] + per_split, position + 1)
        bounds[2] = T.max((bounds[1] - bounds[0] + (step - 1)) // step, T.int32(0))
        self.begin, self.end, self.steps = bounds[0], bounds[1], bounds[2]

    def _copy_queries(self, q_at: Any) -> None:
        """The heads of the group, 16 rows; rows past it are zeros. One group of copies."""
        width = self.problem.head_dim
        chunks = width // 8
        for first in range(0, KEYS * chunks, self.threads):
            at = T.Bind(first + self.thread)
            row, chunk = at // chunks, at % chunks
            with when(at < KEYS * chunks):
                head = T.min(row, T.int32(self.group - 1))
                source = q_at((self.head * self.group + head) * width + chunk * 8)
                valid = T.Select(row < self.group, T.uint32(16), T.uint32(0))
                ptx(COPY, self.shared.ptr_to([_panel_place(row, chunk)]), source, 16, valid)
        ptx("cp.async.commit_group")

    def _copy_keys(self, stage: Expr, step: Expr) -> None:
        """This warp's keys and values of a step; rows past the end are zeros."""
        key = T.Bind(self.begin + step * (self.warps * KEYS) + self.warp * KEYS)
        base = T.Bind(self._ring() + stage * self.stage_bytes)
        p, lane = self.problem, Local(1, "int32", "copy_lane")
        lane[0] = self.lane
        do(device("moec_anew", "void", _ANEW, lane[0]))
        for cache, width, place in ((self.k_cache, p.head_dim, 0), (self.v_cache, p.value_dim, self.k_bytes)):
            chunks = width // 8
            for first in range(0, KEYS * chunks, WARP):
                at = first + lane[0]
                row, chunk = T.Bind(at // chunks), T.Bind(at % chunks)
                inside = key + row < self.end
                source = self.sequence + T.Cast("int64", key + row)  # past the end no byte of it is read
                valid = T.Select(inside, T.uint32(16), T.uint32(0))
                to = self.shared.ptr_to([base + place + _panel_place(row, chunk)])
                ptx(COPY, to, cache.ptr_to([source, self.head, chunk * 8]), 16, valid)

    def _ring(self) -> Expr:
        return self.rings + self.warp * (STAGES * self.stage_bytes)

    def _loop(self) -> None:
        self.sums = Local(self.problem.value_dim // 2, name="sums")  # 16 rows of values: 4 of 8 columns to a lane
        self.top, self.total = Local(2, name="top"), Local(2, name="total")  # of rows lane / 4 and 8 + lane / 4
        self.scores, self.weights = Local(8, name="scores"), Local(4, "uint32", "weights")
        self.a, self.b = Local(4, "uint32", "a"), Local(4, "uint32", "b")
        self.sums.fill(0)
        self.total.fill(0)
        self.top.fill(float("-inf"))
        for s in range(STAGES - 1):
            with when(s < self.steps):
                self._copy_keys(T.int32(s), T.int32(s))
            ptx("cp.async.commit_group")
        ptx("cp.async.wait_group", STAGES - 1)
        sync()  # the queries have landed for all warps
        with T.serial(self.steps) as step:
            with when(step + (STAGES - 1) < self.steps):
                self._copy_keys((step + (STAGES - 1)) % STAGES, step + (STAGES - 1))
            ptx("cp.async.commit_group")
            ptx("cp.async.wait_group", STAGES - 1)
            warp_sync()  # the stage has landed for all lanes
            base = T.Bind(self._ring() + step % STAGES * self.stage_bytes)
            self._score(base, T.Bind(self.begin + step * (self.warps * KEYS) + self.warp * KEYS))
            self._weigh()
            self._add_values(base + self.k_bytes)
            warp_sync()  # all lanes have read it before it is filled again
        ptx("cp.async.wait_group", 0)

    def _score(self, base: Expr, key: Expr) -> None:
        """scores: 16 heads x 16 keys, scaled, capped, -inf past the end."""
        self.scores.fill(0)
        lane = self.lane
        for k in range(self.problem.head_dim // 16):
            at = _panel_place(lane % 16, k * 2 + lane // 16)
            ptx(LDMATRIX, *[self.a[i] for i in range(4)], self.shared.ptr_to([at]))
            at = base + _panel_place(lane % 8 + lane // 16 * 8, k * 2 + lane // 8 % 2)
            ptx(LDMATRIX, *[self.b[i] for i in range(4)], self.shared.ptr_to([at]))
            for t in range(2):
                scores = [self.scores[t * 4 + i] for i in range(4)]
                ptx(MMA["bfloat16"], *scores, *[self.a[i] for i in range(4)], self.b[2 * t], self.b[2 * t + 1], *scores)
        for t in range(2):
            for i in range(4):
                value = self.scores[t * 4 + i] * self.scale
                if self.cap is not None:
                    value = T.tanh(value / self.cap) * self.cap
                inside = key + t * 8 + lane % 4 * 2 + i % 2 < self.end
                self.scores[t * 4 + i] = T.Select(inside, value, T.float32(float("-inf")))

    def _weigh(self) -> None:
        """scores -> exp(score - top), packed for the next product; what was summed before is brought to the new top."""
        for r in range(2):
            own = [self.scores[t * 4 + r * 2 + j] for t in range(2) for j in range(2)]
            new = Local(1, name="new_top")
            new[0] = self.top[r]
            for score in own:
                new[0] = T.max(new[0], score)
            for step in (1, 2):
                new[0] = T.max(new[0], shuffle_xor(new[0], step))
            base = T.Bind(_finite(new[0]))
            factor = T.Bind(T.exp(self.top[r] - base))
            self.top[r] = new[0]
            self.total[r] = self.total[r] * factor
            for t in range(2):
                for j in range(2):
                    at = t * 4 + r * 2 + j
                    self.scores[at] = T.exp(self.scores[at] - base)
                    self.total[r] = self.total[r] + self.scores[at]
                self.weights[t * 2 + r] = pack_bf16(self.scores[t * 4 + r * 2], self.scores[t * 4 + r * 2 + 1])
            for i in range(0, self.sums.size, 4):
                for j in range(2):
                    self.sums[i + r * 2 + j] = self.sums[i + r * 2 + j] * factor

    def _add_values(self, base: Expr) -> None:
        lane = self.lane
        for d in range(self.problem.value_dim // 16):
            at = base + _panel_place(lane % 8 + lane // 8 % 2 * 8, d * 2 + lane // 16)
            ptx(LDMATRIX_TRANS, *[self.b[i] for i in range(4)], self.shared.ptr_to([at]))
            for t in range(2):
                sums = [self.sums[(d * 2 + t) * 4 + i] for i in range(4)]
                a = [self.weights[i] for i in range(4)]
                ptx(MMA["bfloat16"], *sums, *a, self.b[2 * t], self.b[2 * t + 1], *sums)

    def _meet(self) -> None:
        """The warps' sums, tops and totals become the block's, warp by warp; the rings hold the sums."""
        lane, width = self.lane, self.problem.value_dim
        for r in range(2):
            for step in (1, 2):
                self.total[r] = self.total[r] + shuffle_xor(self.total[r], step)
        sync()  # all warps have read their rings
        floats = _Floats(self.shared)
        for r in range(2):
            row = lane // 4 + 8 * r
            for d in range(width // 8):
                at = self.rings + ((self.warp * KEYS + row) * width + d * 8 + lane % 4 * 2) * 4
                floats.store(at, [self.sums[d * 4 + r * 2], self.sums[d * 4 + r * 2 + 1]])
            with when(lane % 4 == 0):
                floats.store(self.stats_at + (self.warp * KEYS + row) * 8, [self.top[r], self.total[r]])
        sync()
        with T.serial(-(-self.group * width // self.threads)) as i:
            at = T.Bind(i * self.threads + self.thread)
            with when(at < self.group * width):
                self._write(floats, T.Bind(at // width), T.Bind(at % width))

    def _write(self, floats: _Floats, row: Expr, column: Expr) -> None:
        tops = [T.Bind(floats.load(self.stats_at + (w * KEYS + row) * 8)) for w in range(self.warps)]
        top = tops[0]
        for other in tops[1:]:
            top = T.Bind(T.max(top, other))
        base, sums = T.Bind(_finite(top)), Local(2, name="met")
        sums.fill(0)
        for w in range(self.warps):
            factor = T.Bind(T.exp(tops[w] - base))
            at = T.Bind(w * KEYS + row)
            sums[0] = sums[0] + factor * floats.load(self.rings + (at * self.problem.value_dim + column) * 4)
            sums[1] = sums[1] + factor * floats.load(self.stats_at + at * 8 + 4)
        head = T.Bind(self.head * self.group + row)
        T.buffer_store(self.part, sums[0], [self.row, head, column])
        with when(column == 0):
            T.buffer_store(self.stats, top, [self.row, head, 0])
            T.buffer_store(self.stats, sums[1], [self.row, head, 1])


def _panel_place(row: Expr, chunk: Expr) -> Expr:
    """Where 16-byte chunk `chunk` of a row of 16 rows lies: panels of 8 chunks, one behind the other."""
    return chunk // 8 * (KEYS * 128) + swizzled(row, chunk % 8)


def _finite(top: Expr) -> Expr:
    """top, or 0 where nothing is visible: then every exp is of -inf, not of NaN."""
    return T.Select(top == T.float32(float("-inf")), T.float32(0), top)


class _Floats:
    """f32 in the bytes of shared memory."""

    def __init__(self, shared: Any) -> None:
        self.shared, self.word = shared, Local(1, "uint32", "shared_word")

    def store(self, at: Expr, values: list[Expr]) -> None:
        for i, value in enumerate(values):
            ptx("st.shared.b32", self.shared.ptr_to([at + 4 * i]), T.reinterpret("uint32", value))

    def load(self, at: Expr) -> Expr:
        ptx("ld.shared.b32", self.word[0], self.shared.ptr_to([at]))
        return T.reinterpret("float32", T.Bind(self.word[0]))


def build_merge(problem: AttentionProblem) -> Any:
    """The TIRx function of `merge`: one block per token and query head."""
    heads, width = problem.num_heads, problem.value_dim
    threads = -(-width // WARP) * WARP

    def body() -> None:
        n, parts = size("n"), size("parts")
        part = tensor("part", (parts, heads, width), "float32")
        stats = tensor("stats", (parts, heads, 2), "float32")
        sinks = tensor("sinks", (heads,), "float32") if problem.sinks_dtype else None
        out = tensor("out", (n, heads, width), "bfloat16")
        splits = T.arg("splits", T.int32())
        T.device_entry()
        token, head = T.cta_id([n, heads])
        column = T.thread_id([threads])
        top, sums = Local(1, name="top"), Local(2, name="sums")
        top[0] = T.float32(float("-inf")) if sinks is None else sinks[head]
        with T.serial(splits) as s:
            top[0] = T.max(top[0], stats[s * n + token, head, 0])
        base = T.Bind(_finite(top[0]))
        sums[0] = T.float32(0)
        sums[1] = T.float32(0) if sinks is None else T.exp(sinks[head] - base)
        with when(column < width):
            with T.serial(splits) as s:
                factor = T.Bind(T.exp(stats[s * n + token, head, 0] - base))
                sums[0] = sums[0] + factor * part[s * n + token, head, column]
                sums[1] = sums[1] + factor * stats[s * n + token, head, 1]
            T.buffer_store(out, T.Cast("bfloat16", sums[0] / sums[1]), [token, head, column])

    return define(body)

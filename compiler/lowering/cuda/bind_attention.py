"""Attention over the cache on a GPU: split over the keys for few tokens, torch's own for long prompts."""

from __future__ import annotations

import functools

import torch
from torch import fx

from moec.compiler.codegen.cuda_archs import Architecture
from moec.compiler.kernels.attention.problem import AttentionProblem
from moec.compiler.kernels.cuda import attention
from moec.compiler.kernels.cuda.kernel import CudaKernel
from moec.compiler.kernels.spec import Cost
from moec.compiler.lowering.bind_layers import dtype_of
from moec.compiler.lowering.candidates import Results, Site
from moec.compiler.lowering.cuda.bind_layers import library
from moec.compiler.lowering.cuda.cost import kernel_us
from moec.compiler.lowering.cuda.launches import candidate, launch, named, numbers, refused, rows_of, size, strided_rows
from moec.compiler.lowering.writer import Writer, arguments

CONTEXT = 512  # assumed: keys of a token that decodes
BLOCKS = 264  # of decode: about two for each multiprocessor of the largest devices
MOST_SPLITS = 32
PARTS = ("append", "decode", "merge")


def attention_site(node: fx.Node, arch: Architecture) -> Site:
    """moec::cached_attention."""
    a = arguments(node)
    q, v, cache = a["q"].meta["val"], a["v"].meta["val"], a["k_cache"].meta["val"]
    problem = AttentionProblem(
        num_heads=int(q.shape[1]),
        num_kv_heads=int(v.shape[1]),
        head_dim=int(q.shape[2]),
        value_dim=int(v.shape[2]),
        dtype=dtype_of(a["q"]) or "",
        cache_dtype=dtype_of(a["k_cache"]) or "",
        sinks_dtype=None if a["sinks"] is None else "float32",
        softcap=a["softcap"] != 0.0,
    )
    row_bytes = problem.num_kv_heads * problem.cache_bytes_per_key

    def read_by_row(tokens: int) -> Cost:
        """Every token reads the keys that it sees: those of a sequence, or half of a prompt."""
        return Cost(tokens * max(CONTEXT, tokens // 2) * row_bytes, 0)

    def read_by_torch(tokens: int) -> Cost:
        """Decode copies the keys of its slots first; a prompt reads its own once."""
        return Cost((min(tokens, 256) * 3 * CONTEXT + tokens) * row_bytes, 0)

    plain = library(node, arch, 10, read_by_torch)
    if reason := attention.refusal(problem, arch):
        return Site(node, (plain, refused("cuda-attention", reason)))
    kernels = {
        part: named(
            CudaKernel(part, arch.name, functools.partial(getattr(attention, f"build_{part}"), problem)), problem
        )
        for part in PARTS
    }
    kv = problem.num_kv_heads

    def write(writer: Writer, results: Results) -> None:
        rows = rows_of(writer, a["q"])
        splits = f"max(1, min({MOST_SPLITS}, {BLOCKS}//max(({rows})*{kv}, 1)))"
        slots, length = (writer.buffers.size(n, node) for n in cache.shape[:2])
        shared = {"n": size(rows), "cached": size(f"({slots})*({length})"), "cache_length": size(length)}
        shared |= {"splits": size(splits), "parts": size(f"({splits})*({rows})")}
        shared |= {name: writer.tensor(a[name]) for name in ("k_cache", "v_cache", "slots", "positions")}
        for name in ("q", "k", "v"):
            place, stride = strided_rows(writer, a[name])
            shared |= {name: place, f"{name}_stride": stride, f"{name}_elements": size(f"({rows})*{stride}")}
        launch(writer, kernels["append"], node, shared, ())
        most = f"({rows} + {BLOCKS // kv})"  # splits * T is at most this
        part = writer.scratch(f"{node.name}_part", "float32", (most, problem.num_heads, problem.value_dim))
        stats = writer.scratch(f"{node.name}_stats", "float32", (most, problem.num_heads, 2))
        shared |= {"part": part, "stats": stats, "out": {"buffer": results[0]}}
        shared |= {name: a[name] for name in ("scale", "window", "chunk", "softcap")}
        launch(writer, kernels["decode"], node, shared, [part["buffer"], stats["buffer"]])
        if a["sinks"] is not None:
            shared["sinks"] = numbers(writer, a["sinks"], torch.float32)
        launch(writer, kernels["merge"], node, shared, results)

    return Site(
        node,
        (plain, candidate("cuda-attention", lambda t: kernel_us(arch, read_by_row(t), 3), write, [*kernels.values()])),
    )

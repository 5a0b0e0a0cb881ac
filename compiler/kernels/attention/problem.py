"""The problem that the cached-attention kernel solves, and what it refuses."""

from __future__ import annotations

import dataclasses

from moec.compiler.kernels.simd import DTYPE_BYTES
from moec.compiler.kernels.spec import DTYPE_TAGS

MAX_HEAD_DIM = 1024
CACHE_BYTES = {**DTYPE_BYTES, "int8": 1}


@dataclasses.dataclass(frozen=True)
class AttentionProblem:
    """moec::cached_attention for fixed heads; any number of tokens, sequences and cache places.

    dtype: of q, k, v and the result.  cache_dtype: of both caches; "int8" for moec::cached_attention_int8, whose caches
    have a float32 scale for each token and head.  sinks_dtype: None without sinks.
    softcap: whether scores are capped. scale, window, chunk and the cap itself are arguments of the call.
    mean_context: keys per query that the cost model assumes.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"
    sinks_dtype: str | None = None
    softcap: bool = False
    mean_context: int = 1024

    @property
    def coded(self) -> bool:
        """Whether the caches hold codes with scales."""
        return self.cache_dtype == "int8"

    @property
    def cache_bytes_per_key(self) -> int:
        """Of one token and kv head, key and value."""
        width = self.head_dim + self.value_dim
        return width * CACHE_BYTES[self.cache_dtype] + (8 if self.coded else 0)

    @property
    def group(self) -> int:
        """Query heads that share one kv head."""
        return self.num_heads // self.num_kv_heads

    def refusal(self) -> str | None:
        """Why the kernel does not take the problem, or None."""
        named = {"q": self.dtype, "the cache": self.cache_dtype, "sinks": self.sinks_dtype or "float32"}
        for what, dtype in named.items():
            known = CACHE_BYTES if what == "the cache" else DTYPE_BYTES
            if dtype not in known:
                return f"{what} in {dtype}, only {', '.join(known)} are built"
        if self.num_heads % self.num_kv_heads:
            return f"{self.num_heads} query heads do not divide by {self.num_kv_heads} kv heads"
        if max(self.head_dim, self.value_dim) > MAX_HEAD_DIM:
            return f"heads are wider than {MAX_HEAD_DIM}"
        return None

    def tag(self) -> str:
        """What tells the code of two problems apart, as part of a symbol."""
        dtypes = "_".join(DTYPE_TAGS[d] for d in (self.dtype, self.cache_dtype, self.sinks_dtype))
        sizes = f"q{self.num_heads}c{self.num_kv_heads}d{self.head_dim}v{self.value_dim}"
        return f"{sizes}_{dtypes}" + ("_cap" if self.softcap else "")

"""What the processor can do, as the few instruction-set levels that kernels are built for.

Levels, each a superset of the one before it: avx2 < avx512f < avx512_bf16 < amx_bf16. A library built for a level
runs on every machine that has all of the level's features.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2"})
_AVX512F = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_AVX512_BF16 = _AVX512F | {"avx512_vnni", "avx512_bf16"}
_AMX_BF16 = _AVX512_BF16 | {"amx_tile", "amx_bf16", "amx_int8", "gfni", "avx512vbmi"}

LEVELS: dict[str, frozenset[str]] = {
    "avx2": _AVX2,
    "avx512f": _AVX512F,
    "avx512_bf16": _AVX512_BF16,
    "amx_bf16": _AMX_BF16,
}
"""Level -> the processor features (names of /proc/cpuinfo) that it needs, lowest level first."""

_CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def detect_features() -> frozenset[str]:
    """Features of this processor that some level asks for; empty where the system does not tell."""
    known = frozenset().union(*LEVELS.values())
    return known & parse_cpuinfo(_CPUINFO.read_text()) if _CPUINFO.exists() else frozenset()


def parse_cpuinfo(text: str) -> frozenset[str]:
    """Flags of the first processor in the text of /proc/cpuinfo."""
    for line in text.splitlines():
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def missing_features(level: str, features: Iterable[str] | None = None) -> list[str]:
    """Features of the level that the processor lacks, sorted; empty when kernels of that level run here.

    Raises: KeyError: an unknown level.
    """
    present = detect_features() if features is None else frozenset(features)
    return sorted(LEVELS[level] - present)


def best_level(features: Iterable[str] | None = None) -> str | None:
    """The highest level that the processor has in full, or None where it has none."""
    usable = [level for level in LEVELS if not missing_features(level, features)]
    return usable[-1] if usable else None

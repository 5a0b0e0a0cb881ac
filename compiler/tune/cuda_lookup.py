"""What an engine's CUDA GEMMs are configured with: the pair of tiles that a bundle's results say is fastest."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moec.compiler.codegen.cuda_archs import Architecture
from moec.compiler.codegen.cuda_toolchain import cubin_compiler
from moec.compiler.kernels.cuda import gemm_space
from moec.compiler.kernels.cuda.gemm_problem import GemmProblem
from moec.compiler.kernels.cuda.gemm_space import config_of, tile_of
from moec.compiler.kernels.cuda.layer import LayerShape, default_tile, tile_rows
from moec.compiler.lowering.tuned import Tuned
from moec.compiler.tune.cuda_keys import OP, arch_of_device, gemm_key, gemm_problem, toolchain
from moec.compiler.tune.database import Database
from moec.compiler.tune.misses import why_nothing_fits
from moec.compiler.tune.record import Record, config_text, shape_text
from moec.compiler.tune.routing import preferred

MODES = ("gate_up", "down")
LARGE = {"cuda-experts-small": False, "cuda-experts-large": True}
"""Kernels of lowering whose tiles were measured -> whether their default tiles are those for many tokens."""
REACH = 4
"""A measurement speaks for token counts up to so many times more or fewer; nearer ones speak first."""
Pair = tuple[Record, Record]


class CudaTuning:
    """A tuning database as the lowering for a GPU asks it.

    Raises: DatabaseError: the file is absent or no tuning database.  ToolchainError: no compiler for cubins.
    """

    def __init__(self, path: Path, arch: Architecture) -> None:
        self._name, self._arch, self._tools = path.name, arch, toolchain(cubin_compiler())
        with Database(path, read_only=True) as database:
            records = [r for r in database.records() if r.key.op == OP]
        self._records = [r for r in records if arch_of_device(r.key.device) == arch.name]

    def ranges(self, problem: LayerShape, kernel: str) -> Sequence[Tuned] | str:
        """Ranges of T around the measured counts; T between two goes with the nearer. Or why there are none."""
        if (problem.dtype, problem.act) != ("bfloat16", "silu"):
            return f"{problem.dtype} with {problem.act}; bundles measure bfloat16 with a SiLU gate"
        sizes = {"E": problem.num_experts, "F": problem.inner, "H": problem.hidden, "K": problem.top_k}
        sizes["S"] = problem.num_shared
        known = self._of_layer(sizes)
        if isinstance(known, str):
            return known
        counts = sorted({r.key.tokens for r in known})
        found = [self._at(t, [r for r in known if r.key.tokens == t], sizes, LARGE[kernel]) for t in counts]
        first, last = counts[0] // REACH, counts[-1] * REACH
        ends = [math.isqrt(a * b) for a, b in itertools.pairwise(counts)] + [last]
        made = [dataclasses.replace(one, max_tokens=end) for one, end in zip(found, ends, strict=True)]
        far = Tuned(None, {}, "default", f"{self._name} has no measurement near", 1.0)
        before = [dataclasses.replace(far, max_tokens=first)] if first else []
        return [*before, *made, far]

    def _of_layer(self, sizes: Mapping[str, int]) -> list[Record] | str:
        keys = {mode: gemm_key(gemm_problem(sizes, mode), sizes, 1, "-", "-", self._tools) for mode in MODES}
        same = [r for r in self._records if r.key.shape in {k.shape for k in keys.values()}]
        own = keys["down"]
        fitting = [r for r in same if (r.key.kernel_sha256, r.key.toolchain) == (own.kernel_sha256, own.toolchain)]
        if not fitting:
            of_layer = [dataclasses.replace(r.key, device=own.device) for r in same]  # all are for this architecture
            layer = f"{OP} {shape_text(sizes)} on {self._arch.name}"
            return why_nothing_fits(self._name, own, of_layer, layer, "`moec tune --bundle` makes candidates")
        device = fitting[-1].key.device
        here = [r for r in fitting if r.key.device == device]
        routing = preferred(dict.fromkeys(r.key.routing for r in here))
        return [r for r in here if r.key.routing == routing]

    def _at(self, tokens: int, records: list[Record], sizes: Mapping[str, int], large: bool) -> Tuned:
        """The best pair of one number of rows where its bound lies below that of the tiles without tuning."""
        timed = {mode: [r for r in records if _mode(r) == mode and _is_timed(r)] for mode in MODES}
        usual = {mode: next((r for r in timed[mode] if r.is_default), None) for mode in MODES}
        own = {m: next((r for r in timed[m] if r.config == self._default(sizes, m, large)), None) for m in MODES}
        told = f"T={tokens} on {records[0].key.device}, {records[0].key.routing} routing"
        base = {mode: one.median_us for mode, one in usual.items() if one is not None and one.median_us}
        mine = [r for r in own.values() if r is not None]
        if len(base) < len(MODES) or len(mine) < len(MODES):
            return Tuned(tokens, {}, "default", f"{told}: the tiles without tuning were not measured", 1.0)

        def total(pair: Sequence[Record], which: str) -> float:
            return sum(base[_mode(r)] * (1.0 if r.is_default else getattr(r, which) or math.inf) for r in pair)

        pairs = [p for p in self._pairs(timed, sizes) if total(p, "ratio_high") < total(mine, "ratio_low")]
        if not pairs:
            return Tuned(tokens, {}, "default", f"measured at {told}: nothing was faster", 1.0)
        best = min(pairs, key=lambda p: (total(p, "ratio"), [config_text(r.config) for r in p]))
        ratio, most = total(best, "ratio") / total(mine, "ratio"), total(best, "ratio_high") / total(mine, "ratio_low")
        why = f"measured at {told}: {ratio:.3f} of the default's time, at most {most:.3f}"
        config = {mode: dict(r.config) for mode, r in zip(MODES, best, strict=True)}
        return Tuned(tokens, config, "measured", why, ratio, None, total(best, "ratio"))

    def _pairs(self, timed: Mapping[str, list[Record]], sizes: Mapping[str, int]) -> Iterator[Pair]:
        """gate_up and down with one number of rows, as one map of tiles serves both."""
        fitting = {mode: [r for r in timed[mode] if self._fits(r.config, gemm_problem(sizes, mode))] for mode in MODES}
        for pair in itertools.product(fitting["gate_up"], fitting["down"]):
            if tile_rows(tile_of(pair[0].config)) == tile_rows(tile_of(pair[1].config)):
                yield pair

    def _fits(self, config: Mapping[str, Any], problem: GemmProblem) -> bool:
        try:
            return gemm_space.refusal(config, problem, self._arch) is None
        except ValueError:
            return False

    def _default(self, sizes: Mapping[str, int], mode: str, large: bool) -> dict[str, Any]:
        problem = gemm_problem(sizes, mode, "bfloat16" if large else "float32")
        return config_of(default_tile(problem, self._arch, large), problem)


def _mode(record: Record) -> str:
    return "gate_up" if "mode=gate_up" in record.key.shape else "down"


def _is_timed(record: Record) -> bool:
    return record.status == "ok" and record.median_us is not None

"""Bundles: candidates of the CUDA grouped GEMMs, compiled here, measured where the GPU is.

    write_bundle(BundleRequest(shapes, "sm_90a", (1, 16, 256)), Path("bundle"), default_cache_dir())
    python bundle/run.py                                # there: Python and the driver, nothing else
    moec tune import bundle/results.jsonl --db tuning.db

A bundle holds the cubins by content, manifest.json and the runner with the few files of moec that it needs. Building is
parallel and cached by content twice: the machine code by its source, and each candidate by all that it is made from.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moec.compiler.codegen import cuda
from moec.compiler.codegen.cubin import cubin_facts
from moec.compiler.codegen.cuda import CudaSource, build_cubins
from moec.compiler.codegen.cuda_archs import architecture
from moec.compiler.codegen.cuda_toolchain import cubin_compiler
from moec.compiler.kernels.cuda import combine, gemm_space, rows
from moec.compiler.kernels.cuda.combine import CombineProblem
from moec.compiler.kernels.cuda.gemm_problem import GemmProblem, Tile
from moec.compiler.kernels.cuda.gemm_wgmma import ROWS
from moec.compiler.kernels.cuda.kernel import CudaKernel
from moec.compiler.kernels.cuda.layer import LayerShape, default_tile
from moec.compiler.kernels.cuda.rows import RowsProblem
from moec.compiler.tune.bundle_files import write_folder
from moec.compiler.tune.cuda_keys import gemm_key, gemm_problem, toolchain
from moec.compiler.tune.errors import TuneError
from moec.compiler.tune.record import Config, canonical, config_hash
from moec.compiler.tune.routing import ASSUMED, Routing

MODES = ("gate_up", "down")
LARGE_ROWS = 32
"""Rows per expert from which the default is the tile for many tokens."""
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class BundleRequest:
    """What to build.

    shapes: layers in bfloat16 with a SiLU gate.  arch: "sm_90a", ..  tokens: for each a problem.
    routing: of the tokens.
    candidates: how many of each GEMM beside its defaults.  seed: of their choice.
    suggestions: configurations that are built whatever the choice.
    """

    shapes: tuple[LayerShape, ...]
    arch: str
    tokens: tuple[int, ...]
    routing: Routing = ASSUMED
    candidates: int = 56
    seed: int = 0
    suggestions: tuple[Config, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Gemm:
    """One GEMM of a layer and what may be tried for it."""

    shape: LayerShape
    problem: GemmProblem
    sizes: Mapping[str, int]
    defaults: Mapping[bool, Config]
    configs: tuple[Config, ...]


def write_bundle(
    request: BundleRequest, out: Path, cache_dir: Path, workers: int = 2, progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Builds a bundle in a new folder -> its manifest.

    Raises: TuneError: the folder exists, or a shape has weights that bundles do not do.  ToolchainError: no compiler.
    """
    if out.exists():
        raise TuneError(f"{out} exists; choose another folder for the bundle, or remove it")
    if not request.shapes or not request.tokens:
        raise TuneError("a bundle needs at least one shape and one number of tokens")
    gemms = [_gemm(request, shape, mode) for shape in request.shapes for mode in MODES]
    builder = _Builder(request.arch, cache_dir)
    wanted = [(gemm, config) for gemm in gemms for config in gemm.configs]
    with concurrent.futures.ThreadPoolExecutor(max_workers=workers) as pool:
        lowered = []
        for gemm, config in wanted:  # TVM in this thread, the compilers beside it
            lowered.append(builder.begin(gemm, config, pool))
            progress("lowered", len(lowered), len(wanted))
        built = []
        for pending in lowered:
            built.append(pending())
            progress("compiled", len(built), len(wanted))
    manifest = _manifest(request, gemms, dict(zip(map(_name, wanted), built, strict=True)))
    write_folder(out, manifest, builder.paths)
    return manifest


def _gemm(request: BundleRequest, shape: LayerShape, mode: str) -> _Gemm:
    if shape.dtype != "bfloat16" or shape.act != "silu":
        raise TuneError(
            f"{shape.name}: bundles do bfloat16 with a SiLU gate so far, not {shape.dtype} with {shape.act}"
        )
    sizes = {"E": shape.num_experts, "F": shape.inner, "H": shape.hidden, "K": shape.top_k, "S": shape.num_shared}
    arch, problem = architecture(request.arch), gemm_problem(sizes, mode)
    defaults = {}
    for large in (False, True):
        own = dataclasses.replace(problem, part_dtype="bfloat16" if large else "float32")
        defaults[large] = gemm_space.config_of(default_tile(own, arch, large), own)
    fitting = [c for c in gemm_space.configs(problem) if gemm_space.refusal(c, problem, arch) is None]
    given = [c for c in request.suggestions if c in fitting]
    chosen = _spread(fitting, request.candidates, random.Random(f"{request.seed} {shape.name} {mode}"))
    first = {config_hash(c): c for c in (*defaults.values(), *given, *chosen)}
    return _Gemm(shape, problem, sizes, defaults, tuple(first.values()))


def _spread(configs: Sequence[Config], count: int, rng: random.Random) -> list[Config]:
    """So many configurations, each kernel and number of rows in turn: every kind of tile is tried."""
    kinds: dict[tuple[Any, ...], list[Config]] = {}
    for config in configs:
        kinds.setdefault((config["kernel"], config.get("rows")), []).append(config)
    for group in kinds.values():
        rng.shuffle(group)
    chosen: list[Config] = []
    while len(chosen) < min(count, len(configs)):
        chosen += [group.pop() for group in kinds.values() if group]
    return chosen[:count]


def _name(wanted: tuple[_Gemm, Config]) -> str:
    gemm, config = wanted
    return f"{gemm.shape.name}-{gemm.problem.mode}-{config_hash(config)[:8]}"


class _Builder:
    """Compiles candidates. paths: the cubins by the name that the bundle gives them."""

    def __init__(self, arch: str, cache_dir: Path) -> None:
        self.arch, self.cache_dir = arch, cache_dir
        self.paths: dict[str, Path] = {}
        lowering = hashlib.sha256(Path(cuda.__file__).read_bytes()).hexdigest()  # decides what a launch says
        self._versions = canonical([gemm_space.kernel_sha256(), lowering, cubin_compiler().version, _tvm_version()])
        self._sources: dict[str, CudaSource] = {}

    def begin(
        self, gemm: _Gemm, config: Config, pool: concurrent.futures.Executor
    ) -> Callable[[], list[dict[str, Any]]]:
        """Starts building a candidate -> a function that waits for its kernels: file, sha256, launch, facts, binds."""
        steps = [
            (_memo_key(self._versions, kernel, what), kernel, binds)
            for kernel, what, binds in _steps(gemm, config, self.arch)
        ]
        pending = [pool.submit(self._build, key, self._source_of(key, kernel)) for key, kernel, _ in steps]
        binds = [b for _, _, b in steps]
        return lambda: [self._carry(p.result(), b) for p, b in zip(pending, binds, strict=True)]

    def _memo(self, key: str) -> Path:
        return self.cache_dir / key[:2] / f"{key}.candidate.json"

    def _source_of(self, key: str, kernel: CudaKernel) -> CudaSource | None:
        """The kernel's source; None where the cache has what would be made from it."""
        if self._memo(key).is_file() and Path(json.loads(self._memo(key).read_text())["path"]).is_file():
            return None
        if key not in self._sources:
            self._sources[key] = kernel.source()
        return self._sources[key]

    def _build(self, key: str, source: CudaSource | None) -> dict[str, Any]:
        memo = self._memo(key)
        if source is None:
            return dict(json.loads(memo.read_text()))
        (built,) = build_cubins([source], self.cache_dir, workers=1)
        facts, data = cubin_facts(built.path), built.path.read_bytes()
        told: dict[str, Any] = {
            "path": str(built.path),
            "sha256": hashlib.sha256(data).hexdigest(),
            "launch": source.launch(),
        }
        told |= {"registers": facts.registers, "stack_bytes": facts.stack_bytes}
        memo.parent.mkdir(parents=True, exist_ok=True)
        partial = memo.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(told))
        partial.replace(memo)
        return told

    def _carry(self, told: dict[str, Any], binds: Mapping[str, str]) -> dict[str, Any]:
        file = f"{told['sha256'][:32]}.cubin"
        self.paths[file] = Path(told["path"])
        return {**told, "file": file, "binds": dict(binds)}


def _steps(gemm: _Gemm, config: Config, arch: str) -> list[tuple[CudaKernel, Any, dict[str, str]]]:
    """The launches of a candidate: kernel, what it is made from, parameter -> buffer of the runner."""
    shape, problem, tile = gemm.shape, gemm_space.with_part(gemm.problem, config), gemm_space.tile_of(config)
    kernel = gemm_space.gemm_kernel(problem, tile, arch)
    order = {n: n for n in ("slot_order", "expert_start")}
    binds = {"x": "x", "w": "w", "y": "h" if problem.mode == "gate_up" else "part"} | order
    steps: list[tuple[CudaKernel, Any, dict[str, str]]] = [(kernel, [dataclasses.asdict(problem), config], binds)]
    if problem.mode == "down":
        splits = tile.splits if isinstance(tile, Tile) else 1
        sums = CombineProblem(
            shape.hidden, shape.num_experts, shape.top_k, shape.num_shared, splits, problem.part_dtype
        )
        made = CudaKernel("combine", arch, functools.partial(combine.build, sums))
        bound = {"part": "part", "weights": "weights", "experts": "experts", "y": "y"}
        steps.append((made, ["combine", dataclasses.asdict(sums)], bound))
    elif not isinstance(tile, Tile):
        gather = RowsProblem(shape.hidden, shape.slots_per_token)
        made = CudaKernel("gather", arch, functools.partial(rows.build, gather))
        binds["x"] = "x_sorted"
        bound = {"x": "x", "slot_order": "slot_order", "y": "x_sorted"}
        steps.insert(0, (made, ["gather", dataclasses.asdict(gather)], bound))
    return steps


def _memo_key(versions: str, kernel: CudaKernel, what: Any) -> str:
    return hashlib.sha256(canonical([versions, kernel.arch, kernel.name, what]).encode()).hexdigest()


def _tvm_version() -> str:
    import tvm

    return str(tvm.__version__)


def _manifest(request: BundleRequest, gemms: Sequence[_Gemm], built: Mapping[str, Any]) -> dict[str, Any]:
    candidates: dict[str, Any] = {}
    files: dict[str, Any] = {}
    problems: list[Any] = []
    rejected: list[Any] = []
    tools = toolchain(cubin_compiler())
    for gemm in gemms:
        names = []
        for config in gemm.configs:
            name = _name((gemm, config))
            kernels = built[name]
            if reason := _spills(kernels):
                rejected.append({"candidate": name, "config": config, "reason": reason})
                continue
            files |= {k["file"]: {n: k[n] for n in ("sha256", "launch", "registers")} for k in kernels}
            tile = gemm_space.tile_of(config)
            steps = [{"file": k["file"], "binds": k["binds"]} for k in kernels]
            tile_rows = tile.rows if isinstance(tile, Tile) else ROWS
            candidates[name] = {"config": config, "tile_rows": tile_rows, "kernels": steps}
            names.append(name)
        problems += [_problem(request, gemm, tokens, names, tools) for tokens in request.tokens]
    plain = {"format": "moec-bundle", "version": 1, "arch": request.arch, "compiler": tools, "files": files}
    return plain | {"candidates": candidates, "problems": problems, "rejected": rejected}


def _spills(kernels: Sequence[Mapping[str, Any]]) -> str:
    most = max(int(k["stack_bytes"]) for k in kernels)
    return f"{most} bytes of each thread's registers lie in local memory" if most else ""


def _problem(request: BundleRequest, gemm: _Gemm, tokens: int, names: Sequence[str], tools: str) -> dict[str, Any]:
    key = dataclasses.asdict(gemm_key(gemm.problem, gemm.sizes, tokens, request.routing.name, "-", tools))
    del key["device"]  # the runner knows it
    large = tokens * (gemm.sizes["K"]) / gemm.sizes["E"] >= LARGE_ROWS
    default = _name((gemm, gemm.defaults[large]))
    if default not in names:
        raise TuneError(f"{gemm.shape.name} {gemm.problem.mode}: the default itself spills registers; report it")
    told = {"key": key, "sizes": dict(gemm.sizes), "mode": gemm.problem.mode, "tokens": tokens, "default": default}
    ordered = [default, *(n for n in names if n != default)]
    return told | {"log_use": request.routing.mean_log_use(gemm.sizes["E"]), "candidates": ordered}

"""vLLM's tuned configurations of its fused MoE kernel, to and from configurations of our CUDA grouped GEMM.

A file is called E=8,N=14336,device_name=NVIDIA_H100_80GB_HBM3[,dtype=..][,block_shape=..].json and maps tokens to
BLOCK_SIZE_M, BLOCK_SIZE_N, BLOCK_SIZE_K, GROUP_SIZE_M, num_warps and num_stages of a Triton kernel; N is the inner
width. What corresponds: M and N blocks are our rows and columns (gate and up rows together), warps and stages are ours.
What does not is refused with the reason: another depth of a step, an order of blocks, other weights than bfloat16.
An imported configuration is a suggestion without a time: their kernel is not ours, so ours has to be measured.
Source: vllm/model_executor/layers/fused_moe/configs/README and benchmarks/kernels/benchmark_moe.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moec.compiler.codegen.cuda_archs import architecture
from moec.compiler.codegen.cuda_toolchain import cubin_compiler
from moec.compiler.codegen.llvm import ToolchainError
from moec.compiler.kernels.cuda import gemm_space
from moec.compiler.kernels.cuda.gemm_problem import GemmProblem
from moec.compiler.tune.cuda_keys import OP, arch_of_device, gemm_key, gemm_problem, toolchain
from moec.compiler.tune.errors import ResultsError
from moec.compiler.tune.exchange import parse_json
from moec.compiler.tune.record import Config, Record, canonical, shape_sizes

_NAME = re.compile(
    r"E=(?P<E>\d+),N=(?P<N>\d+),device_name=(?P<device>[^,]+)(?:,dtype=(?P<dtype>\w+))?(?:,block_shape=(?P<block>.+))?\.json"
)
_FIELDS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
_ROUTING = "unknown"  # vLLM's tuner draws random logits; its files do not say
_MODE = "gate_up"  # vLLM has one configuration for both GEMMs; gate_up is two thirds of the work


def is_table(path: Path) -> bool:
    """Whether a file is named as vLLM names its tables."""
    return _NAME.fullmatch(path.name) is not None


def read_table(path: Path, shape: str | None) -> list[Record]:
    """The suggestions in a table.

    shape: "H=4096,K=2", what the file does not say.
    Raises: ResultsError: it is damaged, or a field of it has no counterpart.
    """
    named = _NAME.fullmatch(path.name)
    if named is None:
        raise ResultsError(f"{path.name}: expected a name such as E=8,N=14336,device_name=NVIDIA_H200.json")
    sizes = shape_sizes(shape or "")
    if not all(type(sizes.get(name)) is int and int(sizes[name]) > 0 for name in "HK"):
        raise ResultsError(f"{path}: does not say the hidden size and top-k; give --shape H=4096,K=2")
    if named["dtype"] or named["block"]:
        raise ResultsError(f"{path}: for {named['dtype']} weights; our CUDA GEMMs with a counterpart are of bfloat16")
    device = named["device"].replace("_", " ")
    arch = arch_of_device(device)
    if arch is None:
        raise ResultsError(f"{path}: {device} is no device that moec has kernels for (sm_80 to sm_120a)")
    try:
        rows = parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror})") from error
    if not isinstance(rows, dict):
        raise ResultsError(f"{path}: expected an object with a configuration for each number of tokens")
    shapes = {"E": int(named["E"]), "F": int(named["N"]), "H": sizes["H"], "K": sizes["K"], "S": 0}
    problem = gemm_problem(shapes, _MODE)
    made = []
    for tokens, fields in rows.items():
        if tokens.isdigit():  # "triton_version" and whatever else it may say
            where = f"{path}: {tokens} tokens"
            config = _config(fields, problem, arch, where)
            key = gemm_key(problem, shapes, int(tokens), _ROUTING, device, _toolchain())
            made.append(Record(key, config, "ok", reason=f"suggested by vLLM's {path.name}"))
    return made


def _toolchain() -> str:
    """What the tuner's keys on this machine say; "unknown" where no CUDA compiler is."""
    try:
        return toolchain(cubin_compiler())
    except ToolchainError:
        return "unknown"


def _config(fields: Any, problem: GemmProblem, arch: str, where: str) -> Config:
    """Our configuration for one of vLLM's. Raises: ResultsError: there is none."""
    if not isinstance(fields, dict) or any(type(fields.get(name)) is not int for name in _FIELDS):
        raise ResultsError(f"{where}: expected whole numbers for {', '.join(_FIELDS)}")
    if fields["BLOCK_SIZE_K"] != problem.block_depth:
        raise ResultsError(
            f"{where}: BLOCK_SIZE_K is {fields['BLOCK_SIZE_K']}, a step of our kernel is {problem.block_depth} deep"
        )
    if fields["GROUP_SIZE_M"] != 1 or fields.get("SPLIT_K", 1) != 1:
        raise ResultsError(f"{where}: GROUP_SIZE_M and SPLIT_K other than 1 have no counterpart in our kernel")
    reasons = []
    for warps_m, warps_n in _layouts(fields["num_warps"]):
        config: Config = {
            "kernel": "gemm_mma", "rows": fields["BLOCK_SIZE_M"], "columns": fields["BLOCK_SIZE_N"],
            "stages": fields["num_stages"], "warps_m": warps_m, "warps_n": warps_n, "splits": 1,
        }  # fmt: skip
        reason = gemm_space.refusal(config, problem, architecture(arch))
        if reason is None:
            return config
        reasons.append(reason)
    raise ResultsError(f"{where}: {reasons[0] if reasons else 'num_warps is no power of 2'}")


def _layouts(num_warps: int) -> Iterator[tuple[int, int]]:
    """Warps over rows and columns, the most over columns first: Triton does not say how it spreads them."""
    warps_m = 1
    while warps_m <= num_warps:
        if num_warps % warps_m == 0:
            yield warps_m, num_warps // warps_m
        warps_m *= 2


@dataclasses.dataclass(frozen=True)
class Exported:
    """files: written.  left_out: what has no counterpart, in words."""

    files: tuple[Path, ...]
    left_out: tuple[str, ...]


def export_tables(records: Iterable[Record], folder: Path) -> Exported:
    """Writes one table for each device and pair of E and N from the winners among records.

    Raises: ResultsError: there is no winner that vLLM's kernel has fields for, or the folder cannot be written.
    """
    tables: dict[str, dict[str, dict[str, int]]] = {}
    left_out = []
    for record in records:
        if record.is_winner:
            reason = _no_counterpart(record)
            if reason:
                left_out.append(f"{record.key.op} {record.key.shape}, {record.key.tokens} tokens: {reason}")
                continue
            sizes = shape_sizes(record.key.shape)
            device = record.key.device.replace(" ", "_")
            name = f"E={sizes['E']},N={sizes['F']},device_name={device}.json"
            tables.setdefault(name, {})[str(record.key.tokens)] = _fields(record.config)
    if not tables:
        told = f": {left_out[0]}" if left_out else ""
        raise ResultsError(f"no winner of a CUDA grouped GEMM to export{told}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            rows = dict(sorted(table.items(), key=lambda row: int(row[0])))
            text = ",\n".join(f'    "{tokens}": {canonical(fields)}' for tokens, fields in rows.items())
            (folder / name).write_text("{\n" + text + "\n}\n", encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"{folder}: cannot be written ({error.strerror})") from error
    return Exported(tuple(folder / name for name in sorted(tables)), tuple(left_out))


def _no_counterpart(record: Record) -> str:
    """Why a winner cannot be said in vLLM's fields, or ""."""
    sizes = shape_sizes(record.key.shape)
    if record.key.op != OP:
        return "no CUDA grouped GEMM"
    if sizes.get("mode") != _MODE:
        return "vLLM has one configuration for both GEMMs, taken from gate_up"
    if record.config.get("kernel") != "gemm_mma":
        return f"{record.config.get('kernel')} has no counterpart in vLLM's kernel"
    if record.key.weight_format != "bfloat16" or sizes.get("S"):
        return "only bfloat16 without shared experts"
    return ""


def _fields(config: Config) -> dict[str, int]:
    block = GemmProblem(_MODE, 64, 64, 1, 1).block_depth
    made = {"BLOCK_SIZE_M": config["rows"], "BLOCK_SIZE_N": config["columns"], "BLOCK_SIZE_K": block, "GROUP_SIZE_M": 1}
    made |= {"num_warps": int(config["warps_m"]) * int(config["warps_n"]), "num_stages": config["stages"]}
    return {name: int(value) for name, value in made.items()}

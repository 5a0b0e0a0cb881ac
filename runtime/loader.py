"""Loads an engine directory: everything is checked before anything is mapped or opened.

Order: manifest (version, own digest) - target features - sizes and digests of all files - program - weights (mapped,
not read) - kernels (opened).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moec.runtime.errors import FormatError, TargetError
from moec.runtime.executor import Executor
from moec.runtime.format import FORMAT_VERSION, MANIFEST, PROGRAM, check_files, read_json, weights_name
from moec.runtime.launch.cpu_features import LEVELS, missing_features
from moec.runtime.options import LoadOptions
from moec.runtime.pages import empty_huge, forget_pages
from moec.runtime.program import Program, Step

DIGEST = "manifest_sha256"
HUGE_WEIGHT_BYTES = 8 << 20  # weights of less gain nothing from huge pages


def manifest_text(content: dict[str, Any]) -> str:
    """The manifest's bytes: canonical JSON that ends with the digest of the rest."""
    plain = {k: v for k, v in content.items() if k != DIGEST}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    return json.dumps({**plain, DIGEST: digest}, indent=1, sort_keys=True) + "\n"


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, its own digest and version checked. Raises: FormatError."""
    if not directory.is_dir():
        raise FormatError(f"{directory}: no such engine directory; make one with `moec compile MODEL -o {directory}`")
    path = directory / MANIFEST
    content = read_json(path)
    if not isinstance(content, dict) or "format_version" not in content:
        raise FormatError(f"{path}: not the manifest of an engine; compile the engine again")
    version = content["format_version"]
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{path}: format version {version}, this moec reads {FORMAT_VERSION}; compile the engine again or use the "
            f"moec that made it ({content.get('moec_version', 'unknown')})"
        )
    if path.read_text(encoding="utf-8") != manifest_text(content):
        raise FormatError(
            f"{path}: its digest does not fit its content; the file was changed, compile the engine again"
        )
    return content


def check_target(manifest: dict[str, Any]) -> None:
    """Raises TargetError naming the features that the engine needs and this machine lacks; what a GPU must be like is
    checked where it is opened (launch/cuda_device.py).
    """
    target = manifest["target"]
    if target["kind"] == "cuda":
        return
    if target["kind"] != "cpu":
        raise TargetError(
            f"the engine is for {target['kind']}, this moec runs engines for cpu and cuda; compile with --target cpu"
        )
    level = target.get("level")
    if level is None:
        return
    if level not in LEVELS:
        raise TargetError(
            f"the engine is for the CPU level {level!r}, this moec knows {', '.join(LEVELS)}; update moec"
        )
    lacking = missing_features(level)
    if lacking:
        raise TargetError(
            f"the engine is for CPUs with {level}, this one lacks {', '.join(lacking)}; compile it again here"
        )


def map_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, views of the mapped file. Raises: FormatError: not a safetensors file."""
    try:
        with safe_open(path, framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys() if not name.startswith(".")}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: cannot be mapped ({error}); compile the engine again") from error


def kernels_of(
    library: Any | None, manifest: dict[str, Any]
) -> tuple[Mapping[str, Callable[..., Any]], Callable[[Tensor], Any]]:
    """symbol -> function of the open kernel library, and what makes their arguments; none without a library."""
    if library is None:
        return {}, lambda tensor: tensor
    import tvm_ffi

    symbols = manifest["target"].get("symbols", [])
    return {symbol: library[symbol] for symbol in symbols}, tvm_ffi.from_dlpack


def open_library(directory: Path, manifest: dict[str, Any]) -> Any | None:
    """The engine's kernel library, None where it has none."""
    name = manifest["target"].get("library")
    if name is None:
        return None
    from moec.runtime.launch.cpu import load_library

    return load_library(directory / name, manifest["target"]["level"])


def to_huge_pages(weights: dict[str, Tensor], available_bytes: int) -> dict[str, Tensor]:
    """The weights, those of HUGE_WEIGHT_BYTES and more copied from the file to huge pages as long as memory allows.

    weights: views of a mapped file.  available_bytes: of memory; half of it is left alone, because the file wants to
    stay in the cache while it is read. Weights that do not fit stay where they are.
    """
    left, moved = available_bytes // 2, dict(weights)
    for name, tensor in weights.items():
        size = tensor.numel() * tensor.element_size()
        if HUGE_WEIGHT_BYTES <= size <= left and tensor.is_contiguous():
            block = empty_huge(size)
            moved[name] = block.view(tensor.dtype).view(tensor.shape).copy_(tensor)
            forget_pages(tensor.data_ptr(), size)
            left -= size
    return moved


def available_memory_bytes() -> int:
    """Memory that can be had without swapping; 0 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), "0")
    return int(found) * 1024


def weights_file(manifest: dict[str, Any], rank: int) -> str:
    """The file that holds a rank's weights: replicas share them."""
    if "placement" not in manifest:
        return weights_name(rank)
    return str(manifest["placement"]["ranks"][rank]["weights"])


def check_engine(directory: Path, manifest: dict[str, Any], options: LoadOptions) -> None:
    """Target, sizes and digests; of weights only the rank's own, other ranks check theirs.

    Raises: TargetError, FormatError.
    """
    check_target(manifest)
    own = weights_file(manifest, options.rank)
    others = {weights_file(manifest, rank) for rank in range(manifest["ranks"])} - {own}
    check_files(directory, {k: v for k, v in manifest["files"].items() if k not in others}, options.check_digests)


def open_engine(
    directory: Path,
    manifest: dict[str, Any],
    options: LoadOptions,
    collective: Callable[[Step], Callable[..., Any]] | None = None,
) -> Executor:
    """The ready program of one rank of an engine that check_engine accepts. collective: as for Executor.

    Raises: FormatError: the program or the weights are not what this runtime reads.
    """
    program = Program.from_json(read_json(directory / PROGRAM)["ranks"][options.rank])
    weights = map_weights(directory / weights_file(manifest, options.rank))
    library = open_library(directory, manifest)
    if library is not None and options.huge_pages:
        weights = to_huge_pages(weights, available_memory_bytes() // options.processes)
    return Executor(program, weights, *kernels_of(library, manifest), collective=collective)

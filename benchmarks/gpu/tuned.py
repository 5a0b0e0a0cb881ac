"""Layers with the tiles that a tuning bundle's runner found best on this device, as entries for run.py.

The bundle of candidates has the GEMMs with what they need before and after (gather, combine), the benchmark's bundle
the gate, and the dispatch kernels for every number of rows of a tile: no compiler is needed where the GPU is.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from measure import FEW, MANY

RANGES = {"small": (1, FEW), "large": (MANY, math.inf)}
Candidate = Mapping[str, Any]


class TunedError(ValueError):
    """The tuning bundle or its results cannot be read."""


def tuned_entries(layers: list[dict[str, Any]], dispatch: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """For each layer that the bundle in folder has results of, the same with its best tiles and "tuned": why.

    layers: run.py's.  dispatch: shape -> rows of a tile -> kernels, as make_bundle.py writes them.
    Raises: TunedError: no results, or none of these layers.
    """
    manifest, times = _read(folder)
    made = []
    for entry in layers:
        name = entry["shape"]["name"]
        if entry["size"] in RANGES and name in dispatch and (found := _best(manifest, times, entry, dispatch[name])):
            made.append(_entry(entry, found, dispatch[name], manifest, folder))
    if not made:
        raise TunedError(f"{folder}: no results of the layers of this bundle; run its run.py first")
    return made


def _read(folder: Path) -> tuple[dict[str, Any], dict[tuple[int, str], float]]:
    """The manifest, and the median time in microseconds of each candidate that was right: by problem and name."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise TunedError(f"{folder}: no tuning bundle with results ({error})") from error
    records = [(line["problem"], line["candidate"], line["record"]) for line in lines if "record" in line]
    return manifest, {(p, name): r["median_us"] for p, name, r in records if r["status"] == "ok"}


def _best(
    manifest: Mapping[str, Any],
    times: Mapping[tuple[int, str], float],
    entry: Mapping[str, Any],
    rows: Mapping[str, Any],
) -> tuple[str, str, float] | None:
    """gate_up, down and the geometric mean of their time in us over the token counts of the layer's range.

    Both have tiles of one number of rows, which the map of tiles is made for.
    """
    shape, (few, many) = entry["shape"], RANGES[entry["size"]]
    sizes = {"E": shape["num_experts"], "F": shape["inner"], "H": shape["hidden"], "K": shape["top_k"]}
    sizes["S"] = shape["num_shared"]
    of_mode: dict[str, dict[str, list[float]]] = {"gate_up": {}, "down": {}}
    for number, problem in enumerate(manifest["problems"]):
        if problem["sizes"] == sizes and few <= problem["tokens"] <= many:
            for name in problem["candidates"]:
                time = times.get((number, name), math.inf)
                of_mode[problem["mode"]].setdefault(name, []).append(time)
    candidates = manifest["candidates"]
    pairs = [
        (up, down, math.exp(sum(map(math.log, map(sum, zip(a, b, strict=True)))) / len(a)))
        for (up, a), (down, b) in itertools.product(of_mode["gate_up"].items(), of_mode["down"].items())
        if candidates[up]["tile_rows"] == candidates[down]["tile_rows"] and str(candidates[up]["tile_rows"]) in rows
    ]
    best = min(pairs, key=lambda pair: pair[2], default=None)
    return best if best is not None and math.isfinite(best[2]) else None


def _entry(
    entry: Mapping[str, Any],
    found: tuple[str, str, float],
    rows: Mapping[str, Any],
    manifest: Mapping[str, Any],
    folder: Path,
) -> dict[str, Any]:
    up, down = (manifest["candidates"][name] for name in found[:2])
    tile_rows, config = up["tile_rows"], down["config"]
    kernels = {"gate": entry["kernels"]["gate"]} | rows[str(tile_rows)]
    kernels |= dict(_kernels(up, "gate_up", manifest, folder)) | dict(_kernels(down, "down", manifest, folder))
    made = {"tile_rows": tile_rows, "splits": config.get("splits", 1), "part_dtype": config["part_dtype"]}
    told = {"gate_up": up["config"], "down": config, "tuner_us": found[2]}
    return {**entry, **made, "gathers": "gather" in kernels, "kernels": kernels, "tuned": told}


def _kernels(candidate: Candidate, mode: str, manifest: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, Any]]:
    """A candidate's launches by the names that layer.py gives them."""
    for kernel in candidate["kernels"]:
        made = {"file": str(folder / kernel["file"]), "launch": manifest["files"][kernel["file"]]["launch"]}
        yield mode if "w" in kernel["binds"] else "gather" if mode == "gate_up" else "combine", made

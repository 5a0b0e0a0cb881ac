"""The process that touches the GPU: measures candidates of one problem and tells the parent before and after each."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from moec.compiler.tune.runner.device import CudaError, Device
from moec.compiler.tune.runner.task import Task


def tell(value: dict[str, Any]) -> None:
    """One line to the parent."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def measure_candidates(folder: Path, problem: int, names: list[str]) -> int:
    """names: of candidates, in order. Exit code 0: all were told of; anything else: the last one begun is to blame."""
    manifest = json.loads((folder / "manifest.json").read_text())
    entry, candidates = manifest["problems"][problem], manifest["candidates"]
    try:
        device = Device(manifest["arch"])
        tell({"device": device.facts()})
        task = Task(device, folder, manifest["files"], entry)
        incumbent = task.load(candidates[entry["default"]])
        if wrong := task.check(incumbent):
            incumbent_fault = f"the default itself is wrong: {wrong}"
            tell({"broken": incumbent_fault})
            return 0
    except CudaError as error:
        tell({"broken": str(error)})
        return 0
    for name in names:
        tell({"begin": name})
        try:
            run = incumbent if name == entry["default"] else task.load(candidates[name])
            wrong = task.check(run)
            if wrong:
                tell({"end": name, "status": "wrong", "reason": wrong})
                continue
            times = task.measure(run, None if name == entry["default"] else incumbent)
        except CudaError as error:  # the context may be lost: the parent starts a fresh process
            tell({"end": name, "status": "crashed", "reason": str(error)})
            return 1
        tell({"end": name, "status": "ok", "reason": "", **times})
    return 0

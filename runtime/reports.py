"""What can be said of an engine directory without running it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moec.runtime.format import EVIDENCE, LEDGER, TUNING, check_files, read_json
from moec.runtime.loader import check_target, read_manifest


def verify_engine(directory: Path) -> dict[str, Any]:
    """Compares all digests and sums up the evidence -> {"files", "evidence", "not_evaluated", "failed", "passed"}.

    Raises: FormatError: a file was changed since the engine was made.  TargetError: it is for another machine.
    """
    manifest = read_manifest(directory)
    check_target(manifest)
    check_files(directory, manifest["files"])
    evidence = read_json(directory / EVIDENCE)
    evaluated = [e for e in evidence if e["max_rel_err"] is not None]
    failed = [e for e in evaluated if not e["max_rel_err"] <= e["tolerance"]]
    return {
        "files": len(manifest["files"]),
        "evidence": len(evidence),
        "not_evaluated": len(evidence) - len(evaluated),
        "failed": failed,
        "passed": not failed,
    }


def inspect_engine(directory: Path) -> dict[str, Any]:
    """What the engine is, what each pass matched and refused, the evidence, and the kernels chosen and why.

    Raises: FormatError: a file is missing or damaged.
    """
    manifest = read_manifest(directory)
    return {
        **manifest["model"],
        "target": manifest["target"],
        "weights": manifest["weights"],
        "ranks": manifest["ranks"],
        **({"placement": manifest["placement"]} if "placement" in manifest else {}),
        "ledger": read_json(directory / LEDGER),
        "evidence": read_json(directory / EVIDENCE),
        "kernels": read_json(directory / TUNING)["kernels"],
    }

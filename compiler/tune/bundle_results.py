"""Takes the results that a bundle's runner wrote on another machine: digests first, then records."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from moec.compiler.tune.compare import Merged, by_key, merge
from moec.compiler.tune.database import Database
from moec.compiler.tune.errors import ResultsError
from moec.compiler.tune.exchange import check_header, parse_json, read_lines
from moec.compiler.tune.record import Record, canonical, config_text, record_from_json
from moec.compiler.tune.runner.main import FORMAT, VERSION


def import_results(database: Database, path: Path) -> Merged:
    """Adds a results file to a database: `moec tune .. --import F`. Raises: ResultsError, DatabaseError."""
    return merge(database, read_results(path))


def read_any(path: Path) -> list[Record]:
    """The records of a file of `moec tune export`, or of a bundle's results. Raises: ResultsError."""
    try:
        with path.open("rb") as file:
            first = file.readline(1 << 20)
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror})") from error
    is_results = f'"{FORMAT}"'.encode() in first
    return read_results(path) if is_results else read_lines(path)


def read_results(path: Path) -> list[Record]:
    """The records of a bundle's run; the winner of each key is marked.

    Raises: ResultsError: a line was changed or cut, or the bundle beside the file is another one.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror})") from error
    header = parse_json(lines[0], f"{path}, line 1") if lines else None
    if not isinstance(header, dict):
        raise ResultsError(f"{path}: expected results of a bundle's run.py, the file is empty or another")
    check_header(header, FORMAT, VERSION, f"{path}, line 1")
    manifest = path.parent / "manifest.json"
    if manifest.is_file() and hashlib.sha256(manifest.read_bytes()).hexdigest() != header.get("manifest_sha256"):
        raise ResultsError(f"{path}: made with another bundle than the one in {path.parent}; run its run.py again")
    records = [
        _record(parse_json(line, f"{path}, line {n}"), f"{path}, line {n}") for n, line in enumerate(lines[1:], 2)
    ]
    return [r for group in by_key(records).values() for r in _with_winner(group)]


def _record(line: Any, where: str) -> Record:
    if not isinstance(line, dict) or not isinstance(line.get("record"), dict):
        raise ResultsError(f"{where}: expected a record with its sha256")
    try:
        found = hashlib.sha256(canonical(line["record"]).encode()).hexdigest()
    except ValueError:
        found = ""
    if found != line.get("sha256"):
        raise ResultsError(f"{where}: its digest does not fit; the file was changed or damaged, copy it again")
    return record_from_json(line["record"], where)


def _with_winner(records: list[Record]) -> list[Record]:
    """The records of a key, the winner marked: of those that their bound says are faster than the default the fastest;
    among those that its own bound does not tell from it the first by its text."""
    surer = [r for r in records if r.ratio and r.is_faster]
    if not surer:
        return records
    fastest = min(surer, key=lambda r: (r.ratio or 1.0, config_text(r.config)))
    limit = fastest.ratio_high or 1.0
    winner = min((r for r in surer if (r.ratio or 1.0) <= limit), key=lambda r: config_text(r.config))
    return [dataclasses.replace(r, is_winner=r is winner) for r in records]

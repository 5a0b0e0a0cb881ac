"""Tuning results as JSON lines that people share: one record a line, the same results in the same bytes.

The first line names the format; files can be joined end to end. Records of a key stand in the order of measuring, keys
in alphabetical order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moec.compiler.tune.errors import ResultsError
from moec.compiler.tune.record import Record, canonical, record_from_json, record_to_json

FORMAT, VERSION = "moec-tuning", 1
HEADER = {"format": FORMAT, "version": VERSION}
MAX_LINE_BYTES = 1 << 20


def to_lines(records: Iterable[Record]) -> str:
    """The file's text."""
    ordered = sorted(records, key=lambda r: r.key)  # stable: the order of measuring stays
    return "".join(canonical(line) + "\n" for line in (HEADER, *map(record_to_json, ordered)))


def read_lines(path: Path) -> list[Record]:
    """Raises: ResultsError: absent, of another format or a newer version, or a line that is no record."""
    try:
        with path.open("rb") as file:
            lines = enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1)
            return [
                r for number, line in lines if (r := _read_line(line, f"{path}, line {number}", number)) is not None
            ]
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror})") from error


def write_lines(records: Iterable[Record], path: Path) -> None:
    """Raises: ResultsError: the file cannot be written."""
    try:
        path.write_text(to_lines(records), encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"{path}: cannot be written ({error.strerror})") from error


def _read_line(line: bytes, where: str, number: int) -> Record | None:
    """A record, None for a header or an empty line."""
    if not line.strip():
        return None
    data = parse_json(line, where)
    if isinstance(data, dict) and "format" in data:
        check_header(data, FORMAT, VERSION, where)
        return None
    if number == 1:
        raise ResultsError(f'{where}: expected {{"format":"{FORMAT}"}}; make such a file with `moec tune export`')
    return record_from_json(data, where)


def parse_json(text: bytes | str, where: str) -> Any:
    """Raises: ResultsError: it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{where}: is not JSON ({str(error)[:80]})") from error


def check_header(data: dict[str, Any], expected: str, newest: int, where: str) -> None:
    """Raises: ResultsError: another format, or a newer version of it."""
    if data.get("format") != expected:
        raise ResultsError(f"{where}: format {data.get('format')!r}, expected {expected!r}")
    if type(data.get("version")) is not int or data["version"] > newest:
        raise ResultsError(f"{where}: version {data.get('version')}, this moec reads up to {newest}; update moec")

"""What a tuning run finds out: one Record per measured candidate of one problem (Key), and their canonical text.

A problem's shape and a candidate's configuration have one spelling each, so that equal ones compare, hash and sort as
equal wherever they were made: names in alphabetical order, no spaces.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from moec.compiler.tune.errors import ResultsError

Value = int | str | bool
Config = dict[str, Value]
Status = Literal["ok", "wrong", "crashed", "timeout", "memory", "rejected"]
STATUSES: tuple[str, ...] = get_args(Status)
"""ok: right and timed; without a time it is a suggestion that nobody has measured here. wrong: its results differ from
the reference. crashed, timeout, memory: how its process ended. rejected: never run, a rule refused it."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclasses.dataclass(frozen=True, order=True)
class Key:
    """A problem that is tuned on its own.

    kernel_sha256: of the kernel's source.  op: as in the IR.  shape: shape_text() of its sizes.  tokens: the bucket.
    weight_format: "bf16", "int4-g64", ..  routing: "uniform", "zipf-1.0", "trace-<first 8 digits of its sha256>".
    device: of the processor or GPU.  toolchain: compiler and version.
    """

    kernel_sha256: str
    op: str
    shape: str
    tokens: int
    weight_format: str
    routing: str
    device: str
    toolchain: str


@dataclasses.dataclass(frozen=True)
class Record:
    """One candidate on one problem.

    config: the candidate; its values are whole numbers, words or truth values.  reason: why it is not ok, or "".
    median_us: of its own times.  ratio: its time over the incumbent's, the median of paired ratios, with a 95% bound
    ratio_low..ratio_high; below 1 is faster.  samples: how many pairs.  created: seconds since 1970, for people only:
    order is the database's.  is_default: the configuration that is used without tuning.
    """

    key: Key
    config: Config
    status: Status
    reason: str = ""
    median_us: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    samples: int = 0
    seed: int = 0
    worker: str = ""
    created: float = 0.0
    is_default: bool = False
    is_winner: bool = False

    @property
    def is_measured(self) -> bool:
        """Whether anything was found out: not so for a suggestion, which no claim is refused for."""
        return self.status != "ok" or self.median_us is not None

    @property
    def is_faster(self) -> bool:
        """Whether it works and the bound says that it takes less time than the incumbent."""
        return self.status == "ok" and self.ratio_high is not None and self.ratio_high < 1.0

    def digest(self) -> str:
        """sha256 of everything but is_winner: the identity of a measurement."""
        fields = record_to_json(self)
        del fields["is_winner"]
        return hashlib.sha256(canonical(fields).encode()).hexdigest()


def canonical(value: Any) -> str:
    """JSON text with sorted names and no spaces. Raises: ValueError: NaN or infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def shape_text(sizes: Mapping[str, Value]) -> str:
    """{"H": 64, "E": 8} -> "E=8,H=64". Raises: ValueError: a name or value that could not be read back."""
    for name, value in sizes.items():
        if not _NAME.fullmatch(name) or set(str(value)) & set(",= \n") or str(value) == "":
            raise ValueError(f"shape: {name}={value!r} cannot be written as name=value")
    return ",".join(f"{name}={_plain(sizes[name])}" for name in sorted(sizes))


def shape_sizes(text: str) -> dict[str, int | str]:
    """The sizes of a shape_text; numbers as int, all else as text; parts that are no name=value are left out."""
    parts = (part.partition("=") for part in text.split(","))
    return {name: int(value) if re.fullmatch(r"-?\d+", value) else value for name, sign, value in parts if sign}


def _plain(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def config_text(config: Mapping[str, Value]) -> str:
    """The canonical JSON of a configuration."""
    return canonical(dict(config))


def config_hash(config: Mapping[str, Value]) -> str:
    """sha256 of config_text, 16 digits: what a claim names."""
    return hashlib.sha256(config_text(config).encode()).hexdigest()[:16]


def record_to_json(record: Record) -> dict[str, Any]:
    """The record as JSON values; record_from_json reads it back."""
    return dataclasses.asdict(record)


def record_from_json(data: Any, where: str) -> Record:
    """Reads a record that someone else wrote.

    Raises: ResultsError: a field is missing, unknown, or of another type than Record says.
    """
    fields = _object(data, Record, where)
    key = _object(fields["key"], Key, f"{where}: key")
    for name, value in key.items():
        wanted: type = int if name == "tokens" else str
        _need(type(value) is wanted and value not in ("", -1), f"{where}: key.{name}", wanted.__name__, value)
    _need(key["tokens"] >= 0, f"{where}: key.tokens", "a whole number of at least 0", key["tokens"])
    config = fields["config"]
    _need(isinstance(config, dict) and bool(config), f"{where}: config", "an object of values", config)
    for name, value in config.items():
        _need(type(value) in (int, str, bool), f"{where}: config.{name}", "a whole number, text, true or false", value)
    _need(fields["status"] in STATUSES, f"{where}: status", f"one of {', '.join(STATUSES)}", fields["status"])
    for name in ("reason", "worker"):
        _need(type(fields[name]) is str, f"{where}: {name}", "text", fields[name])
    for name in ("samples", "seed"):
        _need(type(fields[name]) is int and abs(fields[name]) < 2**63, f"{where}: {name}", "a number", fields[name])
    for name in ("is_default", "is_winner"):
        _need(type(fields[name]) is bool, f"{where}: {name}", "true or false", fields[name])
    for name in ("median_us", "ratio", "ratio_low", "ratio_high"):
        fields[name] = _positive(fields[name], f"{where}: {name}")
    fields["created"] = _positive(fields["created"] or None, f"{where}: created") or 0.0
    return Record(**{**fields, "key": Key(**key), "config": dict(sorted(config.items()))})


def _object(data: Any, kind: type, where: str) -> dict[str, Any]:
    """A copy of an object that has exactly the fields of a dataclass; those with a default may be missing."""
    if not isinstance(data, dict):
        raise ResultsError(f"{where}: expected an object, got {type(data).__name__}")
    known = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(data.keys() - known.keys()):
        raise ResultsError(f"{where}: unknown field {unknown[0]!r}; expected {', '.join(known)}")
    missing = [n for n, f in known.items() if n not in data and f.default is dataclasses.MISSING]
    if missing:
        raise ResultsError(f"{where}: the field {missing[0]!r} is missing")
    return {name: data.get(name, f.default) for name, f in known.items()}


def _positive(value: Any, where: str) -> float | None:
    if value is None:
        return None
    good = type(value) in (int, float) and math.isfinite(value) and value > 0
    _need(good, where, "a number above 0", value)
    return float(value)


def _need(good: bool, where: str, expected: str, got: Any) -> None:
    if not good:
        raise ResultsError(f"{where}: expected {expected}, got {str(got)[:60]!r}")

"""The tables of a tuning database, and the way of a record into a row and back."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import time
from pathlib import Path
from typing import Any

from moec.compiler.tune.errors import DatabaseError
from moec.compiler.tune.record import Key, Record, config_text

SCHEMA_VERSION = 1
APPLICATION_ID = 0x4D4F4543  # "MOEC": which program a sqlite file belongs to
_RETRY_S = 0.02

_TABLES = (
    """CREATE TABLE problems (
        id INTEGER PRIMARY KEY, kernel_sha256 TEXT NOT NULL, op TEXT NOT NULL, shape TEXT NOT NULL,
        tokens INTEGER NOT NULL, weight_format TEXT NOT NULL, routing TEXT NOT NULL, device TEXT NOT NULL,
        toolchain TEXT NOT NULL,
        UNIQUE (kernel_sha256, op, shape, tokens, weight_format, routing, device, toolchain))""",
    """CREATE TABLE records (
        id INTEGER PRIMARY KEY AUTOINCREMENT, problem INTEGER NOT NULL REFERENCES problems (id),
        config TEXT NOT NULL, config_hash TEXT NOT NULL, status TEXT NOT NULL, reason TEXT NOT NULL,
        median_us REAL, ratio REAL, ratio_low REAL, ratio_high REAL, samples INTEGER NOT NULL, seed INTEGER NOT NULL,
        worker TEXT NOT NULL, created REAL NOT NULL, is_default INTEGER NOT NULL, digest TEXT NOT NULL UNIQUE)""",
    "CREATE INDEX records_of_problem ON records (problem, config_hash)",
    "CREATE TABLE winners (problem INTEGER PRIMARY KEY, record INTEGER NOT NULL REFERENCES records (id))",
    """CREATE TABLE claims (
        problem INTEGER NOT NULL, config_hash TEXT NOT NULL, worker TEXT NOT NULL, process TEXT NOT NULL,
        PRIMARY KEY (problem, config_hash))""",
)

KEY_COLUMNS = {f.name: f"p.{f.name}" for f in dataclasses.fields(Key)}
RECORD_COLUMNS = {f.name: f"r.{f.name}" for f in dataclasses.fields(Record) if f.name != "key"}
RECORD_COLUMNS["is_winner"] = "(w.record IS r.id)"
MEASURED = "(status <> 'ok' OR median_us IS NOT NULL)"
"""Record.is_measured, for sqlite."""
_STORED = tuple(name for name in RECORD_COLUMNS if name != "is_winner")


def prepare(connection: sqlite3.Connection, path: Path, read_only: bool, timeout_s: float) -> None:
    """Makes a new file a tuning database, or checks that it is one. Raises: DatabaseError, sqlite3.Error."""
    if _is_empty(connection) and not read_only:
        _into_wal(connection, timeout_s)
        _make(connection)
    found = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if found != APPLICATION_ID:
        raise DatabaseError(f"{path} is a sqlite file of another program, not a tuning database; choose another file")
    if version > SCHEMA_VERSION:
        raise DatabaseError(
            f"{path} has schema {version}, written by a newer moec; this one reads up to {SCHEMA_VERSION}: update moec"
        )
    if not read_only:
        connection.execute("PRAGMA synchronous = FULL")  # NORMAL may lose the last commits with the power


def _is_empty(connection: sqlite3.Connection) -> bool:
    return connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0


def _into_wal(connection: sqlite3.Connection, timeout_s: float) -> None:
    """Switches to a write-ahead log. The switch does not wait for locks by itself where two processes race for it."""
    ends = time.monotonic() + timeout_s
    while True:
        try:
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > ends:
                raise
            time.sleep(_RETRY_S)
            continue
        if mode != "wal":
            raise DatabaseError(
                f"the file system has no write-ahead log for sqlite (it offers {mode}); use a local disk"
            )
        return


def _make(connection: sqlite3.Connection) -> None:
    """The tables, in one transaction, by whichever process comes first."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        if _is_empty(connection):
            for statement in _TABLES:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def values_of(record: Record) -> dict[str, Any]:
    """Column -> value of what is stored of a record besides its key."""
    values = {name: getattr(record, name) for name in _STORED}
    return values | {"config": config_text(record.config), "digest": record.digest()}


def record_of(row: tuple[Any, ...]) -> Record:
    """A row of KEY_COLUMNS and RECORD_COLUMNS, in that order."""
    key = Key(*row[: len(KEY_COLUMNS)])
    fields = dict(zip(RECORD_COLUMNS, row[len(KEY_COLUMNS) :], strict=True))
    truths = {name: bool(fields[name]) for name in ("is_default", "is_winner")}
    return Record(key, **{**fields, "config": json.loads(fields["config"]), **truths})

"""The tuning database: one sqlite file, many writers, nothing that was acknowledged is ever lost.

    with Database("tuning.db") as database:
        if database.claim(key, config_hash(config), worker):   # nobody has measured it or is about to
            database.add(measure(..))                          # on the disk when this returns
        database.set_winner(key, record)

A writer that is killed leaves at most one claim per worker, which the next takes over: that measurement is repeated.
Order is the order of adding, never that of clocks. A write-ahead log lets readers read while others write; it needs a
local disk. Source of the settings: sqlite.org/wal.html, sqlite.org/pragma.html#pragma_synchronous.
"""

from __future__ import annotations

import dataclasses
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moec.compiler.tune.claims import is_alive, this_process
from moec.compiler.tune.database_errors import database_errors
from moec.compiler.tune.errors import DatabaseError
from moec.compiler.tune.record import Key, Record, config_hash, config_text
from moec.compiler.tune.schema import KEY_COLUMNS, MEASURED, RECORD_COLUMNS, prepare, record_of, values_of

LOCK_TIMEOUT_S = 60.0
"""How long a writer waits for another; a transaction here takes milliseconds."""


class Database:
    """A tuning database, made where there is none.

    read_only: for looking at; works on a file or a folder that cannot be written.
    Raises: DatabaseError: from every method: full disk, no permission, another format, a newer schema.
    """

    def __init__(self, path: str | Path, *, read_only: bool = False, lock_timeout_s: float = LOCK_TIMEOUT_S) -> None:
        self.path, self.read_only = Path(path), read_only
        self._lock_timeout_s = lock_timeout_s
        self._lock = threading.RLock()
        self._claimed: set[tuple[int, str]] = set()
        self._inherited: list[sqlite3.Connection] = []
        if self.path.is_dir():
            raise DatabaseError(f"{self.path} is a folder; expected the file of a tuning database")
        if read_only and not self.path.is_file():
            raise DatabaseError(f"{self.path}: there is no tuning database; `moec tune MODEL --db FILE` makes one")
        if not read_only and self.path.is_file() and not os.access(self.path, os.W_OK):
            raise DatabaseError(f"{self.path} is read-only, and tuning writes; make it writable or copy it")
        self._open()

    def _open(self) -> None:
        self._process = this_process()
        self._pid = os.getpid()
        with database_errors(self.path):
            self._connection = self._connect()
            try:
                prepare(self._connection, self.path, self.read_only, self._lock_timeout_s)
            except BaseException:
                self._connection.close()
                raise

    def _connect(self) -> sqlite3.Connection:
        address = self.path.absolute().as_uri() + ("?mode=ro" if self.read_only else "?mode=rwc")
        connection = self._connect_to(address)
        if not self.read_only:
            return connection
        try:
            connection.execute("PRAGMA schema_version").fetchone()
        except sqlite3.OperationalError:  # the folder cannot be written, so no index of the log can be made
            connection.close()
            log = Path(f"{self.path}-wal")
            if log.is_file() and log.stat().st_size:
                raise
            connection = self._connect_to(address + "&immutable=1")
        return connection

    def _connect_to(self, address: str) -> sqlite3.Connection:
        return sqlite3.connect(
            address, uri=True, timeout=self._lock_timeout_s, isolation_level=None, check_same_thread=False
        )

    def add(self, record: Record) -> None:
        """Keeps a record and ends the claim on it; one that is there already changes nothing.

        It is on the disk when this returns, also through a loss of power.
        """
        self.add_all([record])

    def add_all(self, records: Iterable[Record]) -> int:
        """Adds records, all or none, in their order -> how many were new."""
        new = 0
        with self._writing() as connection:
            for record in records:
                problem = self._problem(connection, record.key)
                row = self._insert(connection, problem, record)
                new += row[1]
                connection.execute(
                    "DELETE FROM claims WHERE problem = ? AND config_hash = ?", (problem, config_hash(record.config))
                )
                if record.is_winner:
                    self._crown(connection, problem, row[0])
        return new

    def claim(self, key: Key, config_hash: str, worker: str) -> bool:
        """Whether this worker may measure the candidate: nobody has, and no living process is about to.

        A second call of the same worker is as good as the first. Ended by add() or close().
        """
        with self._writing() as connection:
            problem = self._problem(connection, key)
            at = (problem, config_hash)
            if connection.execute(
                f"SELECT 1 FROM records WHERE problem = ? AND config_hash = ? AND {MEASURED}", at
            ).fetchone():
                return False
            holder = connection.execute(
                "SELECT worker, process FROM claims WHERE problem = ? AND config_hash = ?", at
            ).fetchone()
            if holder is not None and holder != (worker, self._process) and is_alive(holder[1]):
                return False
            connection.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?)", (*at, worker, self._process))
            self._claimed.add(at)
            return True

    def set_winner(self, key: Key, record: Record) -> None:
        """Makes a record its key's winner; a record that is not there yet is added. Raises: ValueError: another key."""
        if record.key != key:
            raise ValueError(f"the record is of {record.key}, not of {key}")
        self.add(dataclasses.replace(record, is_winner=True))

    def winner(self, key: Key) -> Record | None:
        """The record in use for a key, None where there is none."""
        found = self.records(key, is_winner=True)
        return found[0] if found else None

    def records(self, key: Key | None = None, **filters: Any) -> list[Record]:
        """Records in the order of adding.

        filters: fields of Key or Record and the value each must have: op="experts", status="ok", is_winner=True.
        Raises: ValueError: a filter that is no field.
        """
        columns = KEY_COLUMNS | RECORD_COLUMNS
        wanted = ({} if key is None else dataclasses.asdict(key)) | filters
        if unknown := sorted(wanted.keys() - columns.keys()):
            raise ValueError(f"no field {unknown[0]!r}; known: {', '.join(columns)}")
        terms = " AND ".join(f"{columns[name]} = ?" for name in wanted)
        values = [config_text(v) if name == "config" else v for name, v in wanted.items()]
        text = (
            f"SELECT {', '.join(columns.values())} FROM records r JOIN problems p ON p.id = r.problem "
            f"LEFT JOIN winners w ON w.problem = r.problem {'WHERE ' + terms if terms else ''} ORDER BY r.id"
        )
        with self._lock, database_errors(self.path):
            return [record_of(row) for row in self._current().execute(text, values)]

    def keys(self) -> list[Key]:
        """Every key that has a record, sorted."""
        columns = ", ".join(KEY_COLUMNS.values())
        text = f"SELECT {columns} FROM problems p WHERE EXISTS (SELECT 1 FROM records WHERE problem = p.id)"
        with self._lock, database_errors(self.path):
            return sorted(Key(*row) for row in self._current().execute(text))

    def close(self) -> None:
        """Gives up this object's claims and closes the file; a second call does nothing."""
        with self._lock:
            if self._pid != os.getpid():
                return
            if self._claimed:
                with self._writing() as connection:
                    text = "DELETE FROM claims WHERE problem = ? AND config_hash = ? AND process = ?"
                    connection.executemany(text, [(*at, self._process) for at in self._claimed])
                    self._claimed.clear()
            with database_errors(self.path):
                self._connection.close()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _current(self) -> sqlite3.Connection:
        """The connection of this process: after a fork the child's own, the parent's left alone."""
        if self._pid != os.getpid():
            self._inherited.append(self._connection)  # closing it here would drop the parent's file locks
            self._lock, self._claimed = threading.RLock(), set()
            self._open()
        return self._connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, on the disk when it ends; an error undoes all of it."""
        if self.read_only:
            raise DatabaseError(f"{self.path} was opened for reading alone")
        with self._lock, database_errors(self.path):
            connection = self._current()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # sqlite itself undoes it when a disk is full
                    connection.execute("ROLLBACK")
                raise

    def _problem(self, connection: sqlite3.Connection, key: Key) -> int:
        fields = dataclasses.astuple(key)
        found = connection.execute(
            f"SELECT id FROM problems p WHERE {' AND '.join(f'{c} = ?' for c in KEY_COLUMNS.values())}", fields
        ).fetchone()
        if found is not None:
            return int(found[0])
        marks = ", ".join("?" * len(fields))
        made = connection.execute(f"INSERT INTO problems ({', '.join(KEY_COLUMNS)}) VALUES ({marks})", fields)
        return int(made.lastrowid or 0)

    def _insert(self, connection: sqlite3.Connection, problem: int, record: Record) -> tuple[int, bool]:
        """-> the record's number, and whether it is new."""
        values = {"problem": problem, "config_hash": config_hash(record.config)} | values_of(record)
        found = connection.execute("SELECT id FROM records WHERE digest = ?", (values["digest"],)).fetchone()
        if found is not None:
            return int(found[0]), False
        made = connection.execute(
            f"INSERT INTO records ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})", tuple(values.values())
        )
        return int(made.lastrowid or 0), True

    def _crown(self, connection: sqlite3.Connection, problem: int, record_id: int) -> None:
        connection.execute("INSERT OR REPLACE INTO winners VALUES (?, ?)", (problem, record_id))

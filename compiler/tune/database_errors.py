"""What sqlite says, in words that name the file and the next step."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moec.compiler.tune.errors import DatabaseError

_TEXTS = {
    "SQLITE_FULL": "the disk is full; what was acknowledged is kept: free some space and resume",
    "SQLITE_IOERR": "the disk refuses to be read or written ({error}); what was acknowledged is kept: "
    "look for a full disk, a quota or a limit on file sizes, and resume",
    "SQLITE_READONLY": "read-only, and tuning writes; make it writable or copy it",
    "SQLITE_PERM": "access is denied; make it readable and writable",
    "SQLITE_CANTOPEN": "cannot be opened; does its folder exist, and may it be written?",
    "SQLITE_BUSY": "another process has it locked for too long; end that process, or try again later",
    "SQLITE_NOTADB": "not a tuning database (no sqlite file); choose another file",
    "SQLITE_CORRUPT": "damaged ({error}); export what can be read from a copy, and start a new one",
}


@contextmanager
def database_errors(path: Path) -> Iterator[None]:
    """Turns sqlite's errors into DatabaseError."""
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "") or ""
        kind = next((k for k in _TEXTS if name == k or name.startswith(f"{k}_")), None)
        text = _TEXTS[kind].format(error=error) if kind else f"sqlite: {error}"
        raise DatabaseError(f"{path}: {text}") from error

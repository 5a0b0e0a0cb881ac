"""The engine directory: its files, their digests, and how one appears whole or not at all.

    manifest.json              format version, moec version, model, target, sha256 and size of every other file
    program.json               the steps of each rank
    weights-<rank>.safetensors
    kernels-<target>.so        where the engine has kernels of its own
    ledger.json  evidence.json  tuning.json
    plan.json                  where the engine is for several ranks
    tokenizer.json             where the model had one
JSON is written with sorted keys and no time stamps: the same inputs give the same bytes.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moec.runtime.errors import FormatError, OutputError

FORMAT_VERSION = 1
MANIFEST, PROGRAM, LEDGER, EVIDENCE, TUNING = (
    f"{name}.json" for name in ("manifest", "program", "ledger", "evidence", "tuning")
)
TOKENIZER, PLAN = "tokenizer.json", "plan.json"
WEIGHTS_ALIGN_BYTES = 64
_RENAME_NOREPLACE = 1


def weights_name(rank: int) -> str:
    """The file of a rank's weights in an engine folder."""
    return f"weights-{rank}.safetensors"


def digest(path: Path) -> str:
    """sha256 of a file, as hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_json(path: Path, data: Any) -> None:
    """Canonical JSON: sorted keys, one entry per line, a newline at the end."""
    path.write_text(json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Raises: FormatError: absent or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FormatError(f"{path}: no such file; {path.parent} is not a whole engine, compile it again") from error
    except (ValueError, OSError) as error:
        raise FormatError(f"{path}: cannot be read as JSON ({error}); compile the engine again") from error


def file_table(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file in an engine directory but the manifest, by name."""
    files = sorted(p for p in directory.iterdir() if p.name != MANIFEST)
    return {p.name: {"bytes": p.stat().st_size, "sha256": digest(p)} for p in files}


def check_files(directory: Path, table: dict[str, dict[str, Any]], digests: bool = True) -> None:
    """Compares each file of the manifest's table with what is there, sizes first, then (digests) contents.

    Raises: FormatError naming the file, what was expected and what was found.
    """
    for name, entry in table.items():
        path = directory / name
        if Path(name).name != name or not path.is_file():
            raise FormatError(
                f"{path}: listed in the manifest but not there; copy the engine again or compile it again"
            )
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise FormatError(
                f"{path}: {size} bytes, the manifest says {entry['bytes']}; copy the engine again or compile it again"
            )
    for name, entry in table.items() if digests else ():
        found = digest(directory / name)
        if found != entry["sha256"]:
            raise FormatError(
                f"{directory / name}: sha256 {found[:12]}.., the manifest says {entry['sha256'][:12]}..; the file was "
                "changed, copy the engine again or compile it again"
            )


def publish(output: Path, fill: Callable[[Path], None]) -> None:
    """Makes the directory `output` appear with everything that fill(folder) writes, or not at all.

    The folder is made beside `output`, flushed to disk, and renamed once; whatever fails, it is removed.
    Raises: OutputError: output exists (it is kept as it is), its parent does not, or the disk is full or read-only.
    """
    output = Path(os.path.abspath(output))
    check_output(output)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise OutputError(f"{output}: {error.strerror}; choose an output folder that can be written") from error
    try:
        fill(folder)
        for path in folder.iterdir():
            _flush(path)
        _flush(folder)
        folder.chmod(0o777 & ~_umask())
        rename_new(folder, output)
        _flush(output.parent)
    except OSError as error:
        raise OutputError(f"{output}: {error.strerror or error}; nothing was written there") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_output(output: Path) -> None:
    """Raises OutputError where `output` cannot be made: it exists, or its parent does not."""
    if os.path.lexists(output):
        raise OutputError(f"{output}: exists and is kept as it is; remove it or choose another output folder")
    if not output.parent.is_dir():
        raise OutputError(f"{output}: the folder {output.parent} does not exist; make it first")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def rename_new(source: Path, target: Path) -> None:
    """rename(2) that never replaces: os.rename would take the place of an empty folder made meanwhile."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        at_cwd = -100
        if libc.renameat2(at_cwd, os.fsencode(source), at_cwd, os.fsencode(target), _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code))
    if os.path.lexists(target):
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
    source.rename(target)

"""Measures a bundle on the GPU of this machine: python run.py [--out results.jsonl] [--seconds 540].

Needs Python 3.11 and the driver, nothing else. Every candidate is checked before it is timed, in a process of its own
that is ended when it hangs or crashes. Results are written as they come: a run that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FORMAT, VERSION = "moec-bundle-results", 1
SETUP_LIMIT_S = 300.0
CHILD = "--child"  # what run.py is told where it is to measure itself


def canonical(value: Any) -> str:
    """As compiler/tune/record.py writes JSON, which digests are of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_of(data: bytes) -> str:
    """The digest in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


class BundleError(Exception):
    """The bundle is not as it was made."""


class ProblemError(Exception):
    """One problem cannot be measured here; others may."""


def check_bundle(folder: Path) -> tuple[dict[str, Any], str]:
    """The manifest and its sha256. Raises: BundleError: a file is missing or changed."""
    text = (folder / "manifest.json").read_bytes()
    manifest = json.loads(text)
    for name, file in manifest["files"].items():
        path = folder / name
        if not path.is_file() or sha256_of(path.read_bytes()) != file["sha256"]:
            raise BundleError(f"{path}: missing or changed since the bundle was made; copy the bundle again")
    return manifest, sha256_of(text)


class Results:
    """The results file: a header, then a line for each measurement with its own digest."""

    def __init__(self, path: Path, manifest_sha256: str) -> None:
        self.path = path
        self.done: set[tuple[int, str]] = set()
        if path.is_file():
            self._resume(manifest_sha256)
        self._file = path.open("a", encoding="utf-8")
        if not self._file.tell():
            self._write({"format": FORMAT, "version": VERSION, "manifest_sha256": manifest_sha256})

    def _resume(self, manifest_sha256: str) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # the end of a line was cut off
            self.path.write_bytes(whole)
        lines = [json.loads(line) for line in whole.splitlines()]
        if lines and lines[0].get("manifest_sha256") != manifest_sha256:
            raise BundleError(f"{self.path}: results of another bundle; choose another --out")
        self.done = {(line["problem"], line["candidate"]) for line in lines if "candidate" in line}

    def add(self, problem: int, candidate: str, record: dict[str, Any]) -> None:
        """Keeps a record; it is on the disk when this returns."""
        digest = sha256_of(canonical(record).encode())
        self._write({"problem": problem, "candidate": candidate, "record": record, "sha256": digest})
        self.done.add((problem, candidate))

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(canonical(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; what was added is on the disk already."""
        self._file.close()


class Child:
    """A measuring process and what it tells, line by line."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def next(self, limit_s: float) -> dict[str, Any] | None:
        """The next line, None at the end. Raises: queue.Empty: nothing came in time."""
        line = self._lines.get(timeout=limit_s)
        return None if line is None else json.loads(line)

    def end(self) -> int:
        """Ends it -> its exit code."""
        self._process.kill()
        return self._process.wait()

    def wait(self) -> int:
        """Waits for its end -> its exit code."""
        return self._process.wait()


def measure(
    folder: Path, manifest: dict[str, Any], problem: int, results: Results, limit_s: float, ends: float
) -> None:
    """All candidates of a problem that have no result yet, in as many processes as it takes."""
    entry = manifest["problems"][problem]
    while time.monotonic() < ends:
        names = [n for n in entry["candidates"] if (problem, n) not in results.done]
        if not names:
            return
        command = [sys.executable, str(folder / "run.py"), CHILD, str(problem), json.dumps(names)]
        child, current, device = Child(command), None, {"device": "unknown"}
        status, reason = "crashed", "its process ended"
        try:
            while (told := child.next(SETUP_LIMIT_S if current is None else limit_s)) is not None:
                device = told.get("device", device)
                if "broken" in told:
                    raise ProblemError(f"problem {problem} ({entry['key']['shape']}): {told['broken']}")
                if "begin" in told:
                    current = told["begin"]
                if "end" in told:
                    fields = {n: v for n, v in told.items() if n != "end"}
                    results.add(problem, told["end"], _record(manifest, entry, told["end"], device, fields))
                    _print(entry, told["end"], fields)
                    current = None
                    if time.monotonic() > ends:
                        child.end()
                        return
        except queue.Empty:
            status, reason = "timeout", f"no answer within {limit_s:g} s"
            child.end()
        except BaseException:
            child.end()
            raise
        code = child.wait()
        if current is not None:
            if status == "crashed":
                reason = f"its process ended with code {code}"
            fields = {"status": status, "reason": reason}
            results.add(problem, current, _record(manifest, entry, current, device, fields))
            _print(entry, current, fields)
        elif status == "timeout":
            raise ProblemError(f"problem {problem} ({entry['key']['shape']}): not ready within {SETUP_LIMIT_S:g} s")


def _record(manifest: Any, entry: Any, name: str, device: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """A record of moec's tuning database, as JSON values."""
    plain: dict[str, Any] = {
        "median_us": None,
        "ratio": None,
        "ratio_low": None,
        "ratio_high": None,
        "samples": 0,
        "seed": 0,
    }
    plain |= {"worker": f"bundle on driver {device.get('driver', 'unknown')}", "created": time.time()}
    plain |= {"is_default": name == entry["default"], "is_winner": False}
    key = entry["key"] | {"device": device["device"]}
    return {"key": key, "config": manifest["candidates"][name]["config"]} | plain | fields


def _print(entry: Any, name: str, fields: dict[str, Any]) -> None:
    what = f"{fields['median_us']:.1f} us, {fields['ratio']:.3f}" if fields["status"] == "ok" else fields["reason"]
    print(f"{entry['mode']} {entry['tokens']} tokens, {name}: {fields['status']}, {what}", flush=True)


def main(folder: Path, arguments: list[str]) -> int:
    """What run.py does. folder: of the bundle. Returns the exit code."""
    if arguments[:1] == [CHILD]:
        from moec.compiler.tune.runner.child import measure_candidates

        return measure_candidates(folder, int(arguments[1]), json.loads(arguments[2]))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=folder / "results.jsonl")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after that")
    parser.add_argument("--limit-s", type=float, default=30.0, help="longest time of a candidate")
    options = parser.parse_args(arguments)
    failed = 0
    try:
        manifest, digest = check_bundle(folder)
        results = Results(options.out, digest)
        ends = time.monotonic() + options.seconds
        for problem in range(len(manifest["problems"])):
            try:
                measure(folder, manifest, problem, results, options.limit_s, ends)
            except ProblemError as error:
                failed += 1
                print(f"error: {error}", file=sys.stderr)
        results.close()
    except (BundleError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    missing = sum(len(p["candidates"]) for p in manifest["problems"]) - len(results.done)
    print(f"{options.out}: {len(results.done)} results" + (f", {missing} to go: run again" if missing else ""))
    return 1 if failed else 0

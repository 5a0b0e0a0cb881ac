"""A visit to a GPU machine in calls of ten minutes: each step in a process with a limit, whatever the others did.

    make gpu-visit                                                    # here, no GPU: what is carried, in build/visit
    python benchmarks/gpu/visit.py measure build/visit --out OUT      # there: measure, tune, measure what was tuned
    python benchmarks/gpu/visit.py check build/visit --out OUT        # there: races, memory, attention, a whole engine

Everything that comes back lies in OUT, at most eight files: results, log.txt with all that was printed, and visit.json
with what each step came to. Exit code 1: a step failed. Python's library alone; the steps need torch and the driver.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OURS = ("--kernel-name", "kns=_kernel")
"""What compute-sanitizer looks at: our kernels are called so, torch's are not."""


@dataclasses.dataclass(frozen=True)
class Step:
    """words: of its command; {carried}, {out} and {python} stand for folders and the interpreter. seconds: its limit.

    bring: a file that it leaves among what was carried, and its name in OUT.
    """

    name: str
    words: tuple[str, ...]
    seconds: float
    bring: tuple[str, str] | None = None


def _run(*words: str) -> tuple[str, ...]:
    return ("{python}", str(HERE / "run.py"), *words)


def _sanitized(tool: str) -> tuple[str, ...]:
    small = (
        "{carried}/small",
        "--one-process",
        "--check-only",
        "--checked",
        "1",
        "7",
        "40",
        "--out",
        "{work}/small.json",
    )
    log = ("--log-file", f"{{out}}/{tool}.log", "--error-exitcode", "9")
    return ("compute-sanitizer", "--tool", tool, *OURS, *log, *_run(*small))


_ENGINE = str(HERE / "engine.py")
CALLS: dict[str, tuple[Step, ...]] = {
    "measure": (
        Step("before", _run("{carried}/gpu", "--quick", "--seconds", "200", "--out", "{out}/before.json"), 240),
        Step(
            "tune", ("{python}", "{carried}/tune/run.py", "--seconds", "150"), 190, ("tune/results.jsonl", "tune.jsonl")
        ),
        Step(
            "tuned",
            _run(
                "{carried}/gpu", "--tuned", "{carried}/tune", "--quick", "--seconds", "90", "--out", "{out}/tuned.json"
            ),
            120,
        ),
    ),
    "check": (
        Step(
            "repeats",
            _run("{carried}/small", "--check-only", "--repeat", "10", "--seconds", "45", "--out", "{out}/repeats.json"),
            60,
        ),
        Step("memcheck", _sanitized("memcheck"), 70),
        Step("racecheck", _sanitized("racecheck"), 100),
        Step("unpack", ("{python}", str(HERE / "carry.py"), "unpack", "{carried}/engine", "{work}/gpu.engine"), 80),
        Step(
            "engine",
            (
                "{python}",
                _ENGINE,
                "check",
                "{work}/gpu.engine",
                "{carried}/expected.safetensors",
                "--out",
                "{out}/engine.json",
            ),
            80,
        ),
        Step("peer", ("{python}", _ENGINE, "peer", "{carried}/model", "--out", "{out}/peer.json"), 100),
        Step("attention", ("{python}", str(HERE / "attention.py"), "run", "{carried}/attention"), 70),
    ),
    "full": (Step("full", _run("{carried}/gpu", "--seconds", "540", "--out", "{out}/full.json"), 580),),
}
"""The calls of a visit, in their order; full measures every token count."""


def visit(
    steps: tuple[Step, ...], carried: Path, out: Path, seconds: float, clock: Callable[[], float] = time.monotonic
) -> list[dict[str, Any]]:
    """Runs the steps -> name, seconds, code and last line of each; code None: it ran out of time, or had none left."""
    out.mkdir(parents=True, exist_ok=True)
    (carried / "work").mkdir(exist_ok=True)
    places = {"carried": str(carried), "out": str(out), "python": sys.executable, "work": str(carried / "work")}
    ends, told = clock() + seconds, []
    for step in steps:
        began = clock()
        command = [word.format(**places) for word in step.words]
        code, last = _watched(command, min(step.seconds, ends - began), out / "log.txt")
        told.append({"step": step.name, "seconds": round(clock() - began, 1), "code": code, "last": last})
        print(f"{step.name}: {'no time' if code is None else f'exit code {code}'}, {last}", flush=True)
        if step.bring is not None and (carried / step.bring[0]).is_file():
            (out / step.bring[1]).write_bytes((carried / step.bring[0]).read_bytes())
        (out / "visit.json").write_text(json.dumps(told, indent=1))
    return told


def _watched(command: list[str], seconds: float, log: Path) -> tuple[int | None, str]:
    """Runs a command with its children for so long, its output into the log -> its exit code and last line."""
    if seconds <= 0:
        return None, "left out"
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1] / "src"), "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(command)}\n".encode())
        file.flush()
        start = file.tell()
        try:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        except OSError as error:
            return 127, f"{command[0]}: {error.strerror}"
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_bytes()[start:].decode(errors="replace").split("\n")
    return code, next((line for line in reversed(lines) if line.strip()), "nothing was printed")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("call", choices=tuple(CALLS))
    parser.add_argument("carried", type=Path, help="build/visit, as make gpu-visit fills it")
    parser.add_argument("--out", type=Path, required=True, help="a folder for what comes back")
    parser.add_argument("--seconds", type=float, default=570, help="for all steps together")
    parser.add_argument("--steps", nargs="*", help="these alone")
    options = parser.parse_args()
    steps = tuple(s for s in CALLS[options.call] if not options.steps or s.name in options.steps)
    told = visit(steps, options.carried.resolve(), options.out.resolve(), options.seconds)
    return 1 if any(step["code"] != 0 for step in told) else 0


if __name__ == "__main__":
    sys.exit(main())

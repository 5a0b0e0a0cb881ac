"""Who is measuring: processes by a name that no later process can have, so that claims of dead ones are taken over."""

from __future__ import annotations

import os
from pathlib import Path

_START_FIELD = 19  # starttime in /proc/PID/stat, counted after the command's closing bracket


def this_process() -> str:
    """This process as boot:pid:start, unique among all processes of the machine since it was made."""
    pid = os.getpid()
    return f"{_boot()}:{pid}:{_start_ticks(pid)}"


def is_alive(process: str) -> bool:
    """Whether the process of that name still runs. One in another PID namespace counts as dead: then a candidate is
    measured twice, which costs time and harms nothing."""
    boot, pid, start = process.split(":")
    return boot == _boot() and start == _start_ticks(int(pid)) != ""


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _start_ticks(pid: int) -> str:
    """Clock ticks from boot to the start of a process, "" where it is gone; no clock that can be set changes it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[_START_FIELD]

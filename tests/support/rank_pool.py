"""Processes with gloo groups between them that run one placed engine after the other: starting them is what costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moec.runtime.launch.collectives import collective_function
from moec.runtime.loader import open_engine, read_manifest
from moec.runtime.options import LoadOptions, RankLimits
from moec.runtime.program import Program
from moec.runtime.ranks.groups import Group, connect_groups
from moec.runtime.ranks.watch import Watch


class RankPool:
    """num_ranks processes. run: as run_ranks.run_engine, by processes."""

    def __init__(self, num_ranks: int) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(self.store.port)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(num_ranks)
        ]

    def run(self, folder: Path, lanes: Sequence[Sequence[Sequence[int]]]) -> list[Tensor | None]:
        for process in self.processes:
            process.stdin.write(json.dumps({"folder": str(folder), "lanes": lanes}) + "\n")
            process.stdin.flush()
        lines = [process.stdout.readline() for process in self.processes]
        if not all(line == "done\n" for line in lines):
            raise RuntimeError(f"ranks said {lines}")
        return [torch.load(folder.parent / f"{folder.name}.rank-{r}.pt") for r in range(len(self.processes))]

    def close(self) -> None:
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            process.wait(30)
            process.stdout.close()


def serve(rank: int, port: int) -> None:
    """One process: a line with a folder and prompts in, logits in a file out."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    watch, known = Watch(rank, RankLimits()), dict[tuple[int, ...], Group]()
    for line in sys.stdin:
        job = json.loads(line)
        folder = Path(job["folder"])
        manifest = read_manifest(folder)
        where = manifest["placement"]
        entry = where["ranks"][rank]
        groups = _groups(entry["groups"], rank, store, watch, known)
        options = LoadOptions(rank=rank, huge_pages=False)
        executor = open_engine(folder, manifest, options, lambda step, groups=groups: collective_function(step, groups))
        outputs = executor(*_lane_inputs(executor.program, job["lanes"], where, entry))
        result = outputs[0] if entry["gives_logits"] else None
        torch.save(result, folder.parent / f"{folder.name}.rank-{rank}.pt")
        sys.stdout.write("done\n")
        sys.stdout.flush()


def _lane_inputs(program: Program, lanes: Any, where: dict[str, Any], entry: dict[str, Any]) -> Any:
    from run_ranks import rank_inputs

    return rank_inputs(program, lanes[entry["replica"] * where["lanes"] + entry["lane"]], entry["caches"])


def _groups(
    wanted: dict[str, list[int]], rank: int, store: Any, watch: Watch, known: dict[tuple[int, ...], Group]
) -> dict[str, Group]:
    """Groups by name, made once for each set of ranks: all processes see the plans in one order."""
    out = {}
    for name, ranks in sorted(wanted.items(), key=lambda item: item[1]):
        key = tuple(ranks)
        if key not in known:
            known[key] = connect_groups(store, rank, {"of": ranks}, "cpu", True, watch)["of"]
        out[name] = Group(name, ranks, rank, known[key].process_group, watch)
    return out


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))

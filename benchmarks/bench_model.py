"""Times a whole model, 4 layers of DeepSeekMoE-16B's shape: moec against transformers and llama.cpp, in one run.

    python benchmarks/bench_model.py [--systems moec:bf16,transformers,llama.cpp:bf16,..] [--rounds N] [--json F]

Every system loads its model once in a process of its own (model_systems.py) and is then asked in turn, round after
round: prefill of 512 tokens into an empty cache, then single tokens after it. A ratio is the median over rounds of
(moec's rate over the system's rate in the same round), for moec in the system's own format.
llama.cpp is measured where `pip install llama-cpp-python gguf` has been done; else the table says that it is left out.
Needs about 20 GB of memory and 15 GB of disk for all of them, and a quiet machine; with more systems than fit, those
that read their files where they lie are slow. moec:FORMAT is any weight format: moec:bf16-packed beside moec:bf16.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from model_systems import PREFILL_TOKENS
from results_file import write_json
from rich.console import Console
from rich.table import Table

SYSTEMS = "moec:bf16,moec:int4,transformers,llama.cpp:bf16,llama.cpp:q4_0"
COUNTERPARTS = {"transformers": "moec:bf16", "llama.cpp:bf16": "moec:bf16", "llama.cpp:q4_0": "moec:int4"}
console = Console()


@dataclasses.dataclass
class Measured:
    """One system. prefill, decode: tokens per second, one median per round. note: why there are none."""

    system: str
    prefill: list[float] = dataclasses.field(default_factory=list)
    decode: list[float] = dataclasses.field(default_factory=list)
    note: str = ""


class System:
    """A system in a process of its own, asked by lines of text and answering in JSON."""

    def __init__(self, name: str, work: Path, threads: int) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, str(Path(__file__).with_name("model_systems.py")), name, str(work), str(threads)]
        # not a pipe: nobody empties it while the system runs
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=env
        )
        self.refused = self._answer().get("refused", "")

    def measure(self) -> tuple[float, float]:
        """-> tokens per second of one prefill and of the single tokens after it. Raises: RuntimeError: it ended."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self._answer()
        if "refused" in answer:
            raise RuntimeError(answer["refused"])
        return PREFILL_TOKENS / answer["prefill_s"], 1 / statistics.median(answer["decode_s"])

    def _answer(self) -> dict[str, object]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        code = self._process.wait()
        self._log.seek(0)
        reason = (self._log.read().strip().splitlines() or ["no output"])[-1]
        return {"refused": f"ended with code {code}: {reason}"}

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


def run(names: list[str], work: Path, rounds: int, threads: int) -> list[Measured]:
    """All systems, interleaved. One that cannot be loaded or ends is kept with the reason."""
    measured = {name: Measured(name) for name in names}
    systems: dict[str, System] = {}
    try:
        for name in names:
            console.print(f"loading {name}")
            system = System(name, work, threads)
            if system.refused:
                measured[name].note = system.refused
            else:
                systems[name] = system
        for number in range(rounds + 1):  # the first is a warm-up
            for name in list(systems):
                try:
                    prefill, decode = systems[name].measure()
                except RuntimeError as error:
                    measured[name].note = str(error)
                    del systems[name]
                    continue
                if number:
                    measured[name].prefill.append(prefill)
                    measured[name].decode.append(decode)
    finally:
        for system in systems.values():
            system.stop()
    return list(measured.values())


def ratio(moec: list[float], peer: list[float]) -> float:
    """Median over rounds of moec's rate over the peer's."""
    return statistics.median(a / b for a, b in zip(moec, peer, strict=False))


def show(results: list[Measured]) -> None:
    """Prints rates and moec's ratio to each peer."""
    by_name = {m.system: m for m in results}
    table = Table("system", "prefill tok/s", "decode tok/s", "best decode", "moec / it: prefill", "decode", "note")
    for m in results:
        rates = [f"{statistics.median(r):.1f}" if r else "-" for r in (m.prefill, m.decode)]
        best = f"{max(m.decode):.1f}" if m.decode else "-"
        own = by_name.get(COUNTERPARTS.get(m.system, ""))
        pairs = [(own.prefill, m.prefill), (own.decode, m.decode)] if own is not None else []
        ratios = [f"{ratio(a, b):.2f}" if a and b else "-" for a, b in pairs] or ["", ""]
        table.add_row(m.system, *rates, best, *ratios, m.note)
    console.print(table)


def main(
    systems: Annotated[str, typer.Option(help="which, in turn")] = SYSTEMS,
    rounds: Annotated[int, typer.Option(help="rounds after the warm-up")] = 5,
    threads: Annotated[int, typer.Option(help="of each system")] = os.cpu_count() or 1,
    work: Annotated[
        Path | None, typer.Option(help="where models are made and kept; default: a temporary folder")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the results")] = None,
) -> None:
    """Runs and prints. Exit code 1 when moec is slower than a peer in its own format."""
    with tempfile.TemporaryDirectory(prefix="moec-bench-") as folder:
        results = run(systems.split(","), work or Path(folder), rounds, threads)
    show(results)
    write_json(json_file, results)
    by_name = {m.system: m for m in results}
    lost = [
        m.system
        for m in results
        for own in [by_name.get(COUNTERPARTS.get(m.system, ""))]
        if own is not None
        for a, b in ((own.prefill, m.prefill), (own.decode, m.decode))
        if a and b and ratio(a, b) < 1
    ]
    if lost:
        console.print(f"slower than {', '.join(sorted(set(lost)))}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

"""Checks and times the bundle on a GPU: every layer against float64, per token count, next to other ways of doing it.

    PYTHONPATH=src python benchmarks/gpu/run.py build/gpu-bundle --out results.json [--quick]
    PYTHONPATH=src python benchmarks/gpu/run.py build/gpu-bundle --tuned build/tune-bundle   # after its run.py
    PYTHONPATH=src python benchmarks/gpu/run.py build/dry-bundle --dry-run   # no GPU: emulated, nothing is measured

Needs a GPU, torch and the driver; no TVM, no compiler. Ceilings (copy, matmul) are measured in the same run. A layer
whose check fails is reported and not timed; one that crashes or hangs costs its own process alone. The time is shared
out: each layer has its part, and what there was none for is named. Beside the JSON lies a roofline as SVG.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from budget import FIRST, Budget
from measure import Plan, serve
from roofline import draw
from supervise import Event, supervise
from tuned import tuned_entries

from moec.runtime.errors import EngineError

CHECKED = (1, 7, 64, 700)
TIMED = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
DRY = (1, 5)


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, default=Path("gpu-results.json"))
    parser.add_argument("--shapes", nargs="*")
    parser.add_argument("--quick", action="store_true", help="five token counts")
    parser.add_argument("--tokens", type=int, nargs="*", default=None, help="token counts that are timed")
    parser.add_argument("--checked", type=int, nargs="*", default=None, help="token counts that are checked")
    parser.add_argument("--repeat", type=int, default=1, help="of each check, with new inputs: for races")
    parser.add_argument("--check-only", action="store_true", help="no times")
    parser.add_argument("--tuned", type=Path, help="a tuning bundle with results: its layers, as they are and tuned")
    parser.add_argument("--seconds", type=float, default=540, help="for all layers, in equal parts")
    parser.add_argument("--limit-s", type=float, default=90, help="a layer that says nothing for so long hangs")
    parser.add_argument("--one-process", action="store_true", help="for compute-sanitizer: a bad layer ends the run")
    parser.add_argument("--dry-run", action="store_true", help="a bundle of emulated kernels, on this machine")
    parser.add_argument("--serve", type=int, nargs="*", default=None, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def load_bundle(options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The manifest, and the layers asked for. Raises: OSError, ValueError: no bundle; TunedError: no results."""
    manifest = json.loads((options.bundle / "manifest.json").read_text())
    try:
        layers, dispatch = manifest["layers"], manifest.get("dispatch", {})
        kernels = [k for e in layers for k in e["kernels"].values()]
        for kernel in [*kernels, *(k for rows in dispatch.values() for made in rows.values() for k in made.values())]:
            kernel["file"] = str(options.bundle / kernel["file"])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{options.bundle} is no bundle of make_bundle.py ({error!r}); make it again") from error
    if options.tuned is not None:
        made = tuned_entries(layers, dispatch, options.tuned)
        both = {(e["shape"]["name"], e["size"]) for e in made}
        layers = [*(e for e in layers if (e["shape"]["name"], e["size"]) in both), *made]
    return manifest, [e for e in layers if not options.shapes or e["shape"]["name"] in options.shapes]


def name_of(entry: dict[str, Any]) -> str:
    """A layer in words."""
    return f"{entry['shape']['name']} {entry['size']}" + (" tuned" if "tuned" in entry else "")


def work_on(options: argparse.Namespace, layers: Sequence[int]) -> Iterator[Event]:
    """The part of a measuring process: what it finds of the device, then of layers. Raises: EngineError: no device."""
    from machine import Dry, Gpu

    manifest, entries = load_bundle(options)
    machine = (Dry if options.dry_run else Gpu)(manifest["arch"])
    yield {"facts": machine.facts() | {"ceilings": machine.ceilings()}}
    tokens = options.tokens or (DRY if options.dry_run else FIRST if options.quick else TIMED)
    tokens = () if options.check_only else tokens
    plan = Plan(DRY if options.dry_run else options.checked or CHECKED, tokens, options.repeat, options.dry_run)
    yield from serve(machine, {n: entries[n] for n in layers}, plan, Budget(options.seconds, len(layers)))


def gather(events: Iterable[Event], result: dict[str, Any], entries: list[dict[str, Any]]) -> Iterator[int]:
    """Brings what processes tell into the result; gives the number of each layer that is done."""
    begun: dict[str, Any] | None = None
    for event in events:
        if "facts" in event:
            result |= event["facts"]
        if "begin" in event:
            entry = entries[event["begin"]]
            begun = {"shape": entry["shape"]["name"], "size": entry["size"], "dtype": entry["shape"]["dtype"]}
            begun |= {"tuned": entry.get("tuned"), "faults": [], "rows": [], "left_out": []}
            result["layers"].append(begun)
        for name, into in (("fault", "faults"), ("row", "rows"), ("left_out", "left_out")):
            if begun is not None and name in event:
                begun[into].append(event[name])
        if "end" in event:
            if begun is None:
                result["left_out"].append(name_of(entries[event["end"]]))
            else:
                begun["rows"].sort(key=lambda row: (row["tokens"], row["skew"]))
                yield event["end"]
            begun = None
        if "failed" in event:
            result["failed"] = event["failed"]


def main() -> int:
    options = options_of()
    began = time.monotonic()
    try:
        manifest, entries = load_bundle(options)
        if options.serve is not None:
            for event in work_on(options, options.serve):
                print(json.dumps(event), flush=True)
            return 0
        if not entries:
            raise ValueError(f"{options.bundle} has none of the layers asked for; left out: {manifest['refused']}")
        layers = range(len(entries))
        events = (
            work_on(options, layers)
            if options.one_process
            else supervise(command(began, options), layers, options.limit_s)
        )
        result: dict[str, Any] = {"arch": manifest["arch"], "compiler": manifest["compiler"]}
        result |= {"layers": [], "left_out": []}
        for number in gather(events, result, entries):
            result["seconds"] = round(time.monotonic() - began, 1)
            options.out.write_text(json.dumps(result, indent=1))  # what is known survives a run that is cut off
            report(name_of(entries[number]), result["layers"][-1])
    except (EngineError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return finish(options, result)


def command(began: float, options: argparse.Namespace) -> Callable[[list[int]], list[str]]:
    """The measuring process for some layers: this program, with what is left of the time."""

    def of(layers: list[int]) -> list[str]:
        left = options.seconds - (time.monotonic() - began)
        return [sys.executable, __file__, *sys.argv[1:], "--seconds", str(left), "--serve", *map(str, layers)]

    return of


def finish(options: argparse.Namespace, result: dict[str, Any]) -> int:
    """Writes the picture and the last lines; -> the exit code."""
    if "failed" in result:
        if "device" in result:
            print(f"error: measuring stopped: {result['failed']}", file=sys.stderr)
        return 1
    options.out.write_text(json.dumps(result, indent=1))
    if any(layer["rows"] for layer in result["layers"]):
        options.out.with_suffix(".svg").write_text(draw(result))
    for layer in result["left_out"]:
        print(f"{layer}: no time was left; run it alone with --shapes")
    return 1 if any(layer["faults"] for layer in result["layers"]) else 0


def report(name: str, layer: dict[str, Any]) -> None:
    """What was found, a line per token count."""
    print(name, "; ".join(layer["faults"]) or "right", flush=True)
    for row in layer["rows"]:
        rate = f"{row['bytes'] / row['us'] / 1e6:.2f} TB/s {row['flops'] / row['us'] / 1e6:.0f} TFLOP/s"
        print(f"  {row['tokens']:5} tokens skew {row['skew']}: {row['us']:9.1f} us  {rate}  {row.get('peers', '')}")
    if layer["left_out"]:
        print(f"  no time for {', '.join(map(str, layer['left_out']))} tokens")


if __name__ == "__main__":
    sys.exit(main())

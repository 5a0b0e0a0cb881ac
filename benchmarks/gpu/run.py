"""Checks and times the bundle on a GPU: every layer against float64, per token count, next to other ways of doing it.

    PYTHONPATH=src python benchmarks/gpu/run.py build/gpu-bundle --out results.json [--quick]
    python benchmarks/gpu/run.py build/dry-bundle --dry-run             # no GPU: emulated kernels, nothing is measured

Needs a GPU, torch and the driver; no TVM, no compiler. Ceilings (copy, matmul) are measured in the same run. A layer
whose check fails is reported and not timed. Beside the JSON lies a roofline as SVG.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from layer import FP8, Layer, make_weights, reference, relative_error
from machine import Dry, Gpu, Machine
from peers import PEERS, WAITING
from roofline import draw

from moec.passes.ir.gate import GateSpec
from moec.runtime.errors import EngineError

# of bfloat16 results (h and, for many tokens, rows before the sum are rounded); e4m3 keeps 3 bits of x, w and h
TOLERANCE = {FP8: 0.08}
PLAIN_TOLERANCE = 0.008  # weights that are codes are compared with what the codes mean
CHECKED = (1, 7, 64, 700)
TIMED = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
QUICK = (1, 16, 128, 1024, 8192)
FEW, MANY = 256, 32  # what the small kernels are timed to, and the large ones from
SKEWS = (0.0, 2.0)
DRY = (1, 5)


def fill(layer: Layer, skew: float, seed: int) -> None:
    """Random x and logits; skew: how much more the first experts are liked."""
    generator = torch.Generator(layer.x.device).manual_seed(seed)
    layer.x.normal_(generator=generator)
    layer.logits.normal_(generator=generator)
    layer.logits += torch.linspace(skew, 0, layer.logits.shape[1], device=layer.logits.device)


def check(layer: Layer) -> str | None:
    """What is wrong with a run of the layer, or None."""
    layer.y.fill_(float("nan"))
    layer.run()
    if "moe_decode" in layer.kernels and (fault := router_fault(layer)):
        return fault
    weights, experts = GateSpec.decode(layer.shape["gate"]).apply(layer.logits.cpu())
    if not torch.equal(experts, layer.experts.cpu()):
        return "the gate chose other experts than its specification"
    if not torch.allclose(weights, layer.route_weights.cpu(), rtol=1e-5, atol=1e-7):
        return "the gate's weights differ from its specification"
    error = relative_error(layer.y, reference(layer))
    limit = TOLERANCE.get(layer.shape["dtype"], PLAIN_TOLERANCE)
    return None if error < limit else f"relative error {error:.3g}, expected below {limit}"


def router_fault(layer: Layer) -> str | None:
    """What is wrong with the logits that a layer in one launch made, or with its barrier; None where nothing is."""
    want = layer.x.double() @ layer.weights["router"].double().T
    if not torch.allclose(layer.logits.double(), want, rtol=1e-4, atol=1e-4):
        return "its logits differ from the router's"
    if layer.barrier.any():
        return "its barrier is not as the next launch needs it"
    return None


def work(layer: Layer) -> tuple[int, int]:
    """Bytes that must move (weights of the experts in use, x and y) and FLOPs of a run."""
    shape = layer.shape
    counts = layer.slots_of_experts(layer.slot_experts_and_weights()[0])
    used, slots = int((counts > 0).sum()), int(counts.sum())
    weight_bytes = sum(layer.weights[n][0].numel() * layer.weights[n].element_size() for n in ("gate_up", "down"))
    return used * weight_bytes + 4 * layer.num_tokens * shape["hidden"], 6 * slots * shape["hidden"] * shape["inner"]


def measure(machine: Machine, bundle: Path, entry: dict[str, Any], options: Any) -> dict[str, Any]:
    """One layer: its checks, then its times and its peers' for each token count and routing."""
    shape, size = entry["shape"], entry["size"]
    kernels = {name: machine.kernel(bundle / k["file"], k["launch"]) for name, k in entry["kernels"].items()}
    weights = make_weights(shape, machine.device)
    result: dict[str, Any] = {"shape": shape["name"], "size": size, "dtype": shape["dtype"], "faults": [], "rows": []}
    most = entry.get("max_tokens", max(TIMED))
    for n in (n for n in options.checked if n <= most):
        for skew in (0.0, 4.0):
            layer = Layer(entry, kernels, weights, n, machine.blocks)
            fill(layer, skew, seed=n)
            if fault := check(layer):
                result["faults"].append(f"{n} tokens, skew {skew}: {fault}")
    few, many = (MANY, most) if size == "large" and not options.dry_run else (1, FEW if size == "small" else most)
    timed = [n for n in options.tokens if few <= n <= many]
    for n in [] if result["faults"] else timed:
        for skew in SKEWS:
            layer = Layer(entry, kernels, weights, n, machine.blocks)
            fill(layer, skew, seed=n)
            row: dict[str, Any] = {"tokens": n, "skew": skew, "us": machine.time_us(layer.run, graph=True)}
            row["bytes"], row["flops"] = work(layer)
            if shape["dtype"] == "bfloat16" and size != "decode" and (size == "small" or n > FEW):
                row["peers"] = {name: peer_us(name, layer, machine) for name in PEERS}
            result["rows"].append(row)
    return result


def peer_us(name: str, layer: Layer, machine: Machine) -> float | str:
    """A peer's time in microseconds, or why there is none."""
    try:
        step = PEERS[name](layer, lambda s: machine.time_us(s, graph=False, repeats=3))
        error = relative_error(step(), layer.y)
        return machine.time_us(step, graph=name not in WAITING) if error < 0.02 else f"differs by {error:.3g}"
    except Exception as error:  # a peer may fail in its own way: it is reported, ours go on
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, default=Path("gpu-results.json"))
    parser.add_argument("--shapes", nargs="*")
    parser.add_argument("--quick", action="store_true", help="five token counts")
    parser.add_argument("--tokens", type=int, nargs="*", default=None)
    parser.add_argument("--seconds", type=float, default=540, help="start no layer after that")
    parser.add_argument("--dry-run", action="store_true", help="a bundle of emulated kernels, on this machine")
    options = parser.parse_args()
    options.tokens = options.tokens or (DRY if options.dry_run else QUICK if options.quick else TIMED)
    options.checked = DRY if options.dry_run else CHECKED
    began = time.monotonic()
    try:
        manifest = json.loads((options.bundle / "manifest.json").read_text())
        machine: Machine = (Dry if options.dry_run else Gpu)(manifest["arch"])
    except (EngineError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result: dict[str, Any] = {"arch": manifest["arch"], "compiler": manifest["compiler"]} | machine.facts()
    result |= {"ceilings": machine.ceilings(), "layers": [], "left_out": []}
    for entry in manifest["layers"]:
        name = f"{entry['shape']['name']} {entry['size']}"
        if options.shapes and entry["shape"]["name"] not in options.shapes:
            continue
        if time.monotonic() - began > options.seconds:
            result["left_out"].append(name)
            continue
        layer = measure(machine, options.bundle, entry, options)
        result["layers"].append(layer)
        result["seconds"] = round(time.monotonic() - began, 1)
        options.out.write_text(json.dumps(result, indent=1))  # what is known survives a run that is cut off
        report(name, layer)
        machine.done()
    if any(layer["rows"] for layer in result["layers"]):
        options.out.with_suffix(".svg").write_text(draw(result))
    return 1 if any(layer["faults"] for layer in result["layers"]) else 0


def report(name: str, layer: dict[str, Any]) -> None:
    """What was found, a line per token count."""
    print(name, "; ".join(layer["faults"]) or "right", flush=True)
    for row in layer["rows"]:
        rate = f"{row['bytes'] / row['us'] / 1e6:.2f} TB/s {row['flops'] / row['us'] / 1e6:.0f} TFLOP/s"
        print(f"  {row['tokens']:5} tokens skew {row['skew']}: {row['us']:9.1f} us  {rate}  {row.get('peers', '')}")


if __name__ == "__main__":
    sys.exit(main())

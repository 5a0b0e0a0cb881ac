"""Checks and times the bundle on a GPU: every layer against float64, per token count, next to torch's own ways.

    PYTHONPATH=src python benchmarks/gpu/run.py build/gpu-bundle --out results.json [--quick]

Needs a GPU, torch and the driver; no TVM, no compiler. Ceilings (copy, matmul) are measured in the same run. A layer
whose check fails is reported and not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from layer import FP8, Layer, make_weights, reference, relative_error
from peers import PEERS

from moec.passes.ir.gate import GateSpec
from moec.runtime.launch.cuda import CudaError, Driver, Kernel, check_device

# of bfloat16 results (h and, for many tokens, rows before the sum are rounded); e4m3 keeps 3 bits of x, w and h
TOLERANCE = {"bfloat16": 0.008, FP8: 0.08}
CHECKED = (1, 7, 64, 700)
TIMED = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
QUICK = (1, 16, 128, 1024, 8192)
FLUSH_BYTES = 256 << 20  # more than any L2 cache: each repetition finds the weights in memory only


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
    torch.cuda.synchronize()
    if "moe_decode" in layer.kernels and (fault := adopt_routing(layer)):
        return fault
    weights, experts = GateSpec.decode(layer.shape["gate"]).apply(layer.logits.cpu())
    if not torch.equal(experts, layer.experts.cpu()):
        return "the gate chose other experts than its specification"
    if not torch.allclose(weights, layer.route_weights.cpu(), rtol=1e-5, atol=1e-7):
        return "the gate's weights differ from its specification"
    error = relative_error(layer.y, reference(layer))
    limit = TOLERANCE.get(layer.shape["dtype"], TOLERANCE["bfloat16"])  # codes are exact
    return None if error < limit else f"relative error {error:.3g}, expected below {limit}"


def adopt_routing(layer: Layer) -> str | None:
    """The routing of a layer in one launch, which keeps it to itself: from its logits, if these are the router's."""
    want = layer.x.double() @ layer.weights["router"].double().T
    if not torch.allclose(layer.logits.double(), want, rtol=1e-4, atol=1e-4):
        return "its logits differ from the router's"
    if layer.barrier.any():
        return "its barrier is not as the next launch needs it"
    made = GateSpec.decode(layer.shape["gate"]).apply(layer.logits.cpu())
    for mine, right in zip((layer.route_weights, layer.experts), made, strict=True):
        mine.copy_(right)
    return None


def time_us(step: Callable[[], None], flush: torch.Tensor, graph: bool, repeats: int = 15) -> float:
    """Median time of a step in microseconds, caches flushed before each; graph: captured and replayed."""
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step()
        step = captured.replay
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def ceilings(flush: torch.Tensor) -> dict[str, float]:
    """What the machine reaches: bytes/s of a copy (read and write counted), FLOP/s of a bf16 matmul."""
    source, copy = (torch.empty(2 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    copy_us = time_us(lambda: copy.copy_(source), flush, graph=False)
    m = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(m)
    matmul_us = time_us(lambda: torch.mm(m, m, out=out), flush, graph=False)
    return {"copy_bytes_per_s": 2 * (2 << 30) / copy_us * 1e6, "matmul_flop_per_s": 2 * 8192**3 / matmul_us * 1e6}


def work(layer: Layer) -> tuple[int, int]:
    """Bytes that must move (weights of the experts in use, x and y) and FLOPs of a run."""
    shape = layer.shape
    used = len(layer.experts.unique()) + shape["num_shared"]
    values = 3 * shape["hidden"] * shape["inner"]
    weight_bytes = used * sum(layer.weights[name][0].nbytes for name in ("gate_up", "down"))
    return weight_bytes + 4 * layer.num_tokens * shape["hidden"], 2 * layer.slots * values


def measure(driver: Driver, bundle: Path, entry: dict[str, Any], options: Any, flush: torch.Tensor) -> dict[str, Any]:
    """One layer: its checks, then its times and its peers' for each token count and routing."""
    shape, blocks = entry["shape"], torch.cuda.get_device_properties(0).multi_processor_count
    kernels = {
        name: Kernel.load(driver, (bundle / k["file"]).read_bytes(), k["launch"])
        for name, k in entry["kernels"].items()
    }
    weights = make_weights(shape, "cuda")
    result: dict[str, Any] = {"shape": shape["name"], "size": entry["size"], "faults": [], "rows": []}
    most = entry.get("max_tokens", max(TIMED))
    for n in (n for n in CHECKED if n <= most):
        for skew in (0.0, 4.0):
            layer = Layer(entry, kernels, weights, n, blocks)
            fill(layer, skew, seed=n)
            if fault := check(layer):
                result["faults"].append(f"{n} tokens, skew {skew}: {fault}")
    for n in [] if result["faults"] else [n for n in options.tokens if n <= most]:
        for skew in (0.0, 2.0):
            layer = Layer(entry, kernels, weights, n, blocks)
            fill(layer, skew, seed=n)
            if "moe_decode" in kernels:
                layer.run()
                adopt_routing(layer)
            row = {"tokens": n, "skew": skew, "us": time_us(layer.run, flush, graph=True)}
            row["bytes"], row["flops"] = work(layer)
            if shape["dtype"] == "bfloat16":
                row["peers"] = {name: _peer_us(make, layer, flush) for name, make in PEERS.items()}
            result["rows"].append(row)
    return result


def _peer_us(make: Callable[[Layer], Callable[[], Any]], layer: Layer, flush: torch.Tensor) -> float | str:
    """A peer's time, or why there is none."""
    try:
        step = make(layer)
        error = relative_error(step(), layer.y)
        return time_us(step, flush, graph=False) if error < 0.02 else f"differs by {error:.3g}"
    except (RuntimeError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, default=Path("gpu-results.json"))
    parser.add_argument("--shapes", nargs="*")
    parser.add_argument("--quick", action="store_true", help="five token counts")
    parser.add_argument("--tokens", type=int, nargs="*", default=None)
    parser.add_argument("--seconds", type=float, default=540, help="start no layer after that")
    options = parser.parse_args()
    options.tokens = options.tokens or (QUICK if options.quick else TIMED)
    began, manifest = time.monotonic(), json.loads((options.bundle / "manifest.json").read_text())
    try:
        if not torch.cuda.is_available():
            raise CudaError("torch finds no CUDA device; run this on a machine with a GPU")
        check_device(manifest["arch"], torch.cuda.get_device_capability())
        torch.cuda.init()
        torch.zeros(1, device="cuda")  # makes torch's context current
        driver = Driver()
    except CudaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    device = torch.cuda.get_device_properties(0)
    result: dict[str, Any] = {"device": device.name, "torch": torch.__version__, "compiler": manifest["compiler"]}
    result |= {"ceilings": ceilings(flush), "layers": [], "left_out": []}
    for entry in manifest["layers"]:
        name = f"{entry['shape']['name']} {entry['size']}"
        if options.shapes and entry["shape"]["name"] not in options.shapes:
            continue
        if time.monotonic() - began > options.seconds:
            result["left_out"].append(name)
            continue
        layer = measure(driver, options.bundle, entry, options, flush)
        result["layers"].append(layer)
        options.out.write_text(json.dumps(result, indent=1))  # what is known survives a run that is cut off
        print(name, "; ".join(layer["faults"]) or "right", flush=True)
        for row in layer["rows"]:
            rate = f"{row['bytes'] / row['us'] / 1e6:.2f} TB/s {row['flops'] / row['us'] / 1e6:.0f} TFLOP/s"
            print(f"  {row['tokens']:5} tokens skew {row['skew']}: {row['us']:9.1f} us  {rate}  {row.get('peers', '')}")
        torch.cuda.empty_cache()
    return 1 if any(layer["faults"] for layer in result["layers"]) else 0


if __name__ == "__main__":
    sys.exit(main())

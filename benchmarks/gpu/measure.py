"""What run.py's processes do: layers checked against float64, then timed per token count, next to other ways.

What they find are events (supervise.py): of each layer begin, faults, rows, what there was no time for, end.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from budget import Budget, in_order
from layer import FP8, Layer, make_weights, reference, relative_error
from machine import Machine
from peers import PEERS, WAITING

from moec.passes.ir.gate import GateSpec

# of bfloat16 results (h and, for many tokens, rows before the sum are rounded); e4m3 keeps 3 bits of x, w and h
TOLERANCE = {FP8: 0.08}
PLAIN_TOLERANCE = 0.008  # weights that are codes are compared with what the codes mean
CHECKED_SKEWS, SKEWS = (0.0, 4.0), (0.0, 2.0)
FEW, MANY = 256, 32  # what the small kernels are timed to, and the large ones from


@dataclasses.dataclass(frozen=True)
class Plan:
    """checked, timed: token counts. repeats: of each check, with new inputs. dry: every layer does every count."""

    checked: Sequence[int]
    timed: Sequence[int]
    repeats: int = 1
    dry: bool = False

    def of(self, entry: Mapping[str, Any]) -> list[int]:
        """The token counts that a layer is timed at, in the order of their weight."""
        size, most = entry["size"], entry.get("max_tokens", max(self.timed, default=0))
        few, many = (MANY, most) if size == "large" and not self.dry else (1, FEW if size == "small" else most)
        return in_order(n for n in self.timed if few <= n <= many)


def serve(
    machine: Machine, entries: Mapping[int, Mapping[str, Any]], plan: Plan, budget: Budget
) -> Iterator[dict[str, Any]]:
    """The events of all layers. entries: by number. Raises: what a layer raised, after its fault was told."""
    for number, entry in entries.items():
        if budget.begin():
            yield {"begin": number}
            try:
                yield from measure(machine, entry, plan, budget)
            except Exception as error:  # of CUDA: nothing else will work in this process
                yield {"fault": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
                raise
            machine.done()
        yield {"end": number}


def measure(machine: Machine, entry: Mapping[str, Any], plan: Plan, budget: Budget) -> Iterator[dict[str, Any]]:
    """A layer's faults, else its rows, else what there was no time for."""
    kernels = {name: machine.kernel(Path(k["file"]), k["launch"]) for name, k in entry["kernels"].items()}
    weights = make_weights(entry["shape"], machine.device)
    faults = 0
    for n in (n for n in plan.checked if n <= entry.get("max_tokens", n)):
        layer = Layer(entry, kernels, weights, n, machine.blocks)
        for skew, seed in itertools.product(CHECKED_SKEWS, range(plan.repeats)):
            fault = check(filled(layer, skew, seed))
            faults += fault is not None
            yield {"checked": n} if fault is None else {"fault": f"{n} tokens, skew {skew}, seed {seed}: {fault}"}
    for n in [] if faults else plan.of(entry):
        if budget.over():
            yield {"left_out": n}
            continue
        for skew in SKEWS:
            yield {"row": timed(filled(Layer(entry, kernels, weights, n, machine.blocks), skew), skew, machine)}


def filled(layer: Layer, skew: float, seed: int = 0) -> Layer:
    """The layer with random x and logits; skew: how much more the first experts are liked."""
    generator = torch.Generator(layer.x.device).manual_seed(layer.num_tokens + 10000 * seed)
    layer.x.normal_(generator=generator)
    layer.logits.normal_(generator=generator)
    layer.logits += torch.linspace(skew, 0, layer.logits.shape[1], device=layer.logits.device)
    return layer


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


def timed(layer: Layer, skew: float, machine: Machine) -> dict[str, Any]:
    """One row of the results: the layer's time and, where they compete, its peers'."""
    row: dict[str, Any] = {"tokens": layer.num_tokens, "skew": skew, "us": machine.time_us(layer.run, graph=True)}
    row["bytes"], row["flops"] = work(layer)
    size, competes = layer.entry["size"], layer.shape["dtype"] == "bfloat16" and "tuned" not in layer.entry
    if competes and size != "decode" and (size == "small" or layer.num_tokens > FEW):
        row["peers"] = {name: peer_us(name, layer, machine) for name in PEERS}
    return row


def peer_us(name: str, layer: Layer, machine: Machine) -> float | str:
    """A peer's time in microseconds, or why there is none."""
    try:
        step = PEERS[name](layer, lambda s: machine.time_us(s, graph=False, repeats=3))
        error = relative_error(step(), layer.y)
        return machine.time_us(step, graph=name not in WAITING) if error < 0.02 else f"differs by {error:.3g}"
    except Exception as error:  # a peer may fail in its own way: it is reported, ours go on
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

"""What would fit where a plan does not: the most precise format on the mesh, and the smallest mesh for the format."""

from __future__ import annotations

from dataclasses import replace

from moec.passes.hardware.catalogue import DEVICES, named_mesh
from moec.passes.placement.search import PlanRequest, fits
from moec.passes.placement.weight_format import FORMATS

DEVICE_COUNTS = (1, 2, 4, 8, 16, 32)


def fitting_format(request: PlanRequest) -> str | None:
    """The format of most bits, other than the one asked for, in which the model fits the mesh; None where none does."""
    narrower = (f for f in FORMATS.values() if f.bits < request.weights.bits)
    for weights in sorted(narrower, key=lambda f: -f.bits):
        if fits(replace(request, weights=weights, strategy=None)):
            return weights.name
    return None


def fitting_meshes(request: PlanRequest) -> list[str]:
    """The smallest mesh of the request's own device, and of each other accelerator, on which the model fits in the
    format."""
    found = []
    own = request.mesh.devices[0].name
    for device in [own, *(d for d in DEVICES if d not in (own, "cpu"))]:
        if device not in DEVICES:
            continue
        meshes = [named_mesh(f"{device}x{n}" if n <= 8 else f"{device}x8x{n // 8}") for n in DEVICE_COUNTS]
        room = request.shape.total_params() * request.weights.bits / 8
        for mesh in (m for m in meshes if sum(d.memory_bytes for d in m.devices) > room):
            if fits(replace(request, mesh=mesh, strategy=None)):
                found.append(mesh.name)
                break
    return found

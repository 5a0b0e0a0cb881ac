"""Named devices and meshes, and meshes read from a dictionary that a user wrote."""

from __future__ import annotations

import math
import re

from moec.passes.hardware import links
from moec.passes.hardware.a100 import A100_80G
from moec.passes.hardware.b200 import B200
from moec.passes.hardware.cpu_amx import CPU_AMX_2CORE
from moec.passes.hardware.device import Device
from moec.passes.hardware.errors import MeshError
from moec.passes.hardware.h100 import H100
from moec.passes.hardware.h200 import H200
from moec.passes.hardware.l40s import L40S
from moec.passes.hardware.mesh import Link, Mesh
from moec.passes.hardware.rtx4090 import RTX4090
from moec.passes.hardware.rtx6000pro import RTX6000PRO

DEVICES = {d.name: d for d in (RTX4090, A100_80G, L40S, H100, H200, B200, RTX6000PRO, CPU_AMX_2CORE)}
INSIDE_LINK = {
    "rtx4090": links.PCIE4_X16,
    "a100": links.NVLINK3,
    "l40s": links.PCIE4_X16,
    "h100": links.NVLINK4,
    "h200": links.NVLINK4,
    "b200": links.NVLINK5,
    "rtx6000pro": links.PCIE5_X16,
    "cpu": links.SHARED_MEMORY,
}
MAX_DEVICES = 1024


def named_mesh(name: str) -> Mesh:
    """The mesh called `name`, in any case: DEVICExN (one node) or DEVICExNxM (M nodes of N), for example "
    "rtx4090x8 or h100x8x2."""
    found = re.fullmatch(rf"({'|'.join(DEVICES)})(?:x(\d{{1,4}}))?(?:x(\d{{1,4}}))?", name.lower())
    if found is None:
        known = ", ".join(f"{d}xN" for d in DEVICES)
        raise MeshError(f"mesh '{name}': unknown; expected one of {known}, DEVICExNxNODES, or a mesh file (.json)")
    device_name, per_node, nodes = found[1], int(found[2] or 1), int(found[3] or 1)
    if per_node < 1 or nodes < 1:
        raise MeshError(f"mesh '{name}': no devices; expected counts of at least 1")
    if per_node * nodes > MAX_DEVICES:
        raise MeshError(f"mesh '{name}': {per_node * nodes} devices; expected at most {MAX_DEVICES}")
    device = DEVICES[device_name]
    between = links.INFINIBAND_NDR if nodes > 1 else None
    return Mesh(name, (device,) * (per_node * nodes), INSIDE_LINK[device_name], between, per_node if nodes > 1 else 0)


def mesh_from_dict(data: object, where: str) -> Mesh:
    """A mesh from parsed JSON; see docs/placement.md for the fields.

    Args:
        data: {"name", "devices": [name | {"name", "memory_gib", "bytes_per_s", "flops": {..}} ..],
            "inside": {"kind", "latency_s", "bytes_per_s"}, and for several nodes "between" and "devices_per_node"}.
        where: how messages call the source, usually the file name.

    Raises:
        MeshError: a field is missing, of the wrong type, negative or not finite.
    """
    if not isinstance(data, dict):
        raise MeshError(f"{where}: expected an object with name, devices and inside, got {type(data).__name__}")
    entries = _field(data, "devices", list, where)
    if not entries or len(entries) > MAX_DEVICES:
        raise MeshError(f"{where}: devices has {len(entries)} entries; expected 1 to {MAX_DEVICES}")
    devices = tuple(_device(entry, f"{where}: devices[{i}]") for i, entry in enumerate(entries))
    inside = _link(_field(data, "inside", dict, where), f"{where}: inside")
    if "between" not in data:
        return Mesh(_field(data, "name", str, where), devices, inside)
    per_node = _field(data, "devices_per_node", int, where)
    if per_node < 1 or len(devices) % per_node:
        raise MeshError(f"{where}: devices_per_node is {per_node}; expected a divisor of the {len(devices)} devices")
    between = _link(_field(data, "between", dict, where), f"{where}: between")
    return Mesh(_field(data, "name", str, where), devices, inside, between, per_node)


def mesh_to_dict(mesh: Mesh) -> dict[str, object]:
    """The JSON form of `mesh`, which mesh_from_dict reads back."""
    out: dict[str, object] = {
        "name": mesh.name,
        "devices": [_device_dict(d) for d in mesh.devices],
        "inside": _link_dict(mesh.inside),
    }
    if mesh.between is not None:
        out |= {"between": _link_dict(mesh.between), "devices_per_node": mesh.node_size}
    return out


def _device(entry: object, where: str) -> Device:
    if isinstance(entry, str):
        if entry not in DEVICES:
            raise MeshError(f"{where}: unknown device '{entry}'; expected one of {', '.join(DEVICES)} or an object")
        return DEVICES[entry]
    if not isinstance(entry, dict):
        raise MeshError(f"{where}: expected a device name or an object, got {type(entry).__name__}")
    rates = _field(entry, "flops", dict, where)
    if "bf16" not in rates:
        raise MeshError(f"{where}: flops has no 'bf16'; it is the rate that other formats fall back to")
    memory = entry["memory_bytes"] if "memory_bytes" in entry else _positive(entry, "memory_gib", where) * 2**30
    flops = {str(k): _positive(rates, k, f"{where}: flops") for k in rates}
    source = str(entry.get("source", where))
    if not isinstance(memory, int | float) or isinstance(memory, bool) or not 0 < memory < 2**60:
        raise MeshError(f"{where}: memory_bytes is {memory!r}; expected a positive number of bytes")
    return Device(_field(entry, "name", str, where), int(memory), _positive(entry, "bytes_per_s", where), flops, source)


def _link(entry: dict[str, object], where: str) -> Link:
    kind = _field(entry, "kind", str, where)
    kinds = ("nvlink", "pcie", "network", "shared-memory")
    if kind not in kinds:
        raise MeshError(f"{where}: kind is '{kind}'; expected one of {', '.join(kinds)}")
    source = str(entry.get("source", where))
    return Link(kind, _positive(entry, "latency_s", where), _positive(entry, "bytes_per_s", where), source)


def _field(data: dict, key: str, kind: type, where: str):  # type: ignore[no-untyped-def]
    if key not in data:
        raise MeshError(
            f"{where}: field '{key}' is missing; the file has {', '.join(sorted(map(str, data))) or 'no fields'}"
        )
    value = data[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise MeshError(f"{where}: field '{key}' is {value!r}; expected {kind.__name__}")
    return value


def _positive(data: dict, key: str, where: str) -> float:
    value = data.get(key)
    if key not in data:
        raise MeshError(f"{where}: field '{key}' is missing; expected a positive number")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise MeshError(f"{where}: field '{key}' is {value!r}; expected a positive number")
    return float(value)


def _device_dict(device: Device) -> dict[str, object]:
    return {
        "name": device.name,
        "memory_bytes": device.memory_bytes,
        "bytes_per_s": device.bytes_per_s,
        "flops": dict(device.flops),
        "source": device.source,
    }


def _link_dict(link: Link) -> dict[str, object]:
    return {"kind": link.kind, "latency_s": link.latency_s, "bytes_per_s": link.bytes_per_s, "source": link.source}

"""Meshes by name and from dictionaries: what is accepted, and one clear line for each mistake."""

from __future__ import annotations

import copy
import json

import pytest

from moec.passes.hardware.catalogue import DEVICES, mesh_from_dict, mesh_to_dict, named_mesh
from moec.passes.hardware.errors import MeshError

MESH = {
    "name": "mine",
    "devices": ["rtx4090", {"name": "old", "memory_gib": 16, "bytes_per_s": 5e11, "flops": {"bf16": 5e13}}],
    "inside": {"kind": "pcie", "latency_s": 5e-5, "bytes_per_s": 1.5e10},
}


def changed(path: str, value: object) -> dict:
    """MESH with one field replaced, or removed where value is None."""
    mesh = copy.deepcopy(MESH)
    *parents, last = [int(k) if k.isdigit() else k for k in path.split(".")]
    at = mesh
    for key in parents:
        at = at[key]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return mesh


def test_named_meshes():
    assert named_mesh("rtx4090x8").num_devices == 8
    two = named_mesh("h100x8x2")
    assert (two.num_devices, two.node_size) == (16, 8)
    assert two.link_for(8).kind == "nvlink"
    assert two.link_for(16).kind == "network"
    assert two.slice(0, 8).between is None
    assert two.slice(4, 8).link_for(8).kind == "nvlink" or two.slice(4, 8).between is not None


def test_every_number_has_a_source():
    for device in DEVICES.values():
        assert len(device.source) > 20
        assert named_mesh(device.name).inside.source


@pytest.mark.parametrize("name", ["rtx4091x8", "h100x0", "h100x8x2x2", "", "x8", "h100x9999"])
def test_unknown_mesh_name(name):
    with pytest.raises(MeshError, match="mesh '"):
        named_mesh(name)


def test_mesh_file_round_trip():
    mesh = mesh_from_dict(MESH, "mine.json")
    assert not mesh.is_uniform
    again = mesh_from_dict(json.loads(json.dumps(mesh_to_dict(mesh))), "again")
    assert again.devices == mesh.devices
    assert again.inside == mesh.inside


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("inside", None, "mine.json: field 'inside' is missing"),
        ("inside.bytes_per_s", None, "mine.json: inside: field 'bytes_per_s' is missing"),
        ("inside.bytes_per_s", -1.0, "field 'bytes_per_s' is -1.0; expected a positive number"),
        ("inside.bytes_per_s", float("nan"), "expected a positive number"),
        ("inside.bytes_per_s", True, "expected a positive number"),
        ("inside.kind", "rope", "kind is 'rope'; expected one of nvlink, pcie"),
        ("devices", [], "devices has 0 entries"),
        ("devices", "rtx4090", "expected list"),
        ("devices.0", "rtx4091", "unknown device 'rtx4091'"),
        ("devices.1.flops", {}, "flops has no 'bf16'"),
        ("devices.1.memory_gib", 0, "'memory_gib' is 0"),
        ("devices.1.bytes_per_s", "fast", "'bytes_per_s' is 'fast'"),
        ("name", 3, "field 'name' is 3; expected str"),
    ],
)
def test_bad_mesh_file(path, value, message):
    with pytest.raises(MeshError) as error:
        mesh_from_dict(changed(path, value), "mine.json")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_nodes_must_divide_devices():
    mesh = MESH | {"devices": ["h100"] * 6, "between": MESH["inside"] | {"kind": "network"}, "devices_per_node": 4}
    with pytest.raises(MeshError, match="devices_per_node is 4; expected a divisor of the 6 devices"):
        mesh_from_dict(mesh, "mine.json")


def test_a_mesh_file_must_be_an_object():
    with pytest.raises(MeshError, match="expected an object"):
        mesh_from_dict([1, 2], "mine.json")

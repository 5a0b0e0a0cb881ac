"""Devices joined by links: the machine that a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moec.passes.hardware.device import Device


@dataclass(frozen=True)
class Link:
    """One class of links between devices.

    Args:
        kind: "nvlink", "pcie", "network" or "shared-memory"; the fitted efficiencies are kept per kind.
        latency_s: time of an 8-byte all-reduce over the devices that the link joins.
        bytes_per_s: published peak per device and direction; the cost model multiplies it by the kind's efficiency.
        source: where the figures were read.
    """

    kind: str
    latency_s: float
    bytes_per_s: float
    source: str


@dataclass(frozen=True)
class Mesh:
    """Devices in rank order, `devices_per_node` of them to a node.

    Args:
        inside: the link between devices of one node.
        between: the link between nodes; None where there is one node only.
    """

    name: str
    devices: tuple[Device, ...]
    inside: Link
    between: Link | None = None
    devices_per_node: int = 0

    @property
    def num_devices(self) -> int:
        """Over all nodes."""
        return len(self.devices)

    @property
    def node_size(self) -> int:
        """Devices per node; the whole mesh where it is one node."""
        return self.devices_per_node or len(self.devices)

    def slice(self, start: int, count: int) -> Mesh:
        """The sub-mesh of `count` devices from `start`; it keeps a node boundary only if it spans one."""
        end_node = (start + count - 1) // self.node_size
        spans = start // self.node_size != end_node
        return replace(
            self,
            name=f"{self.name}[{start}:{start + count}]",
            devices=self.devices[start : start + count],
            between=self.between if spans else None,
            devices_per_node=self.node_size if spans else 0,
        )

    def link_for(self, num_ranks: int) -> Link:
        """The slowest link that a collective over `num_ranks` neighbouring ranks crosses."""
        if self.between is not None and num_ranks > self.node_size:
            return self.between
        return self.inside

    @property
    def is_uniform(self) -> bool:
        """Whether all devices are of one kind."""
        return all(device == self.devices[0] for device in self.devices)

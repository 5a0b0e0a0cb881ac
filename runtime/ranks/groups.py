"""Groups of ranks over torch.distributed, whose waits end when a rank is lost.

Tensors travel as bytes, so that every dtype does. Process groups are made from a store directly: the process's own
torch.distributed groups, if it has any, are left alone. gloo on CPUs is tested; the NCCL branch has not been run.
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moec.runtime.errors import RankError
from moec.runtime.options import network_interface
from moec.runtime.ranks.watch import Failure, Watch

POLL = datetime.timedelta(milliseconds=100)
LINGER_S = 60.0
"""Collectives themselves time out so long after the watch would have ended them."""
_PATIENCE = "Operation timed out!"


class Pending:
    """A collective under way. finish: what it gives once the work is done. kept: memory that it reads or writes."""

    __slots__ = ("finish", "group", "kept", "where", "work")

    def __init__(
        self, group: Group, work: Any, where: str, finish: Callable[[], Tensor], kept: tuple[Tensor, ...] = ()
    ) -> None:
        self.group, self.work, self.where, self.finish, self.kept = group, work, where, finish, kept

    def wait(self) -> Tensor:
        """Raises: RankError: a rank is lost."""
        if self.work is not None:
            self.group.wait(self.work, self.where)
        return self.finish()


class Group:
    """Ranks that run collectives together. index: this rank's place among them."""

    def __init__(self, name: str, ranks: Sequence[int], rank: int, process_group: Any, watch: Watch) -> None:
        self.name, self.ranks, self.index = name, tuple(ranks), list(ranks).index(rank)
        self.process_group, self.watch = process_group, watch

    def all_gather(self, out: Tensor, x: Tensor) -> Any:
        """Starts it. x: uint8[n]. out: uint8[R * n]."""
        self.watch.issue(self.name)
        return self.process_group._allgather_base(out, x)

    def all_to_all(self, out: Tensor, x: Tensor, received: list[int], sent: list[int]) -> Any:
        """Starts it. x: uint8[S, n], out: uint8[S', n], in rows of each rank."""
        self.watch.issue(self.name)
        return self.process_group.alltoall_base(out, x, received, sent)

    def broadcast(self, x: Tensor, root: int) -> Any:
        """Starts it: x of the rank at index root becomes everyone's."""
        self.watch.issue(self.name)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        return self.process_group.broadcast([x], options)

    def close(self) -> None:
        """Ends the group's threads, for which there must be no collective under way; nothing can be started any more.

        A thread that still holds a tensor when the interpreter ends asks it for a lock and takes the process down.
        """
        self.process_group = None

    def wait(self, work: Any, where: str) -> None:
        """Raises: RankError: a rank is lost."""
        self.watch.enter(where, self.name)
        while True:
            try:
                work.wait(POLL)
            except RuntimeError as error:
                if not str(error).startswith(_PATIENCE):
                    raise self._lost(error) from error
                self.watch.check()
            else:
                self.watch.leave()
                return

    def _lost(self, error: RuntimeError) -> RankError:
        """A connection broke: the watch knows, or soon will, whose."""
        if not self.watch.wait_failure(2.0) or self.watch.failure is None:
            line = str(error).strip().splitlines()[0]
            return self.watch.error(Failure(self.watch.rank, f"lost a connection of {self.name} ({line})"))
        return self.watch.error(self.watch.failure)


def connect_groups(
    store: Any, rank: int, groups: Mapping[str, Sequence[int]], device: str, local: bool, watch: Watch
) -> dict[str, Group]:
    """Connects the groups that this rank is in, all ranks in one order.

    Args: device: "cpu" or "cuda".  local: all ranks are on this machine.
    Raises: RankError: a rank is lost meanwhile.
    """
    made: dict[str, Group] = {}
    errors: list[Exception] = []
    seconds = watch.limits.stall_s + LINGER_S

    def connect() -> None:
        try:
            for name, ranks in sorted(groups.items()):
                own = dist.PrefixStore(f"{name}/{'-'.join(map(str, ranks))}", store)
                process_group = _process_group(own, list(ranks).index(rank), len(ranks), device, local, seconds)
                made[name] = Group(name, ranks, rank, process_group, watch)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.05)
        watch.check()
    if errors:
        if watch.wait_failure(2.0):
            watch.check()
        raise RankError(f"rank {rank} cannot connect to its groups: {str(errors[0]).splitlines()[0]}") from errors[0]
    return made


def _process_group(store: Any, index: int, size: int, device: str, local: bool, seconds: float) -> Any:
    timeout = datetime.timedelta(seconds=seconds)
    if device == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, index, size, options)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs lack it
    options._timeout = timeout
    options._devices = [_gloo_device(local)]
    return dist.ProcessGroupGloo(store, index, size, options)


def _gloo_device(local: bool) -> Any:
    """What gloo listens on: the loopback interface, the one that GLOO_SOCKET_IFNAME names, or that of the host."""
    interface = network_interface()
    if local:
        return dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")
    if interface is not None:  # groups that are made from a store do not look at the variable themselves
        return dist.ProcessGroupGloo.create_device(interface=interface)
    return dist.ProcessGroupGloo.create_default_device()


def as_bytes(x: Tensor) -> Tensor:
    """x as uint8[n]; its own memory where it is contiguous."""
    return x.contiguous().view(-1).view(torch.uint8)


def from_bytes(raw: Tensor, like: Tensor, shape: Sequence[int]) -> Tensor:
    """uint8[n] as a tensor of another's dtype."""
    return raw.view(like.dtype).view(shape)

"""How the processes of a placed engine find each other, and make sure that they run the same engine.

Rank 0 listens on a port of its own; its address stands in a torch.distributed store, to which all ranks can connect.
Each other rank says what it runs; where one differs, all refuse to start and say which. Rank 0 either starts the others
itself (start_world), or all were started by torchrun or a scheduler (join_world).
"""

from __future__ import annotations

import datetime
import itertools
import json
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moec.runtime.errors import RankError
from moec.runtime.loader import DIGEST
from moec.runtime.options import RankLimits, master_of_environment, rank_environment
from moec.runtime.ranks.watch import Hub, Spoke
from moec.runtime.ranks.wire import Wire

LOCAL = ("127.0.0.1", "localhost", "::1")
HUB = "hub"
_worlds = itertools.count()


class World:
    """All ranks of one engine, as one of them sees it. watch: a Hub on rank 0, else a Spoke."""

    def __init__(self, rank: int, num_ranks: int, store: Any, local: bool, watch: Hub | Spoke) -> None:
        self.rank, self.num_ranks, self.store, self.local, self.watch = rank, num_ranks, store, local, watch
        self.processes: list[subprocess.Popen[bytes]] = []

    @property
    def hub(self) -> Hub:
        """Raises: RankError: this is not rank 0."""
        if not isinstance(self.watch, Hub):
            raise RankError(f"rank {self.rank} takes its work from rank 0: call serve() here")
        return self.watch

    @property
    def spoke(self) -> Spoke:
        """Raises: RankError: this is rank 0."""
        if not isinstance(self.watch, Spoke):
            raise RankError("rank 0 gives the work: call generate, stream or step here, and serve() on other ranks")
        return self.watch

    def close(self) -> None:
        """Ends the world: other ranks go home, processes that rank 0 started are gone afterwards."""
        if isinstance(self.watch, Hub) and not self.watch.closing:
            self.watch.close()
            stop_processes(self.processes, 5.0 if self.watch.failure is None else 0.0)
            self.watch.disconnect()


def identity(manifest: dict[str, Any], num_ranks: int) -> dict[str, Any]:
    """What all ranks must have in common."""
    order = manifest["placement"]["order_sha256"]
    return {"engine digest": manifest[DIGEST], "order of collectives": order, "number of ranks": num_ranks}


def start_world(directory: Path, manifest: dict[str, Any], limits: RankLimits) -> World:
    """Starts the other ranks as processes of this machine; this process is rank 0.

    Raises: RankError: one ended, or did not come within limits.join_s; none is left over then.
    """
    count = manifest["ranks"]
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = dist.PrefixStore("moec-0", server)  # what join_world calls the first world of a process
    processes: list[subprocess.Popen[bytes]] = []
    listener, token = _open_hub(store, "127.0.0.1")
    try:
        for rank in range(1, count):
            command = [sys.executable, "-m", "moec.runtime.ranks.worker", str(directory)]
            environment = rank_environment(rank, count, server.port)
            processes.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE))
        ended = _ended_by(processes)
        wires = _welcome(listener, token, identity(manifest, count), limits.join_s, ended)
    except BaseException:
        stop_processes(processes, 1.0)
        raise
    finally:
        listener.close()
    world = World(0, count, store, True, Hub(wires, limits, _members(manifest), _ended_text(ended)))
    world.processes = processes
    return world


def join_world(rank: int, manifest: dict[str, Any], limits: RankLimits) -> World:
    """Joins ranks that others started: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are in the environment.

    Raises: RankError: a rank runs another engine, or did not come within limits.join_s.
    """
    host = master_of_environment()
    timeout = datetime.timedelta(seconds=limits.join_s)
    try:
        store, rank, count = next(dist.rendezvous("env://", rank, timeout=timeout))
    except (RuntimeError, ValueError) as error:
        raise RankError(f"rank {rank} cannot reach the ranks' store: {str(error).splitlines()[0]}") from error
    own, local = dist.PrefixStore(f"moec-{next(_worlds)}", store), host in LOCAL
    mine = identity(manifest, count)
    if rank != 0:
        wire = _greet(own, rank, mine, limits)
        return World(rank, count, own, local, Spoke(rank, wire, limits))
    listener, token = _open_hub(own, "127.0.0.1" if local else host)
    with listener:
        wires = _welcome(listener, token, mine, limits.join_s, lambda rank: None)
    _check_count(manifest, count)
    return World(0, count, own, local, Hub(wires, limits, _members(manifest), lambda r: "ended: its connection closed"))


def _members(manifest: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    groups = {(name, tuple(ranks)) for e in manifest["placement"]["ranks"] for name, ranks in e["groups"].items()}
    return sorted(groups)


def _check_count(manifest: dict[str, Any], count: int) -> None:
    if count != manifest["ranks"]:
        raise RankError(f"the engine is for {manifest['ranks']} ranks, {count} were started; start as many")


def _open_hub(store: Any, host: str) -> tuple[socket.socket, str]:
    """Listens, and says in the store where. -> the socket, and a token that ranks must show."""
    listener = socket.create_server((host if host in LOCAL else "", 0))
    token = secrets.token_hex(16)
    store.set(HUB, json.dumps({"host": host, "port": listener.getsockname()[1], "token": token}))
    return listener, token


def _greet(store: Any, rank: int, mine: dict[str, Any], limits: RankLimits) -> Wire:
    """Connects to rank 0 and says who this is. Raises: RankError: rank 0 is not there, or refuses."""
    try:
        hub = json.loads(store.get(HUB))
        wire = Wire(socket.create_connection((hub["host"], hub["port"]), limits.join_s))
    except (RuntimeError, OSError) as error:
        raise RankError(f"rank {rank} cannot reach rank 0: {str(error).splitlines()[0]}") from error
    wire.send({"rank": rank, "token": hub["token"], "identity": mine})
    answer = wire.receive()
    if answer is None:
        raise RankError(f"rank {rank}: rank 0 ended before all ranks had come")
    if "refused" in answer:
        raise RankError(answer["refused"])
    return wire


def _welcome(
    listener: socket.socket, token: str, mine: dict[str, Any], seconds: float, ended: Callable[[int], str | None]
) -> dict[int, Wire]:
    """Takes in all other ranks and tells them whether they may start -> connections by rank.

    Raises: RankError: one differs, is missing after `seconds`, or ended.
    """
    wires: dict[int, Wire] = {}
    problems: list[str] = []
    deadline = time.monotonic() + seconds
    listener.settimeout(0.1)
    wanted = set(range(1, mine["number of ranks"]))
    while wanted - wires.keys() and not problems:
        gone = [(r, how) for r in sorted(wanted - wires.keys()) if (how := ended(r)) is not None]
        problems += [f"rank {r} {how} before it joined" for r, how in gone]
        if time.monotonic() > deadline:
            problems.append(f"ranks {sorted(wanted - wires.keys())} did not come within {seconds:g} s")
        try:
            wire = Wire(listener.accept()[0])
        except TimeoutError:
            continue
        hello = wire.receive() or {}
        if hello.get("token") != token:
            wire.close()
            continue
        rank = hello["rank"]
        if rank in wires or rank not in wanted:
            problems.append(f"rank {rank} came twice or is none of {mine['number of ranks']} ranks")
        wires[rank] = wire
        problems += _differences(rank, hello["identity"], mine)
    for wire in wires.values():
        wire.send({"refused": "; ".join(problems)} if problems else {"welcome": True})
    if problems:
        raise RankError("; ".join(problems))
    return wires


def _differences(rank: int, theirs: dict[str, Any], mine: dict[str, Any]) -> list[str]:
    def short(value: Any) -> str:
        return f"{value[:12]}.." if isinstance(value, str) else str(value)

    return [
        f"rank {rank} has another {name} than rank 0: {short(theirs.get(name))}, not {short(value)}; give all ranks "
        "the same engine"
        for name, value in mine.items()
        if theirs.get(name) != value
    ]


def _ended_by(processes: list[subprocess.Popen[bytes]]) -> Callable[[int], str | None]:
    """How a started rank's process ended; None while it runs."""

    def ended(rank: int) -> str | None:
        code = processes[rank - 1].poll()
        if code is None:
            return None
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    return ended


def _ended_text(ended: Callable[[int], str | None]) -> Callable[[int], str]:
    def text(rank: int) -> str:
        for _ in range(20):  # a connection closes a moment before its process can be waited for
            how = ended(rank)
            if how is not None:
                return how
            time.sleep(0.01)
        return "ended: its connection closed"

    return text


def stop_processes(processes: list[subprocess.Popen[bytes]], patience_s: float) -> None:
    """Waits for processes to end by themselves, then kills those that are left."""
    deadline = time.monotonic() + patience_s
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()

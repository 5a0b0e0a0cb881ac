"""Rank 0's watch: which rank it blames, what it tells the others. The other ranks are wires that the test speaks on."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from moec.runtime.errors import RankError
from moec.runtime.options import RankLimits
from moec.runtime.ranks.watch import Hub
from moec.runtime.ranks.wire import Wire

MEMBERS = [("all", (0, 1, 2)), ("pair", (1, 2))]


def connection() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        mine = socket.create_connection(listener.getsockname())
        return mine, listener.accept()[0]


@pytest.fixture
def world():
    """A function of limits -> a hub and the other ends of the wires of ranks 1 and 2."""
    made = []

    def make(**limits):
        ends = {rank: connection() for rank in (1, 2)}
        wires = {rank: Wire(mine) for rank, (mine, _) in ends.items()}
        others = {rank: Wire(theirs) for rank, (_, theirs) in ends.items()}
        hub = Hub(wires, RankLimits(**limits), MEMBERS, lambda rank: "was killed by signal 9")
        made.append(hub)
        return hub, others

    yield make
    for hub in made:
        hub.close()
        hub.disconnect()


def beat(wires, states, stop):
    """Speaks for ranks 1 and 2 until told to stop."""
    while not stop.is_set():
        for rank, (group, waited, counts) in states.items():
            wires[rank].send({"beat": rank, "group": group, "waited": waited, "counts": counts})
        time.sleep(0.05)


def told(wire):
    """The failure that a rank hears of."""
    while "failed" not in (message := wire.receive()):
        pass
    return message


def test_a_closed_connection_names_its_rank(world):
    hub, others = world()
    hub.enter("layer 3, all_reduce of all (node x)", "all")
    others[2].close()
    assert hub.wait_failure(30)
    with pytest.raises(RankError, match=r"^rank 2 was killed by signal 9; rank 0 was at: layer 3, all_reduce of all"):
        hub.check()
    assert told(others[1]) == {"failed": 2, "reason": "was killed by signal 9"}


def test_silence_names_its_rank(world):
    hub, others = world(silent_s=1.0)
    stop = threading.Event()
    threading.Thread(target=beat, args=(others, {1: ("", 0.0, {})}, stop), daemon=True).start()
    assert hub.wait_failure(30)
    stop.set()
    assert hub.failure.rank == 2 and "no heartbeat for 1 s" in hub.failure.reason


@pytest.mark.parametrize(
    ("states", "blamed"),
    [
        ({1: ("pair", 9.0, {"pair": 5}), 2: ("", 0.0, {"pair": 4})}, 2),  # rank 1 waits for rank 2, which computes
        # rank 1 waits for rank 2, and that for rank 0
        ({1: ("pair", 9.0, {"pair": 5}), 2: ("all", 9.0, {"pair": 4, "all": 7})}, 0),
    ],
)
def test_the_rank_that_others_wait_for_is_blamed(world, states, blamed):
    hub, others = world(stall_s=5.0)
    stop = threading.Event()
    threading.Thread(target=beat, args=(others, states, stop), daemon=True).start()
    assert hub.wait_failure(30)
    stop.set()
    assert hub.failure.rank == blamed and "did not come to a collective" in hub.failure.reason


def test_the_first_failure_stays(world):
    hub, others = world()
    others[1].send({"failed": 1, "reason": "failed: no memory"})
    assert hub.wait_failure(30)
    others[1].close()
    others[2].close()
    time.sleep(0.2)
    assert (hub.failure.rank, hub.failure.reason) == (1, "failed: no memory")


def test_limits_come_from_the_environment(monkeypatch):
    from moec.runtime.errors import InputError

    monkeypatch.setenv("MOEC_RANK_SILENT_S", "2.5")
    assert RankLimits.of_environment() == RankLimits(silent_s=2.5)
    for bad in ("soon", "0", "-1"):
        monkeypatch.setenv("MOEC_RANK_SILENT_S", bad)
        with pytest.raises(InputError, match="MOEC_RANK_SILENT_S"):
            RankLimits.of_environment()

"""Writers that are killed at random moments lose nothing that was acknowledged, and repeat one measurement at most.

`make tune-kills` runs the long one; `python tests/compiler/tune/test_database_kills.py 200` kills 200 times.
"""

import collections
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moec.compiler.tune.database import Database

pytestmark = pytest.mark.null
WRITER = Path(__file__).parents[2] / "support" / "tuning.py"
LONGEST_S = 0.25  # a writer lives up to that long after its start, in which it imports, opens and writes


def kill_writers(folder, kills, seed, num_writers=3):
    """Kills and restarts writers -> (acknowledged, measured per number, kept numbers)."""
    rng, path, journal = random.Random(seed), folder / "tuning.db", folder / "journal"
    journal.touch()

    def start(worker):
        return subprocess.Popen([sys.executable, str(WRITER), str(path), str(journal), f"worker-{worker}"])

    writers = [start(w) for w in range(num_writers)]
    try:
        while b"acked" not in journal.read_bytes():  # the first start is slow
            assert all(w.poll() is None for w in writers)
            time.sleep(0.01)
        for _ in range(kills):
            time.sleep(rng.uniform(0, LONGEST_S))
            victim = rng.randrange(num_writers)
            assert writers[victim].poll() is None, "a writer ended by itself"
            writers[victim].send_signal(signal.SIGKILL)
            writers[victim].wait()
            writers[victim] = start(victim)
        time.sleep(LONGEST_S * 4)  # the last ones take over what was left
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    lines = [line.split() for line in journal.read_text().splitlines()]
    acked = {int(n) for what, n, _ in lines if what == "acked"}
    measured = collections.Counter(int(n) for what, n, _ in lines if what == "measured")
    with Database(path) as database:
        kept = [r.config["tile"] for r in database.records()]
    by_process = collections.Counter(pid for what, _, pid in lines if what == "measured")
    by_process.subtract(collections.Counter(pid for what, _, pid in lines if what == "acked"))
    return acked, measured, kept, by_process


def check(folder, kills, seed):
    acked, measured, kept, open_by_process = kill_writers(folder, kills, seed)
    assert len(acked) > kills, "too few writes for the kills to hit any"
    assert acked <= set(kept), f"lost: {sorted(acked - set(kept))}"
    assert len(kept) == len(set(kept)), "a candidate has two records"
    assert set(open_by_process.values()) <= {0, 1}, "a killed worker left more than one measurement without a record"
    repeated = sum(measured.values()) - len(measured)
    assert repeated <= kills, f"{repeated} measurements repeated by {kills} kills"
    return len(acked), repeated


def test_few_kills(tmp_path):
    check(tmp_path, kills=6, seed=os.getpid())


@pytest.mark.slow
def test_sixty_kills(tmp_path):
    check(tmp_path, kills=60, seed=os.getpid())


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        number = int(sys.argv[1])
        told = check(Path(made), number, seed=0)
        print(f"{number} kills of 3 writers: {told[0]} acknowledged records, 0 lost, {told[1]} measurements repeated")

"""The tuning database: what it keeps, whom it lets measure, and what it says when it cannot go on."""

import dataclasses
import multiprocessing
import os
import resource
import sqlite3
import subprocess
import sys
import time

import pytest
from tuning import a_key, a_record

from moec.compiler.tune import database as database_module
from moec.compiler.tune.database import Database
from moec.compiler.tune.errors import DatabaseError
from moec.compiler.tune.record import config_hash
from moec.compiler.tune.schema import SCHEMA_VERSION

pytestmark = pytest.mark.null


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tuning.db"


def in_child(function, *arguments):
    """Runs a function in a forked child -> what it returns, or the text of the DatabaseError that it raises."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def run():
        try:
            there.send(function(*arguments))
        except DatabaseError as error:
            there.send(str(error))

    child = context.Process(target=run)
    child.start()
    there.close()
    answer = here.recv()
    child.join()
    return answer


def test_records_come_back_in_the_order_of_adding(path):
    other = a_key(tokens=64)
    with Database(path) as database:
        for record in (a_record(3), a_record(1), a_record(2, other, status="wrong", reason="0.3 off", ratio=None)):
            database.add(record)
    with Database(path) as database:
        assert database.records() == [
            a_record(3),
            a_record(1),
            a_record(2, other, status="wrong", reason="0.3 off", ratio=None),
        ]
        assert database.records(a_key()) == [a_record(3), a_record(1)]
        assert database.records(status="wrong")[0].key == other == database.records(tokens=64)[0].key
        assert database.records(config={"kernel": "k", "tile": 1}) == [a_record(1)]
        assert database.keys() == [a_key(), other]
        with pytest.raises(ValueError, match="no field 'speed'"):
            database.records(speed=3)


def test_the_same_measurement_is_kept_once(path):
    with Database(path) as database:
        assert database.add_all([a_record(1), a_record(2), a_record(1)]) == 2
        database.add(a_record(2))
        assert len(database.records()) == 2


def test_winners(path):
    key, other = a_key(), a_key(tokens=64)
    with Database(path) as database:
        assert database.winner(key) is None
        database.add(a_record(1))
        database.set_winner(key, a_record(1))
        database.set_winner(key, a_record(5))  # not there yet
        database.add(a_record(6, other, is_winner=True))
        assert database.winner(key) == a_record(5, is_winner=True)
        assert [r.config["tile"] for r in database.records(is_winner=True)] == [5, 6]
        assert len(database.records(key)) == 2
        with pytest.raises(ValueError, match="the record is of"):
            database.set_winner(other, a_record(1))


def test_a_candidate_is_measured_by_one_worker(path):
    key, config = a_key(), config_hash(a_record(1).config)
    with Database(path) as database:
        assert database.claim(key, config, "a") and database.claim(key, config, "a")
        assert not database.claim(key, config, "b")
        assert database.claim(a_key(tokens=64), config, "b")
        database.add(a_record(1))
        assert not database.claim(key, config, "a") and not database.claim(key, config, "b")


def test_a_second_tuner_shares_the_file(path):
    key, config = a_key(), config_hash(a_record(1).config)

    def second():
        with Database(path) as database:
            database.add(a_record(2))
            return database.claim(key, config, "second"), len(database.records())

    with Database(path) as database:
        assert database.claim(key, config, "first")
        assert in_child(second) == (False, 1)
        database.add(a_record(1))
        assert [r.config["tile"] for r in database.records()] == [2, 1]


def test_a_claim_ends_with_its_process_or_its_database(path):
    key, config = a_key(), config_hash(a_record(1).config)
    assert in_child(lambda: Database(path).claim(key, config, "dead"))  # ends without close()
    with Database(path) as database:
        assert database.claim(key, config, "living")
    with Database(path) as database:
        assert database.claim(key, config, "next")


def test_a_forked_child_opens_the_file_anew(path):
    with Database(path) as database:
        database.add(a_record(1))

        def child():
            database.add(a_record(2))
            return len(database.records())

        assert in_child(child) == 2
        database.add(a_record(3))
        assert len(database.records()) == 3


def test_a_clock_set_back_changes_nothing(path, monkeypatch):
    key = a_key()
    with Database(path) as database:
        database.add(a_record(1, created=2e9))
        database.set_winner(key, a_record(1, created=2e9))
        monkeypatch.setattr(time, "time", lambda: 5.0)
        database.add(a_record(2, created=5.0))
        database.set_winner(key, a_record(2, created=5.0))
        assert database.claim(key, config_hash({"tile": 3}), "w")
        assert [r.created for r in database.records()] == [2e9, 5.0]
        assert database.winner(key).config["tile"] == 2


def test_two_processes_make_the_file_at_once(path):
    context = multiprocessing.get_context("fork")
    start, failed = context.Event(), context.Queue()

    def make(number):
        start.wait()
        try:
            with Database(path) as database:
                database.add(a_record(number))
        except DatabaseError as error:
            failed.put(str(error))

    children = [context.Process(target=make, args=(n,)) for n in range(6)]
    for child in children:
        child.start()
    start.set()
    for child in children:
        child.join()
    assert failed.empty()
    assert sorted(r.config["tile"] for r in Database(path, read_only=True).records()) == list(range(6))


def test_a_full_disk_loses_nothing_that_was_acknowledged(path):
    """A limit on the size of files stands for a full disk: the write fails in the same place."""
    Database(path).close()

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, 120_000))
        database, added = Database(path), 0
        try:
            while added < 10_000:
                database.add(a_record(added, reason="x" * 200))
                added += 1
        except DatabaseError as error:
            return added, str(error), len(database.records())
        return added, "no error", 0

    added, message, kept = in_child(fill)
    assert message.startswith(f"{path}: the disk") and "acknowledged is kept" in message and "\n" not in message
    assert 0 < added == kept
    with Database(path) as database:
        assert len(database.records()) == added
        database.add(a_record(added))  # there is space again


def test_a_database_at_its_largest_size_is_a_full_disk(path):
    with Database(path) as database:
        database._connection.execute("PRAGMA max_page_count = 30")
        with pytest.raises(DatabaseError, match="the disk is full; what was acknowledged is kept: free some space"):
            for number in range(2000):
                database.add(a_record(number, reason="x" * 500))
        assert len(database.records()) == number
        database._connection.execute("PRAGMA max_page_count = 4294967294")
        database.add(a_record(number))


def as_nobody(function, *arguments):
    """In a child without the rights of root, which no permission holds back."""

    def run():
        if os.getuid() == 0:
            os.setuid(65534)
        return function(*arguments)

    return in_child(run)


@pytest.fixture
def locked(tmp_path):
    """A database with a record in a folder that others than root cannot write, and may reach."""
    folder = tmp_path / "locked"
    folder.mkdir()
    path = folder / "tuning.db"
    with Database(path) as database:
        database.add(a_record(1))
    opened = []
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.getuid() and not parent.stat().st_mode & 1:
            opened.append((parent, parent.stat().st_mode))
            parent.chmod(parent.stat().st_mode | 0o111)
    path.chmod(0o444)
    folder.chmod(0o555)
    yield path
    folder.chmod(0o755)
    for parent, mode in opened:
        parent.chmod(mode)


def test_a_read_only_database_can_be_looked_at_and_not_written(locked):
    assert as_nobody(lambda: Database(locked).records()) == (
        f"{locked} is read-only, and tuning writes; make it writable or copy it"
    )
    assert as_nobody(lambda: len(Database(locked, read_only=True).records())) == 1


def test_a_log_that_cannot_be_read_is_not_passed_over(locked):
    """Without write access its newest records cannot be read: that is said, and the older ones are not shown as all."""
    writer = Database(locked)
    writer.add(a_record(2))
    (locked.parent / "copy").write_bytes(b"")
    for name in ("tuning.db", "tuning.db-wal"):
        (locked.parent / f"copied-{name}").write_bytes((locked.parent / name).read_bytes())
        (locked.parent / f"copied-{name}").chmod(0o444)
    writer.close()
    message = as_nobody(lambda: len(Database(locked.parent / "copied-tuning.db", read_only=True).records()))
    assert "cannot be opened" in message or "read-only" in message


def test_reading_asks_for_a_file(path):
    with pytest.raises(DatabaseError, match="there is no tuning database; `moec tune MODEL --db FILE` makes one"):
        Database(path, read_only=True)
    assert not path.exists()
    Database(path).close()
    with pytest.raises(DatabaseError, match="was opened for reading alone"):
        Database(path, read_only=True).add(a_record(1))


def test_what_is_no_tuning_database_is_refused(path, tmp_path):
    path.write_text("these are not the records you are looking for " * 30)
    for read_only in (False, True):
        with pytest.raises(DatabaseError, match="not a tuning database"):
            Database(path, read_only=read_only)
    other = tmp_path / "other.db"
    sqlite3.connect(other).execute("CREATE TABLE songs (name TEXT)")
    for read_only in (False, True):
        with pytest.raises(DatabaseError, match="a sqlite file of another program, not a tuning database"):
            Database(other, read_only=read_only)
    with pytest.raises(DatabaseError, match="is a folder"):
        Database(tmp_path)
    with pytest.raises(DatabaseError, match="cannot be opened; does its folder exist"):
        Database(tmp_path / "no" / "tuning.db")


def test_a_newer_schema_is_refused(path):
    Database(path).close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    with pytest.raises(DatabaseError, match=rf"has schema {SCHEMA_VERSION + 1}, written by a newer moec.*update moec"):
        Database(path)


def test_a_damaged_file_is_told_in_one_line(path):
    with Database(path) as database:
        database.add_all(a_record(n) for n in range(300))
    data = bytearray(path.read_bytes())
    data[4096 * 2 : 4096 * 12] = os.urandom(4096 * 10)
    path.write_bytes(data)
    with pytest.raises(DatabaseError, match="damaged") as caught:
        Database(path).records()
    assert "\n" not in str(caught.value)


def test_waiting_for_a_lock_ends(path):
    with Database(path, lock_timeout_s=0.05) as database:
        blocker = sqlite3.connect(path, isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseError, match="another process has it locked for too long"):
            database.add(a_record(1))
        blocker.execute("ROLLBACK")
        database.add(a_record(1))


def test_an_error_in_the_middle_adds_nothing(path):
    bad = dataclasses.replace(a_record(2), ratio=float("inf"))
    with Database(path) as database:
        with pytest.raises(ValueError, match="Out of range"):
            database.add_all([a_record(1), bad])
        assert database.records() == []


def test_the_module_needs_no_torch():
    """Writers are started by the dozen: what they import must be light."""
    code = f"import {database_module.__name__}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""Records for tests of tuning, and a writer process that tells what it measured and what was acknowledged."""

import os
import sys

from moec.compiler.tune.record import Key, Record


def a_key(**changes):
    """A key; changes: other values of its fields."""
    fields = {"kernel_sha256": "ab" * 32, "op": "experts", "shape": "E=8,F=512,H=256,K=2,S=0", "tokens": 16}
    fields |= {"weight_format": "bf16", "routing": "zipf-1.0", "device": "Some CPU", "toolchain": "llvm 20"}
    return Key(**{**fields, **changes})


def a_record(number, key=None, **changes):
    """A measured record whose configuration and time depend on number."""
    fields = {"config": {"tile": number, "kernel": "k"}, "status": "ok", "median_us": 100.0 + number}
    fields |= {"ratio": 1.0 + number / 100, "ratio_low": 0.99 + number / 100, "ratio_high": 1.01 + number / 100}
    fields |= {"samples": 20, "seed": 1, "worker": "w", "created": 1.7e9}
    return Record(**{"key": key or a_key(), **fields, **changes})


def first_number(journal):
    """A hundred before the last number in the journal: claims that were left behind are no older."""
    with open(journal, "rb") as file:
        file.seek(max(0, os.path.getsize(journal) - 4000))
        numbers = [int(line.split()[1]) for line in file.read().splitlines()[1:]]
    return max([0, *(n - 100 for n in numbers[-20:])])


def write_for_ever(path, journal, worker):
    """Claims, "measures" and adds one configuration after another, and notes both in an append-only journal."""
    from moec.compiler.tune.database import Database
    from moec.compiler.tune.record import config_hash

    log = os.open(journal, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    database, key = Database(path), a_key()
    number = first_number(journal)
    while True:
        record = a_record(number, worker=worker)
        if database.claim(key, config_hash(record.config), worker):
            os.write(log, f"measured {number} {os.getpid()}\n".encode())
            database.add(record)
            os.write(log, f"acked {number} {os.getpid()}\n".encode())
        number += 1


if __name__ == "__main__":
    write_for_ever(sys.argv[1], sys.argv[2], sys.argv[3])

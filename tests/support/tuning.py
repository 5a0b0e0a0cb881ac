"""Records for tests of tuning, and a writer process that tells what it measured and what was acknowledged."""

import dataclasses
import os
import random
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


def a_tuning_run(seed=0, device="cpu:amx_bf16:GenuineIntel-6-143-8:x2"):
    """Records as a run over three layers at six token counts leaves them: a default, candidates, some that failed."""
    rng, records = random.Random(seed), []
    for sizes in ("E=8,F=1792,H=4096,K=2,S=0", "E=64,F=1408,H=2048,K=6,S=2", "E=128,F=768,H=2048,K=8,S=0"):
        for tokens in (1, 4, 16, 64, 512, 2048):
            records += _a_problem(a_key(shape=sizes, tokens=tokens, device=device), rng)
    return records


def _a_problem(key, rng):
    default = {"kernel": "tiles", "rows": 16, "columns": 64, "prefetch": 2, "chunk_bytes": 1 << 16}
    base, gain = 40.0 * key.tokens**0.6 * rng.uniform(0.8, 1.3), rng.uniform(0.85, 1.0)
    first = {"is_default": True, "ratio": 1.0, "ratio_low": None, "ratio_high": None}
    made = [a_record(0, key, config=default, median_us=base, **first)]
    for number in range(1, 31):
        config = {
            "kernel": rng.choice(["tiles", "stream"]), "rows": rng.choice([8, 16, 32]),
            "columns": rng.choice([32, 64, 128]), "prefetch": rng.choice([0, 1, 2, 4]),
            "chunk_bytes": rng.choice([1 << 14, 1 << 16, 1 << 18]),
        }  # fmt: skip
        fate = rng.random()
        if fate < 0.1:
            status, reason = rng.choice([
                ("wrong", "relative error 0.31, expected below 0.01"), ("crashed", "its process ended with signal 11"),
                ("timeout", "no answer within 30 s"), ("rejected", "98304 bytes of buffers, 65536 fit the cache"),
            ])  # fmt: skip
            none = {"median_us": None, "ratio": None, "ratio_low": None, "ratio_high": None, "samples": 0}
            made.append(a_record(number, key, config=config, status=status, reason=reason, **none))
            continue
        ratio = gain * (1 + abs(config["rows"] - 16) / 100) * (1.08 if config["kernel"] == "stream" else 1.0)
        ratio *= rng.lognormvariate(0.05, 0.04) * (0.97 if config["prefetch"] == 4 else 1.0)
        bound = {"ratio_low": ratio * 0.985, "ratio_high": ratio * 1.015}
        made.append(a_record(number, key, config=config, median_us=base * ratio, ratio=ratio, **bound))
    surer = [r for r in made if r.ratio_high is not None and r.ratio_high < 1]
    best = min(surer, key=lambda r: r.ratio, default=None)
    return [dataclasses.replace(r, is_winner=r is best) for r in made]


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

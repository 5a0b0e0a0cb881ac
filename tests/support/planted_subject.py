"""A subject for the measuring process whose candidates misbehave as their configuration says."""

import ctypes
import os
import time

HELD = []


class Planted:
    """A candidate is its "kind"; an honest one sleeps `us` microseconds. The result of a call is its seed squared."""

    def __init__(self, log: str = ""):
        self._log, self._calls = log, {}
        self._shared = {"offset": 0}

    def prepare(self, task):
        self._task = task

    def build(self, config):
        if self._log:
            with open(self._log, "a") as file:
                file.write(f"{config['kind']} {config['us']}\n")
        if config["kind"] == "unbuildable":
            raise ValueError("no such instruction")
        return config

    def _run(self, config, seed):
        kind = config["kind"]
        calls = self._calls[kind] = self._calls.get(kind, 0) + 1
        if kind == "hang":
            time.sleep(3600)
        if kind == "spin":
            ctypes.pythonapi.PyLong_FromLong(1)
            while True:
                pass
        if kind == "crash":
            ctypes.string_at(0)
        if kind == "abort":
            os.abort()
        if kind == "leave":
            os._exit(0)
        if kind == "raise":
            raise RuntimeError("kernel said no")
        if kind == "leak":
            HELD.append(bytearray(os.urandom(1024)) * 4096)
        if kind == "flood":
            HELD.append(bytearray(b"x") * (400 << 20))
        if kind == "vandal":
            self._shared["offset"] = 1
        time.sleep(config["us"] * 1e-6)
        if kind == "liar":
            return 0
        if kind == "late liar" and calls > 4:
            return 0
        return seed * seed + (self._shared["offset"] if kind == "honest" else 0)

    def check(self, candidate, seed):
        got = self._run(candidate, seed)
        return "" if got == seed * seed else f"{got}, expected {seed * seed}"

    def call(self, candidate, seed):
        return lambda: self._run(candidate, seed)

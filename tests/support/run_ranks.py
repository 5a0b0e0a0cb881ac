"""Runs an engine for several ranks in one process: a thread a rank, collectives by meeting at a table."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.runtime.batch import Batch
from moec.runtime.loader import open_engine, read_manifest
from moec.runtime.options import LoadOptions
from moec.runtime.program import Program, Step

TIMEOUT_S = 60.0


class Table:
    """Where the threads of a group meet: each leaves a value and takes all of them, in rank order."""

    def __init__(self) -> None:
        self.condition, self.left, self.rounds = threading.Condition(), dict[Any, dict[int, Any]](), dict[Any, int]()

    def meet(self, group: str, ranks: Sequence[int], me: int, value: Any) -> list[Any]:
        with self.condition:
            at = self.rounds[group, me] = self.rounds.get((group, me), -1) + 1
            slot = self.left.setdefault((group, *ranks, at), {})  # replicas use the same names for other ranks
            slot[me] = value
            self.condition.notify_all()
            if not self.condition.wait_for(lambda: len(slot) == len(ranks), TIMEOUT_S):
                raise TimeoutError(f"rank {me} waits alone at round {at} of {group}; {sorted(slot)} came")
            return [slot[r] for r in ranks]


def run_engine(folder: Path, lanes: Sequence[Sequence[Sequence[int]]]) -> list[Tensor | None]:
    """Logits of every token, [T, V], by rank; None for ranks that give none. lanes: the prompts of each lane of each
    replica, one after the other."""
    manifest = read_manifest(folder)
    where, count = manifest["placement"], manifest["ranks"]
    table, results, errors = Table(), [None] * count, list[BaseException]()

    def one(rank: int) -> None:
        try:
            entry = where["ranks"][rank]
            prompts = lanes[entry["replica"] * where["lanes"] + entry["lane"]]
            options = LoadOptions(rank=rank, huge_pages=False)
            executor = open_engine(folder, manifest, options, lambda step: _meaning(step, table, entry))
            outputs = executor(*rank_inputs(executor.program, prompts, entry["caches"]))
            results[rank] = outputs[0] if entry["gives_logits"] else None
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(r,), daemon=True) for r in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    if errors:
        raise errors[0]
    return results


def rank_inputs(
    program: Program, prompts: Sequence[Sequence[int]], caches: Sequence[dict]
) -> tuple[list[Tensor], Batch]:
    """A rank's inputs of a prefill of its lane's prompts, every token's logits wanted."""
    lengths = [len(p) for p in prompts]
    tokens = torch.tensor([t for p in prompts for t in p], dtype=torch.int64)
    positions = torch.cat([torch.arange(0), *(torch.arange(n) for n in lengths)])
    slots = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)], dtype=torch.int64)
    made = [torch.zeros(8, 16, *c["shape"], dtype=getattr(torch, c["dtype"])) for c in caches]
    rows = [torch.arange(len(tokens))] if program.buffers[program.inputs[-1]].name == "rows" else []
    batch = Batch.of_lengths(list(range(len(prompts))), lengths, [0] * len(prompts))
    return [tokens, positions, slots, *made, *rows], batch


def _meaning(step: Step, table: Table, entry: dict[str, Any]) -> Callable[..., Tensor]:
    """A collective step as a function that meets the other ranks at the table."""
    constants = {k: v for k, v in step.kwargs.items() if k != "layer"}
    return MEANINGS[step.name](table, entry, **constants)


def _all_reduce(table: Table, entry: dict, group: str, reduce: str) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        parts = table.meet(group, entry["groups"][group], entry["rank"], x.clone())
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total

    assert reduce == "sum"
    return run


def _all_gather(table: Table, entry: dict, group: str) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat(table.meet(group, entry["groups"][group], entry["rank"], x.clone()))


def _all_to_all(table: Table, entry: dict, group: str) -> Callable[..., Tensor]:
    me = entry["groups"][group].index(entry["rank"])

    def run(x: Tensor, sent: Tensor | None, received: Tensor | None) -> Tensor:
        pieces = x.clone().split([1] * len(x) if sent is None else sent.tolist())
        there = table.meet(group, entry["groups"][group], entry["rank"], pieces)
        if received is not None:
            assert [len(p[me]) for p in there] == received.tolist()
        return torch.cat([p[me] for p in there])

    return run


def _send(table: Table, entry: dict, group: str, to: int) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        table.meet(group, entry["groups"][group], entry["rank"], x.clone())
        return x.new_empty(0)

    assert to == 1
    return run


def _receive(table: Table, entry: dict, group: str, source: int) -> Callable[[Tensor], Tensor]:
    def run(buffer: Tensor) -> Tensor:
        found = table.meet(group, entry["groups"][group], entry["rank"], None)[source]
        assert found.shape == buffer.shape and found.dtype == buffer.dtype
        return found

    return run


MEANINGS: dict[str, Callable[..., Callable[..., Tensor]]] = {
    "all_reduce": _all_reduce,
    "all_gather_into_tensor": _all_gather,
    "all_to_all_single": _all_to_all,
    "isend": _send,
    "irecv": _receive,
    "wait_tensor": lambda table, entry: lambda issued, operand: issued,
}

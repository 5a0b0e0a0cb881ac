"""Engines of several ranks: rank 0 answers as any engine does, the others do their part of each step."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.runtime.batch import Batch
from moec.runtime.constants import torch_dtype
from moec.runtime.counters import summed
from moec.runtime.cuda_engine import open_cuda
from moec.runtime.engine import Engine
from moec.runtime.errors import FormatError, InputError, RankError
from moec.runtime.executor import Executor
from moec.runtime.format import PROGRAM, read_json
from moec.runtime.kv_cache import CacheInput, KVCache
from moec.runtime.launch.collectives import collective_function
from moec.runtime.launch.cuda_device import open_device
from moec.runtime.loader import check_engine, open_engine
from moec.runtime.options import LoadOptions, RankLimits, local_rank, rank_of_environment, ranks_of_machine
from moec.runtime.program import Program
from moec.runtime.ranks.groups import Group, as_bytes, connect_groups, from_bytes
from moec.runtime.ranks.watch import Failure
from moec.runtime.ranks.world import World, join_world, start_world

LoadedRank = tuple[Executor, dict[str, Group]]


def load_ranks(directory: Path, manifest: dict[str, Any], options: LoadOptions, rank: int | None) -> RankedEngine:
    """This process's rank of a placed engine. rank: None: as the environment says; without one the process is rank 0
    and starts the others here.

    Raises: RankError: a rank differs, is missing or ended.  FormatError, TargetError: as moec.load.
    """
    limits, rank = RankLimits.of_environment(), rank_of_environment() if rank is None else rank
    world = start_world(directory, manifest, limits) if rank is None else join_world(rank, manifest, limits)
    try:
        executor, groups = _load_rank(directory, manifest, options, world)
        return RankedEngine(directory, manifest, executor, world, groups)
    except RankError:
        world.close()
        raise
    except Exception as error:
        world.watch.fail(Failure(world.rank, f"cannot load its part: {error}"))
        world.close()
        raise


def _load_rank(directory: Path, manifest: dict[str, Any], options: LoadOptions, world: World) -> LoadedRank:
    """Checks and maps this rank's files; other ranks check theirs."""
    options = dataclasses.replace(options, rank=world.rank, processes=ranks_of_machine(world.num_ranks))
    gpu = None
    if manifest["target"]["kind"] == "cuda":
        gpu = open_device(manifest, options.device or f"cuda:{local_rank()}")
    check_engine(directory, manifest, options)
    where = manifest["placement"]
    groups = connect_groups(
        world.store,
        world.rank,
        {
            **where["ranks"][world.rank]["groups"],
            **{n: r for n, r in answer_groups(where).items() if world.rank in r},
        },
        "cpu" if gpu is None else gpu.torch_device.type,
        world.local,
        world.watch,
    )
    if gpu is not None:
        return open_cuda(directory, manifest, options, gpu, lambda step: collective_function(step, groups)), groups
    return open_engine(directory, manifest, options, lambda step: collective_function(step, groups)), groups


def answering_ranks(placement: dict[str, Any]) -> list[int]:
    """Per lane of all replicas, the rank whose logits rank 0 takes."""
    lanes: dict[int, int] = {}
    for entry in placement["ranks"]:
        if entry["gives_logits"]:
            lanes.setdefault(entry["replica"] * placement["lanes"] + entry["lane"], entry["rank"])
    return [rank for _, rank in sorted(lanes.items())]


def answer_groups(placement: dict[str, Any]) -> dict[str, list[int]]:
    """Name -> ranks of what carries logits to rank 0."""
    return {f"answer-{rank}": [0, rank] for rank in answering_ranks(placement) if rank}


def counting_ranks(placement: dict[str, Any]) -> list[int]:
    """The first rank of each lane of each stage of each replica: together they see every slot of every layer once."""
    firsts: dict[tuple[int, int, int], int] = {}
    for entry in placement["ranks"]:
        firsts.setdefault((entry["replica"], entry["stage"], entry["lane"]), entry["rank"])
    return sorted(firsts.values())


def share_ends(copies: dict[str, list[list[int]]], layer: int, parts: Sequence[Sequence[float]]) -> list[list[float]]:
    """Parts of tokens by copy as the table [E + 1, C - 1] of ends of intervals that a program reads (docs/engine.md).

    copies: layer -> for each expert the groups that hold it.
    Raises: InputError: see RankedEngine.set_token_shares.
    """
    known = copies.get(str(layer))
    if known is None:
        raise InputError(f"layer {layer} has no copied experts; layers that have some: {', '.join(copies) or 'none'}")
    if [len(p) for p in parts] != [len(k) for k in known]:
        raise InputError(f"layer {layer}: expected a part for each copy of {len(known)} experts, copies are {known}")
    most, ends = max(map(len, known)), []
    for expert, some in enumerate(parts):
        if min(some) < 0 or abs(sum(some) - 1) > 1e-6:
            raise InputError(f"layer {layer}, expert {expert}: parts are {list(some)}; expected numbers that sum to 1")
        sums = list(itertools.accumulate([*some, *[0.0] * (most - len(some))]))
        ends.append(sums[:-1])
    return [*ends, [0.0] * (most - 1)]


class LaneCache(KVCache):
    """The slots of all lanes as rank 0 counts them: slot s is place s // lanes of lane s % lanes. Holds no tensors."""

    _numbers = itertools.count()

    def __init__(self, num_slots: int, length: int, max_positions: int) -> None:
        super().__init__([], num_slots, length, max_positions)
        self.number = next(self._numbers)


class RankedEngine(Engine):
    """One rank of a placed engine. Rank 0 is used as any Engine; other ranks call serve()."""

    def __init__(
        self, directory: Path, manifest: dict[str, Any], executor: Executor, world: World, groups: dict[str, Group]
    ) -> None:
        super().__init__(directory, manifest, executor)
        self.rank, self._world, self._groups = world.rank, world, groups
        placement = manifest["placement"]
        entry = placement["ranks"][world.rank]
        self._lanes = placement["lanes"] * placement["replicas"]
        self._lane: int = entry["replica"] * placement["lanes"] + entry["lane"]
        self._gives_logits: bool = entry["gives_logits"]
        self._answering = answering_ranks(placement)
        self._caches = _cache_inputs(executor.program, entry["caches"])
        self._kept: dict[int, KVCache] = {}
        self._dropped: list[int] = []
        self._place = executor.place.device
        self._answer_like = [torch.empty(0) for _ in self._answering]
        if world.rank:
            world.spoke.ready()
            return
        programs = read_json(directory / PROGRAM)["ranks"]
        self._answer_like = [_output_like(programs[r]).to(self._place) for r in self._answering]
        world.hub.wait_ready()
        world.watch.doing = "idle"
        self._finalizer = weakref.finalize(self, _close, world, groups)

    def close(self) -> None:
        """Ends the other ranks. The engine answers no more. It also closes when nobody holds it any longer."""
        if self.rank == 0:
            self._finalizer()

    def serve(self) -> None:
        """On a rank other than 0: does what rank 0 says until it closes. Raises: RankError: a rank is lost."""
        spoke = self._world.spoke
        answers: dict[str, Callable[[dict[str, Any]], Any]] = {
            "count": lambda _: self.executor.counters(),
            "record": lambda _: super(RankedEngine, self)._start_recording(),
            "spans": lambda _: super(RankedEngine, self)._take_spans()[0],
            "share": lambda order: self._set_shares(order["layer"], order["ends"]),
        }
        while (command := spoke.next_command())["do"] != "close":
            with self._announced():
                if command["do"] in answers:
                    spoke.answer(answers[command["do"]](command))
                    continue
                logits = self._part(command)
                if logits is not None and self.rank in self._answering and len(logits):
                    group = self._groups[f"answer-{self.rank}"]
                    group.wait(group.broadcast(as_bytes(logits), 1), f"logits to rank 0 of {group.name}")
        _close(self._world, self._groups)

    def counters(self) -> dict[str, Any]:
        """As Engine.counters, of all lanes and replicas. Ranks of a lane count the same slots, so that one is asked."""
        mine = {0: self.executor.counters()}
        others = mine | self._world.hub.ask({"do": "count"})
        return summed(others[rank] for rank in counting_ranks(self.manifest["placement"]))

    def set_token_shares(self, layer: int, parts: Sequence[Sequence[float]]) -> None:
        """Lets copies of experts serve other parts of the tokens from the next step on, on all ranks.

        parts: for each expert one number per copy, in the order of manifest["placement"]["copies"][layer], not below 0,
        adding up to 1.
        Raises: InputError: the layer has no copied experts, or the parts are others than its copies.
        """
        ends = share_ends(self.manifest["placement"].get("copies", {}), layer, parts)
        self._world.hub.ask({"do": "share", "layer": layer, "ends": ends})
        self._set_shares(layer, ends)

    def _set_shares(self, layer: int, ends: list[list[float]]) -> bool:
        return self.executor.set_weight(
            f"token_shares_{layer}", torch.tensor(ends, dtype=torch.float32, device=self._place)
        )

    def _start_recording(self) -> None:
        self._world.hub.ask({"do": "record"})
        super()._start_recording()

    def _take_spans(self) -> list[list[Sequence[Any]]]:
        mine = super()._take_spans()
        others = self._world.hub.ask({"do": "spans"})
        return mine + [others[rank] for rank in sorted(others)]

    def new_cache(self, num_sequences: int, length: int) -> KVCache:
        self._world.hub.check()
        cache = LaneCache(num_sequences, length, self.max_positions)
        weakref.finalize(cache, self._dropped.append, cache.number)
        return cache

    def profile(self, *inputs: Any) -> list[dict[str, Any]]:
        """Raises: InputError: one rank's steps say little alone."""
        raise InputError("profile times an engine of one rank; `moec bench` times one of several")

    def _run(
        self, cache: KVCache, slots: Sequence[int], tokens: Sequence[Sequence[int]], wanted: Tensor | None = None
    ) -> Tensor:
        hub = self._world.hub
        hub.check()
        if not isinstance(cache, LaneCache):
            raise InputError("the cache is not this engine's; make one with new_cache")
        self._check_slots(slots)
        starts = cache.extend(slots, [len(t) for t in tokens])
        lanes: list[list[list[Any]]] = [[] for _ in range(self._lanes)]
        for slot, start, sequence in zip(slots, starts, tokens, strict=True):
            lanes[slot % self._lanes].append([slot // self._lanes, start, list(map(int, sequence))])
        size = [-(-cache.num_slots // self._lanes), cache.length]
        dropped, self._dropped[:] = list(self._dropped), []
        command = {"do": "step", "cache": cache.number, "size": size, "lanes": lanes, "last": wanted is not None}
        hub.tell({**command, "drop": dropped})
        hub.doing = "computing"
        with self._announced():
            own = self._part({**command, "drop": dropped})
            parts = [self._answer(lane, own, rows) for lane, rows in enumerate(_row_counts(lanes, wanted is not None))]
        hub.doing = "idle"
        return _in_order(parts, lanes, slots, wanted is not None)

    def _part(self, command: dict[str, Any]) -> Tensor | None:
        """This rank's part of a step -> the logits of its lane's wanted rows, None where its stage gives none."""
        for number in command["drop"]:
            self._kept.pop(number, None)
        if command["cache"] not in self._kept:
            num_slots, length = command["size"]
            by_head = self._place.type == "cpu"
            self._kept[command["cache"]] = KVCache(self._caches, num_slots, length, device=self._place, by_head=by_head)
        kept, runs = self._kept[command["cache"]], command["lanes"][self._lane]
        slots, starts, lengths = [r[0] for r in runs], [r[1] for r in runs], [len(r[2]) for r in runs]
        kept.clear_states([slot for slot, start in zip(slots, starts, strict=True) if start == 0])
        flat = torch.tensor([t for r in runs for t in r[2]], dtype=torch.int64, device=self._place)
        places = [start + i for start, length in zip(starts, lengths, strict=True) for i in range(length)]
        owners = [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]
        rows = (torch.tensor(some, dtype=torch.int64, device=self._place) for some in (places, owners))
        inputs = [flat, *rows, *kept.tensors]
        ends = torch.tensor(lengths, dtype=torch.int64, device=self._place).cumsum(0) - 1
        if self._selects_rows:
            inputs.append(ends if command["last"] else torch.arange(len(flat), device=self._place))
        batch = Batch.of_lengths(slots, lengths, starts)
        if self._place.type != "cpu" and runs and batch.is_decode:
            batch = Batch.of_decode(inputs[1], batch.longest)
        outputs = self.executor(inputs, batch)
        if not self._gives_logits:
            return None
        return outputs[0] if self._selects_rows or not command["last"] else outputs[0][ends]

    def _answer(self, lane: int, own: Tensor | None, rows: int) -> Tensor:
        """On rank 0: a lane's logits [rows, V]."""
        rank, like = self._answering[lane], self._answer_like[lane]
        if rank == 0 and own is not None:
            return own
        if not rows:
            return like[:0]
        raw = torch.empty(rows * like.numel() * like.element_size(), dtype=torch.uint8, device=self._place)
        group = self._groups[f"answer-{rank}"]
        group.wait(group.broadcast(raw, 1), f"logits to rank 0 of {group.name}")
        return from_bytes(raw, like, (rows, like.shape[1]))

    @contextmanager
    def _announced(self) -> Iterator[None]:
        """What fails on one rank fails on all: the others must not wait for it."""
        try:
            with torch.inference_mode():
                yield
        except RankError:
            raise
        except BaseException as error:
            self._world.watch.fail(Failure(self.rank, f"failed: {error or type(error).__name__}"))
            raise


def _close(world: World, groups: dict[str, Group]) -> None:
    """Ends a rank's part. Groups of a lost rank are left as they are: their threads may wait for it for ever."""
    world.close()
    if world.watch.failure is None:
        for group in groups.values():
            group.close()


def _cache_inputs(program: Program, entries: list[dict[str, Any]]) -> list[CacheInput]:
    """The program's caches in its own order."""
    known = {c["name"]: CacheInput(c["name"], tuple(c["shape"]), c["dtype"], c["kind"]) for c in entries}
    names = [program.buffers[i].name for i in program.inputs[3:]]
    unknown = [n for n in names if n not in known and n != "rows"]
    if unknown:
        raise FormatError(
            f"program.json takes {unknown[0]}, which the manifest does not know; compile the engine again"
        )
    return [known[n] for n in names if n in known]


def _output_like(program: dict[str, Any]) -> Tensor:
    """An empty row of a program's logits, [1, V]."""
    buffer = program["buffers"][program["outputs"][0]]
    return torch.empty(1, buffer["shape"][-1], dtype=torch_dtype(buffer["dtype"]))


def _row_counts(lanes: list[list[list[Any]]], last: bool) -> list[int]:
    """Rows of logits that each lane gives."""
    return [len(runs) if last else sum(len(r[2]) for r in runs) for runs in lanes]


def _in_order(parts: list[Tensor], lanes: list[list[list[Any]]], slots: Sequence[int], last: bool) -> Tensor:
    """Lanes' logits as rows in the order of the step's sequences."""
    if len(lanes) == 1:
        return parts[0]
    lengths = [[1 if last else len(r[2]) for r in runs] for runs in lanes]
    pieces = [iter(part.split(n)) if n else iter(()) for part, n in zip(parts, lengths, strict=True)]
    return torch.cat([next(pieces[slot % len(lanes)]) for slot in slots])

"""The weights files of several ranks, written side by side: a tensor is read once for all ranks that cut it.

Ranks are made of parts of the same tensors where they share columns, of other tensors where they hold other experts or
layers. The first keep pace expert by expert, so that of what they read one expert is in memory; the others follow one
another.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from moec.compiler.export.weights_file import Progress, WeightsFile, checked, making
from moec.compiler.lowering.packing import Scales, sources_read, steps
from moec.passes.ir.weights import Read, Weight


def write_rank_weights(
    paths: Sequence[Path], ranks: Sequence[Mapping[str, Weight]], read: Read, progress: Progress | None = None
) -> None:
    """Writes a file for each rank, each as write_weights does. progress: (bytes written, bytes in all), of all files.

    Raises: as write_weights.
    Cost: reads a source once for all weights that stand at the same place in their ranks' files and name it; holds one
        weight of each rank that shares sources with others.
    """
    scales, total = Scales(), sum(w.num_bytes for weights in ranks for w in weights.values())
    written = [0] * len(ranks)

    def note(rank: int, done: int, _: int) -> None:
        written[rank] = done
        if progress:
            progress(sum(written), total)

    with ExitStack() as stack:
        files = [
            stack.enter_context(WeightsFile(path, weights, functools.partial(note, rank)))
            for rank, (path, weights) in enumerate(zip(paths, ranks, strict=True))
        ]
        for place in itertools.zip_longest(*(weights.items() for weights in ranks)):
            found = [(file, *item) for file, item in zip(files, place, strict=True) if item is not None]
            for together in _sharing(found):
                _write(together, read, scales)


Part = tuple[WeightsFile, str, Weight]
"""Where a weight goes, its name there, and its recipe."""


def _sharing(parts: Iterable[Part]) -> list[list[Part]]:
    """The parts in groups of those that are made of the same sources, or of some of them."""
    groups: list[tuple[set[str], list[Part]]] = []
    for part in parts:
        sources, members = set(sources_read(part[2])), [part]
        for other in [g for g in groups if g[0] & sources]:
            groups.remove(other)
            sources, members = other[0] | sources, [*other[1], *members]
        groups.append((sources, members))
    return [members for _, members in groups]


def _write(parts: Sequence[Part], read: Read, scales: Scales) -> None:
    """Makes weights in step, equal ones once, and writes each to its file."""
    first = {weight: name for _, name, weight in reversed(parts)}
    shared = _SharedReads(read, first)
    under_way = {weight: steps(weight, shared, scales) for weight in first}
    made: dict[Weight, Tensor] = {}
    while under_way:
        for weight, making_it in list(under_way.items()):
            with making(first[weight], weight):
                if (tensor := _step(making_it)) is not None:
                    made[weight] = tensor
                    del under_way[weight]
    for weight in made:
        made[weight] = checked(first[weight], weight, made[weight], read)
    for file, name, weight in parts:
        file.write(name, made[weight])


def _step(making_it: Generator[None, None, Tensor]) -> Tensor | None:
    """One expert further; the tensor once it is made."""
    try:
        next(making_it)
    except StopIteration as done:
        made: Tensor = done.value
        return made
    return None


class _SharedReads:
    """Reads tensors, and keeps each until all of some weights have read it."""

    def __init__(self, read: Read, weights: Iterable[Weight]) -> None:
        self._read, self._kept = read, dict[str, Tensor]()
        self._left = Counter(name for weight in weights for name in sources_read(weight))

    def __call__(self, name: str) -> Tensor:
        self._left[name] -= 1
        tensor = self._kept.pop(name) if name in self._kept else self._read(name)
        if self._left[name] > 0:
            self._kept[name] = tensor
        return tensor

"""Engines with random weights, carried without them: gigabytes become a recipe, and the other machine makes them again.

    python benchmarks/gpu/carry.py pack gpu.engine build/model build/visit/engine          # where the compiler is
    PYTHONPATH=src python benchmarks/gpu/carry.py unpack build/visit/engine gpu.engine     # torch and moec's runtime

The matrices of a weights file are rows of the tensors that `moec compile --random-weights 0` makes from names; what is
none of them is carried as it is. Loading an engine compares the file's digest with the manifest: a machine that makes
other numbers is found out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.compiler.random_tensors import random_tensor

SEED = 0
WEIGHTS, RECIPE, LITERAL = "weights-0.safetensors", "recipe.json", "literal.bin"


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows of a random matrix [R, C], or a part of each: half of a shared expert that is two experts wide."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    rows: tuple[int, int]
    columns: tuple[int, int]

    def bytes(self) -> Tensor:
        """u8[rows, bytes of a row]."""
        made = random_tensor(SEED, self.name, self.shape, getattr(torch, self.dtype))
        part = made.reshape(-1, self.shape[-1])[slice(*self.rows), slice(*self.columns)]
        return part.contiguous().view(torch.uint8)


def sources_of(model: Path) -> list[Source]:
    """The matrices that are made for a model's folder with config.json, large ones first; needs the compiler."""
    from moec.compiler.capture.configuration import load_config
    from moec.compiler.capture.random_weights import RandomWeights
    from moec.compiler.capture.skeleton import build_skeleton

    config = load_config(model)
    made = RandomWeights(SEED, build_skeleton(config, config.dtype)).sources
    whole = [
        Source(name, tuple(w.shape), str(w.dtype).removeprefix("torch."), (0, w.shape[0]), (0, w.shape[1]))
        for name, w in made.items()
        if len(w.shape) == 2
    ]
    return [*whole, *(half for source in whole if _is_shared(source) for half in _halves(source))]


def _is_shared(source: Source) -> bool:
    """Whether a matrix is of shared experts, which engines store as experts of the others' width."""
    return "shared" in source.name and min(source.shape) > 1


def _halves(source: Source) -> Iterator[Source]:
    """Upper and lower, left and right."""
    (_, rows), (_, columns) = source.rows, source.columns
    yield from (dataclasses.replace(source, rows=r) for r in ((0, rows // 2), (rows // 2, rows)))
    yield from (dataclasses.replace(source, columns=c) for c in ((0, columns // 2), (columns // 2, columns)))


def tensors_of(path: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """The header of a safetensors file with its length, and the tensors in the order of their bytes."""
    with path.open("rb") as file:
        size = file.read(8)
        text = file.read(int.from_bytes(size, "little"))
    entries = [e for name, e in json.loads(text).items() if name != "__metadata__"]
    return size + text, sorted(entries, key=lambda e: e["data_offsets"][0])


def pack(engine: Path, model: Path, out: Path) -> str:
    """Writes the engine's folder without its weights -> what became of them, in words."""
    sources = sources_of(model)
    first: dict[bytes, list[int]] = {}
    for number, source in enumerate(sources):
        first.setdefault(source.bytes()[0].numpy().tobytes(), []).append(number)
    header, entries = tensors_of(engine / WEIGHTS)
    shutil.copytree(engine, out, ignore=shutil.ignore_patterns(WEIGHTS))
    stored = torch.from_file(str(engine / WEIGHTS), size=(engine / WEIGHTS).stat().st_size, dtype=torch.uint8)
    recipe: list[list[int]] = []
    with (out / LITERAL).open("wb") as literal:
        literal.write(header)
        for entry in entries:
            begin, end = (len(header) + offset for offset in entry["data_offsets"])
            width = (end - begin) // max(torch.Size(entry["shape"][:-1]).numel(), 1)
            recipe.append([])
            for number, rows in _parts(stored[begin:end].view(-1, max(width, 1)), sources, first):
                if number is None:
                    literal.write(rows.numpy().tobytes())
                recipe[-1].append(-rows.numel() if number is None else number)
    told = [dataclasses.asdict(s) for s in sources]
    (out / RECIPE).write_text(json.dumps({"header": len(header), "sources": told, "parts": recipe}))
    carried = (out / LITERAL).stat().st_size
    return f"{out}: {len(stored) >> 10} KiB of weights as {carried >> 10} KiB and a recipe"


def _parts(
    rows: Tensor, sources: Sequence[Source], first: Mapping[bytes, Sequence[int]]
) -> Iterator[tuple[int | None, Tensor]]:
    """What a tensor's rows are, one after the other: a source's number, None for rows of no source, and the rows."""
    at = plain = 0
    while at < len(rows):
        for number in first.get(rows[at].numpy().tobytes(), ()):
            made = sources[number].bytes()
            if torch.equal(rows[at : at + len(made)], made):
                break
        else:
            at += 1
            continue
        if plain < at:
            yield None, rows[plain:at]
        yield number, made
        at = plain = at + len(made)
    if plain < at:
        yield None, rows[plain:at]


def unpack(folder: Path, out: Path) -> str:
    """Makes the engine that was packed -> what was made, in words."""
    told = json.loads((folder / RECIPE).read_text())
    sources = [Source(**s) for s in told["sources"]]
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns(RECIPE, LITERAL))
    with (folder / LITERAL).open("rb") as literal, (out / WEIGHTS).open("wb") as file, ThreadPoolExecutor() as pool:
        file.write(literal.read(told["header"]))
        for parts in told["parts"]:
            made = {part: pool.submit(sources[part].bytes) for part in parts if part >= 0}
            for part in parts:
                file.write(made[part].result().numpy().tobytes() if part >= 0 else literal.read(-part))
    return f"{out}: {(out / WEIGHTS).stat().st_size >> 20} MiB of weights"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    commands = parser.add_subparsers(dest="command", required=True)
    packs, unpacks = commands.add_parser("pack"), commands.add_parser("unpack")
    packs.add_argument("engine", type=Path)
    packs.add_argument("model", type=Path, help="the folder with config.json that the engine was compiled from")
    unpacks.add_argument("folder", type=Path)
    for command in (packs, unpacks):
        command.add_argument("out", type=Path)
    options = parser.parse_args()
    try:
        packing = options.command == "pack"
        print(pack(options.engine, options.model, options.out) if packing else unpack(options.folder, options.out))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Engine: a loaded engine directory that answers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.runtime.batch import Batch
from moec.runtime.counters import summed
from moec.runtime.errors import EngineError, InputError
from moec.runtime.executor import Executor
from moec.runtime.format import publish
from moec.runtime.generate import Token, check_context, generate_tokens
from moec.runtime.kv_cache import CacheInput, KVCache
from moec.runtime.loader import check_engine, open_engine, read_manifest
from moec.runtime.options import GenerateOptions, LoadOptions
from moec.runtime.reports import inspect_engine, verify_engine
from moec.runtime.timeline import Recorder, write_timeline

Prompts = Tensor | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor]


def load(
    path: str | Path,
    *,
    check_digests: bool = True,
    rank: int | None = None,
    device: Any = None,
    huge_pages: bool = True,
) -> Engine:
    """Loads an engine directory.

    An engine for several ranks: as rank 0, with the others started on this machine; or, where RANK and WORLD_SIZE are
    in the environment or `rank` is given, as that rank among processes that were started elsewhere. Other ranks than
    0 then call serve().
    check_digests, huge_pages: see LoadOptions.
    device: of an engine for a GPU: its name, "cuda:1"; None: torch's current one.
    Raises: EngineError: damaged, of another version, or for another machine; a rank differs or is lost.
    """
    directory = Path(path)
    manifest, options = read_manifest(directory), LoadOptions(check_digests, huge_pages=huge_pages, device=device)
    if manifest["ranks"] > 1:
        from moec.runtime.ranks.engine import load_ranks

        return load_ranks(directory, manifest, options, rank)
    if manifest["target"]["kind"] == "cuda":
        from moec.runtime.cuda_engine import load_cuda

        return load_cuda(directory, manifest, options, device)
    check_engine(directory, manifest, options)
    return Engine(directory, manifest, open_engine(directory, manifest, options))


class Engine:
    """A model that answers. Made by moec.load or moec.compile.

    manifest: what the engine is.  kind: "language_model" or "module".  directory: where its files are.
    rank: of a placed engine, which part of it this process runs; 0 answers.  spans: of the last trace, by rank.
    """

    rank = 0
    spans: list[list[Sequence[Any]]] = []  # noqa: RUF012  (replaced, never written to)

    def __init__(self, directory: Path, manifest: dict[str, Any], executor: Executor) -> None:
        self.directory, self.manifest, self.executor = directory, manifest, executor
        self.kind: str = manifest["kind"]
        model = manifest["model"]
        self.vocab_size: int = model.get("vocab_size", 0)
        self.max_positions: int = model.get("max_positions", 0)
        self.eos_token_ids = frozenset(model.get("eos_token_ids", ()))
        self._caches = [
            CacheInput(c["name"], tuple(c["shape"]), c["dtype"], c.get("kind", "tokens"))
            for c in manifest.get("caches", ())
        ]
        program = executor.program
        self._selects_rows = self.kind == "language_model" and program.buffers[program.inputs[-1]].name == "rows"
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def __call__(self, *inputs: Any) -> Any:
        """A language model: input_ids -> logits. [B, T] -> [B, T, V]; [T] -> [T, V]; a list of sequences -> a list.

        A plain module: its tensor inputs -> its output (a tuple where it has several).
        Raises: InputError: tokens outside of the vocabulary, nothing to do, or inputs of another shape or type.
        """
        if self.kind != "language_model":
            self.executor.check_inputs(inputs)
            outputs = self.executor(inputs)
            return outputs[0] if len(outputs) == 1 else tuple(outputs)
        if len(inputs) != 1:
            raise InputError(f"a language model takes input_ids alone, got {len(inputs)} inputs")
        sequences = self._sequences(inputs[0])
        cache = self.new_cache(len(sequences), max(map(len, sequences)))
        slots = [cache.allocate() for _ in sequences]
        parts = self._run(cache, slots, sequences).split([len(s) for s in sequences])
        if not isinstance(inputs[0], Tensor):
            return list(parts) if _is_nested(inputs[0]) else parts[0]
        return torch.stack(parts) if inputs[0].dim() == 2 else parts[0]

    def generate(
        self,
        prompts: Prompts,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_tokens: Collection[int] | None = None,
    ) -> list[list[int]]:
        """The new tokens of each prompt (one prompt, a list of any lengths, or a tensor [B, T]); see GenerateOptions.

        Raises: InputError, ContextError: before anything is computed.
        """
        options = GenerateOptions(max_new_tokens, temperature, top_k, top_p, seed, stop_tokens)
        sequences = self._sequences(prompts)
        tokens: list[list[int]] = [[] for _ in sequences]
        for event in self._stream(sequences, options):
            tokens[event.sequence].append(event.token)
        return tokens

    def stream(
        self,
        prompts: Prompts,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_tokens: Collection[int] | None = None,
    ) -> Iterator[Token]:
        """As generate, but gives each token as soon as it is there: Token(sequence, token, finished)."""
        options = GenerateOptions(max_new_tokens, temperature, top_k, top_p, seed, stop_tokens)
        return self._stream(self._sequences(prompts), options)

    def _stream(self, sequences: list[list[int]], options: GenerateOptions) -> Iterator[Token]:
        length = check_context(sequences, options.max_new_tokens, self.max_positions)
        stop = self.eos_token_ids if options.stop_tokens is None else frozenset(options.stop_tokens)
        cache = self.new_cache(len(sequences), length)
        return generate_tokens(self.step, cache, sequences, options, stop)

    def new_cache(self, num_sequences: int, length: int) -> KVCache:
        """A cache for num_sequences of at most length tokens each. Raises: ContextError: beyond the model's context."""
        self._check_cache()
        return KVCache(self._caches, num_sequences, length, self.max_positions, by_head=True)

    def _check_cache(self) -> None:
        if self.kind != "language_model":
            raise InputError(
                "the engine is of a plain module: it has no cache and generates no tokens; call it instead"
            )

    def step(self, cache: KVCache, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Feeds each slot's next tokens, any number per slot -> logits [len(slots), V] after the last of each.

        Raises: InputError: a slot without tokens, a slot twice, an unknown token.  ContextError: a slot overruns.
        """
        self._check_tokens(tokens)
        ends = torch.tensor([len(t) for t in tokens]).cumsum(0) - 1
        return self._run(cache, slots, tokens, ends)

    def _run(
        self, cache: KVCache, slots: Sequence[int], tokens: Sequence[Sequence[int]], wanted: Tensor | None = None
    ) -> Tensor:
        """-> logits [R, V] of the wanted rows of the batch, rising; by default all. Tokens are checked already."""
        self._check_slots(slots)
        lengths = [len(t) for t in tokens]
        batch = Batch.of_lengths(slots, lengths, cache.extend(slots, lengths))
        rows = [(run.slot, run.position + i) for run in batch.runs for i in range(run.stop - run.start)]
        flat = torch.tensor([t for sequence in tokens for t in sequence])
        places = torch.tensor(rows)
        inputs = [flat, places[:, 1].contiguous(), places[:, 0].contiguous(), *cache.tensors]
        if self._selects_rows:
            return self.executor([*inputs, torch.arange(len(rows)) if wanted is None else wanted], batch)[0]
        logits = self.executor(inputs, batch)[0]
        return logits if wanted is None or len(wanted) == len(rows) else logits[wanted]

    def _check_slots(self, slots: Sequence[int]) -> None:
        if not slots:
            raise InputError("the step has no sequences; give at least one slot with a token")
        if len(set(slots)) < len(slots):
            raise InputError(f"slots {list(slots)} name a sequence twice; give all of its tokens in one list")

    def _sequences(self, prompts: Prompts) -> list[list[int]]:
        """Prompts in any accepted form as lists of ints, checked."""
        if self.kind != "language_model":
            raise InputError("the engine is of a plain module and takes tensors, not prompts; call it instead")
        if isinstance(prompts, Tensor):
            if prompts.dtype.is_floating_point or prompts.dim() not in (1, 2):
                raise InputError(f"input_ids: expected int64 [T] or [B, T], got {prompts.dtype} {list(prompts.shape)}")
            rows = prompts.tolist() if prompts.dim() == 2 else [prompts.tolist()]
        else:
            nested: Any = prompts if _is_nested(prompts) else [prompts]
            rows = [[int(token) for token in prompt] for prompt in nested]
        if not rows:
            raise InputError("no prompt was given; expected at least one")
        self._check_tokens(rows)
        return rows

    def _check_tokens(self, sequences: Sequence[Sequence[int]]) -> None:
        for i, tokens in enumerate(sequences):
            if not len(tokens):
                raise InputError(f"prompt {i} is empty; expected at least one token")
            if min(tokens) < 0 or max(tokens) >= self.vocab_size:
                place = next(p for p, t in enumerate(tokens) if not 0 <= t < self.vocab_size)
                raise InputError(
                    f"prompt {i}, place {place}: token {tokens[place]} is outside of the vocabulary "
                    f"0..{self.vocab_size - 1}"
                )

    def save(self, path: str | Path) -> None:
        """Writes the engine to a new directory, whole or not at all.

        Raises: OutputError: the directory exists, or the disk is full.
        """
        source = self.directory

        def fill(folder: Path) -> None:
            for file in sorted(source.iterdir()):
                shutil.copyfile(file, folder / file.name)

        publish(Path(path), fill)

    def verify(self) -> dict[str, Any]:
        """Compares all digests again and sums up the evidence; see verify_engine. Raises: FormatError."""
        return verify_engine(self.directory)

    def inspect(self) -> dict[str, Any]:
        """What the engine is, what each pass matched and refused, the evidence, and the kernels chosen and why."""
        return inspect_engine(self.directory)

    def profile(self, *inputs: Any) -> list[dict[str, Any]]:
        """Runs once, timing each step -> [{"node", "kind", "name", "us"}]. Language models: input_ids, one prefill."""
        if self.kind != "language_model":
            timed = self.executor.profile(inputs)
        else:
            sequences = self._sequences(inputs[0])
            cache = self.new_cache(len(sequences), max(map(len, sequences)))
            lengths = [len(s) for s in sequences]
            batch = Batch.of_lengths(range(len(lengths)), lengths, [0] * len(lengths))
            slots = torch.tensor([r.slot for r in batch.runs for _ in range(r.stop - r.start)])
            places = torch.cat([torch.arange(n) for n in lengths])
            flat = torch.tensor([t for s in sequences for t in s])
            rows = [torch.arange(len(flat))] if self._selects_rows else []
            timed = self.executor.profile([flat, places, slots, *cache.tensors, *rows], batch)
        return [{"node": s.node, "kind": s.kind, "name": s.name, "us": us} for s, us in timed]

    def counters(self) -> dict[str, Any]:
        """What was counted since the engine was loaded: see runtime/counters.py. Layers are there that have copied
        experts, or a capacity."""
        return summed([self.executor.counters()])

    @contextmanager
    def trace(self, path: str | Path) -> Iterator[None]:
        """Notes what runs inside of the `with` and when, on all ranks, and writes it for Perfetto (timeline.py).

        A clock is read after each step while it lasts. Raises: OutputError: the file cannot be written.
        """
        self._start_recording()
        try:
            yield
        finally:
            self.spans = self._take_spans()
            write_timeline(Path(path), self.spans)

    def _start_recording(self) -> None:
        self.executor.recorder = Recorder()

    def _take_spans(self) -> list[list[Sequence[Any]]]:
        """Ends recording -> the spans of each rank."""
        recorder, self.executor.recorder = self.executor.recorder, None
        return [list(recorder.take()) if recorder is not None else []]

    def serve(self) -> None:
        """On a rank other than 0 of a placed engine: does its part until rank 0 closes."""
        raise InputError("the engine is of one rank, which has nobody to serve; call generate, stream or step")

    def close(self) -> None:
        """Ends the processes of other ranks, where there are any."""

    def keep(self, folder: tempfile.TemporaryDirectory[str]) -> Engine:
        """Ties the life of a temporary directory to the engine's; for engines that were compiled without an output."""
        self._temporary = folder
        return self

    def __repr__(self) -> str:
        model, target = self.manifest["model"], self.manifest["target"]
        return f"Engine({model['model_type']}, {target['kind']}, {self.manifest['weights']}, {self.directory})"


def _is_nested(prompts: Any) -> bool:
    """Whether a list of prompts was given rather than one prompt's tokens."""
    return (
        len(prompts) > 0
        and not isinstance(prompts[0], int)
        and (not isinstance(prompts[0], Tensor) or prompts[0].dim() > 0)
    )


__all__ = ["Engine", "EngineError", "load"]

"""The main job, start to end: compile data/tiny-moe, run it next to transformers, show the ledger, time both.

Usage: python examples/demo.py [--prompt TEXT] [--tokens N] [--keep DIR]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import moec
from moec.cli import _ledger_table

MODEL = Path(__file__).parent / "data" / "tiny-moe"
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", default="The assignment statement")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, interleaved")
    parser.add_argument("--keep", type=Path, help="keep the engine here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = options.keep or Path(scratch) / "tiny-moe.engine"
        started = time.perf_counter()
        moec.compile(str(MODEL), weights="f32", output=path)
        console.print(f"compiled {MODEL.name} in {time.perf_counter() - started:.1f} s")
        engine = moec.load(path)
        show(engine, options)


def show(engine: Any, options: argparse.Namespace) -> None:
    """Prints the ledger, both models' tokens side by side, and the table of speeds."""
    console.print(_ledger_table(engine.inspect()))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    reference = {name: load_reference(name) for name in ("eager", "grouped_mm")}
    ids = tokenizer(options.prompt)["input_ids"]
    ours = engine.generate([ids], max_new_tokens=options.tokens)[0]
    theirs = generate(reference["eager"], ids, options.tokens)
    table = Table(title=f"prompt: {options.prompt!r}", title_justify="left")
    table.add_column("moec")
    table.add_column("transformers (eager)")
    table.add_row(tokenizer.decode(ours), tokenizer.decode(theirs))
    console.print(table)
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    console.print(f"tokens equal: {same} of {len(theirs)}")
    if ours != theirs:
        raise SystemExit("the engine and transformers disagree")
    runs: dict[str, Callable[[int], Any]] = {"moec": lambda n: engine.generate([ids], max_new_tokens=n)}
    for name, model in reference.items():
        runs[f"transformers {name}"] = lambda n, model=model: generate(model, ids, n)
    console.print(speed_table(runs, options.tokens, options.rounds))


def load_reference(experts: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, experts_implementation=experts)
    return model.eval()


@torch.no_grad()
def generate(model: Any, ids: list[int], count: int) -> list[int]:
    """The model's own greedy generate(), exactly `count` tokens."""
    prompt = torch.tensor([ids])
    tokens = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, min_new_tokens=count, max_new_tokens=count
    )
    return tokens[0, len(ids) :].tolist()


def speed_table(runs: dict[str, Callable[[int], Any]], count: int, rounds: int) -> Table:
    """Tokens per second of each, interleaved: medians, and the median of the ratios of moec to it in the same round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run(count)
            if round_:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    table = Table(
        title=f"generate {count} tokens, batch 1, f32, {torch.get_num_threads()} threads", title_justify="left"
    )
    for column in ("", "tokens/s", "moec is faster by"):
        table.add_column(column, justify="left" if not column else "right")
    for name, took in seconds.items():
        ratio = statistics.median(t / m for t, m in zip(took, seconds["moec"], strict=True))
        table.add_row(name, f"{count / statistics.median(took):.1f}", "" if name == "moec" else f"{ratio:.2f}x")
    return table


if __name__ == "__main__":
    main()

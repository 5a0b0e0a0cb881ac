"""Whole engines on a GPU: the CPU engine's logits, and tokens per second next to transformers.

    moec compile zoo:deepseek-moe-16b --layers 4 --random-weights 0 --target cuda:sm_90a -o gpu.engine     # anywhere
    moec compile zoo:deepseek-moe-16b --layers 4 --random-weights 0 -o cpu.engine
    python benchmarks/gpu/engine.py expect cpu.engine --out expected.safetensors                          # on a CPU
    PYTHONPATH=src python benchmarks/gpu/engine.py check gpu.engine expected.safetensors --out engine.json    # GPU
    PYTHONPATH=src python benchmarks/gpu/engine.py peer zoo:deepseek-moe-16b --layers 4 --out peer.json       # GPU

`expect` and `check` need the runtime alone; `peer` needs the compiler and transformers, and random weights of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moec.runtime.engine import Engine, load
from moec.runtime.errors import EngineError

PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 4, 48, 8
TOLERANCE = 0.05
"""Of logits in bfloat16, root mean square over that of the CPU's: both round results in an order of their own."""
BATCHES, PREFILLS, STEPS = (1, 8, 64), (128, 1024), 64


def prompts(vocab_size: int) -> Tensor:
    """The same random prompts everywhere: i64[PROMPTS, PROMPT_LENGTH]."""
    return torch.randint(0, vocab_size, (PROMPTS, PROMPT_LENGTH), generator=torch.Generator().manual_seed(1))


def logits_of(engine: Engine, given: Tensor, fed: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of all rows of a prefill [B, T, V], and of the tokens `fed` [B, n] one after the other [B, n, V]."""
    whole = engine(given).float().cpu()
    cache = engine.new_cache(len(given), given.shape[1] + fed.shape[1])
    slots = [cache.allocate() for _ in given]
    engine.step(cache, slots, given.tolist())
    steps = [engine.step(cache, slots, fed[:, i : i + 1].tolist()).float().cpu() for i in range(fed.shape[1])]
    return whole, torch.stack(steps, 1)


def expect(engine: Engine, out: Path) -> None:
    """What the CPU engine says, for `check`."""
    given = prompts(engine.vocab_size)
    fed = torch.tensor(engine.generate(given, NEW_TOKENS, stop_tokens=[]))
    whole, steps = logits_of(engine, given, fed)
    save_file({"prompts": given, "fed": fed, "prefill": whole, "decode": steps}, out)


def check(engine: Engine, expected: dict[str, Tensor]) -> dict[str, Any]:
    """How far the GPU's logits are from those expected, and how often both prefer the same token."""
    found = logits_of(engine, expected["prompts"], expected["fed"])
    result: dict[str, Any] = {"tolerance": TOLERANCE, "graph_refusal": getattr(engine, "graph_refusal", "no GPU")}
    for name, got in zip(("prefill", "decode"), found, strict=True):
        want = expected[name]
        error = float((got - want).square().mean().sqrt() / want.square().mean().sqrt())
        same = float((got.argmax(-1) == want.argmax(-1)).float().mean())
        result[name] = {"relative_error": error, "same_best_token": same}
    result["right"] = all(result[name]["relative_error"] < TOLERANCE for name in ("prefill", "decode"))
    return result


def rates(decode: Callable[[int], Callable[[], Any]], prefill: Callable[[int], Callable[[], Any]]) -> dict[str, Any]:
    """Tokens per second: decode(batch) and prefill(length) make a step, which waits for its result."""
    found: dict[str, Any] = {"decode": {}, "prefill": {}}
    for batch in BATCHES:
        found["decode"][batch] = batch / _seconds(decode(batch), STEPS)
    for length in PREFILLS:
        found["prefill"][length] = length / _seconds(prefill(length), 4)
    return found


def _seconds(step: Callable[[], Any], repeats: int) -> float:
    """Of one step, after three that are not counted: the first two may capture."""
    for _ in range(3):
        step()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def engine_rates(engine: Engine) -> dict[str, Any]:
    """Tokens per second of an engine."""

    def decode(batch: int) -> Callable[[], Any]:
        cache = engine.new_cache(batch, 128 + STEPS + 8)
        slots = [cache.allocate() for _ in range(batch)]
        engine.step(cache, slots, [[1] * 64] * batch)
        return lambda: engine.step(cache, slots, [[2]] * batch).argmax(-1).tolist()

    def prefill(length: int) -> Callable[[], Any]:
        def step() -> Any:
            cache = engine.new_cache(1, length)
            return engine.step(cache, [cache.allocate()], [[1] * length]).argmax(-1).tolist()

        return step

    return rates(decode, prefill)


def peer_rates(model_name: str, layers: int) -> dict[str, Any]:
    """Tokens per second of transformers with grouped_mm experts, plain and under torch.compile; random weights.

    Raises: ImportError: no transformers.
    """
    from transformers import AutoModelForCausalLM

    from moec.compiler.zoo import zoo_config

    config = zoo_config(model_name.removeprefix("zoo:"), layers)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, experts_implementation="grouped_mm"
        ).eval()
    found = {}
    for name, run in (("transformers", model), ("torch.compile", torch.compile(model))):
        found[name] = _rates_or_reason(run)
    return found


def _rates_or_reason(model: Any) -> Any:
    """The rates of a transformers model, or why there are none."""

    def forward(tokens: Tensor, cache: Any) -> Any:
        with torch.inference_mode():
            return model(tokens, past_key_values=cache, use_cache=True)

    def decode(batch: int) -> Callable[[], Any]:
        state = [forward(torch.ones(batch, 64, dtype=torch.int64, device="cuda"), None).past_key_values]
        token = torch.full((batch, 1), 2, device="cuda")

        def step() -> Any:
            out = forward(token, state[0])
            state[0] = out.past_key_values
            return out.logits[:, -1].argmax(-1).tolist()

        return step

    def prefill(length: int) -> Callable[[], Any]:
        tokens = torch.ones(1, length, dtype=torch.int64, device="cuda")
        return lambda: forward(tokens, None).logits[:, -1].argmax(-1).tolist()

    try:
        return rates(decode, prefill)
    except Exception as error:  # a peer may fail in its own way: it is reported
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("what", choices=("expect", "check", "peer"))
    parser.add_argument("engine", help="an engine's folder; for peer a zoo name")
    parser.add_argument("expected", nargs="?", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.what == "peer":
        options.out.write_text(json.dumps(peer_rates(options.engine, options.layers), indent=1))
        return 0
    try:
        engine = load(options.engine)
        if options.what == "expect":
            expect(engine, options.out)
            return 0
        result = check(engine, load_file(options.expected))
        result["tokens_per_s"] = engine_rates(engine) if result["right"] else None
    except (EngineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    options.out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result))
    return 0 if result["right"] else 1


if __name__ == "__main__":
    sys.exit(main())

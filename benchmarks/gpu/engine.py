"""Whole engines on a GPU: the CPU engine's logits, and tokens per second next to transformers.

    python benchmarks/gpu/engine.py model build/model              # config.json: 4 layers of DeepSeekMoE-16B's shape
    moec compile build/model --random-weights 0 --target cuda:sm_90a -o gpu.engine                       # anywhere
    moec compile build/model --random-weights 0 -o cpu.engine
    python benchmarks/gpu/engine.py expect cpu.engine --out expected.safetensors                         # on a CPU
    PYTHONPATH=src python benchmarks/gpu/engine.py check gpu.engine expected.safetensors --out engine.json   # GPU
    PYTHONPATH=src python benchmarks/gpu/engine.py peer build/model --out peer.json                          # GPU

The model is of a class that transformers has, Qwen2-MoE, so that engine and peer run the same one (benchmarks/
model_systems.py). `expect` and `check` need the runtime alone; `peer` needs transformers. carry.py takes gpu.engine
along without its gigabytes.
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
from moec.runtime.errors import DeviceMemoryError, EngineError

PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 4, 48, 8
TOLERANCE = 0.05
"""Of logits in bfloat16, root mean square over that of the CPU's: both round results in an order of their own."""
BATCHES, PREFILLS, STEPS = (1, 8, 64), (128, 1024), 64
BETWEEN = 512  # tokens of a prefill between decode steps: graphs keep their memory through it
COLUMNS = 8  # one logit of so many is compared: the file stays small


def prompts(vocab_size: int) -> Tensor:
    """The same random prompts everywhere: i64[PROMPTS, PROMPT_LENGTH]."""
    return torch.randint(0, vocab_size, (PROMPTS, PROMPT_LENGTH), generator=torch.Generator().manual_seed(1))


def logits_of(engine: Engine, given: Tensor, fed: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of all rows of a prefill [B, T, V], and of the tokens `fed` [B, n] one after the other [B, n, V]."""
    whole = engine(given).float().cpu()
    cache = engine.new_cache(len(given), given.shape[1] + fed.shape[1])
    slots = [cache.allocate() for _ in given]
    engine.step(cache, slots, given.tolist())
    steps = []
    for i in range(fed.shape[1]):
        steps.append(engine.step(cache, slots, fed[:, i : i + 1].tolist()).float().cpu())
        if i == fed.shape[1] // 2:
            engine(torch.ones(1, BETWEEN, dtype=torch.int64))
    return whole, torch.stack(steps, 1)


def expect(engine: Engine, out: Path) -> None:
    """What the CPU engine says, for `check`."""
    given = prompts(engine.vocab_size)
    fed = torch.tensor(engine.generate(given, NEW_TOKENS, stop_tokens=[]))
    whole, steps = logits_of(engine, given, fed)
    told = {"prompts": given, "fed": fed}
    for name, logits in (("prefill", whole), ("decode", steps)):
        told |= {name: logits[..., ::COLUMNS].contiguous(), f"{name}_best": logits.argmax(-1)}
    save_file(told, out)


def check(engine: Engine, expected: dict[str, Tensor]) -> dict[str, Any]:
    """How far the GPU's logits are from those expected, and how often both prefer the same token."""
    found = logits_of(engine, expected["prompts"], expected["fed"])
    result: dict[str, Any] = {"tolerance": TOLERANCE, "graph_refusal": getattr(engine, "graph_refusal", "no GPU")}
    for name, got in zip(("prefill", "decode"), found, strict=True):
        want, some = expected[name], got[..., ::COLUMNS]
        error = float((some - want).square().mean().sqrt() / want.square().mean().sqrt())
        same = float((got.argmax(-1) == expected[f"{name}_best"]).float().mean())
        result[name] = {"relative_error": error, "same_best_token": same}
    result["right"] = all(result[name]["relative_error"] < TOLERANCE for name in ("prefill", "decode"))
    return result


def waits(engine: Engine) -> str | None:
    """What in a decode step waits for the device, as torch's own guard says; None: nothing, or there is no device."""
    cache = engine.new_cache(2, 16)
    slots = [cache.allocate() for _ in range(2)]
    for _ in range(3):  # as it is, captured, replayed
        engine.step(cache, slots, [[1], [2]])
    if not torch.cuda.is_available():
        return None
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.step(cache, slots, [[1], [2]])
    except RuntimeError as error:
        return (str(error).splitlines() or [""])[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def scarce(folder: Path) -> str:
    """What loading says where all but a gigabyte of the GPU is taken. Raises: RuntimeError: it loaded all the same."""
    if not torch.cuda.is_available():
        return "no GPU"
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free - (1 << 30), dtype=torch.uint8, device="cuda")
    try:
        load(folder)
    except DeviceMemoryError as error:
        return str(error)
    finally:
        del taken
        torch.cuda.empty_cache()
    raise RuntimeError("an engine was loaded where there was no memory for it")


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


def peer_rates(folder: Path, device: str) -> dict[str, Any]:
    """Tokens per second of transformers with grouped_mm experts, plain and under torch.compile; random weights.

    folder: with config.json. Raises: ImportError: no transformers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, experts_implementation="grouped_mm"
        ).eval()
    runs = {"transformers": model, "torch.compile": torch.compile(model)}
    return {name: _rates_or_reason(run, device) for name, run in runs.items()}


def _rates_or_reason(model: Any, device: str) -> Any:
    """The rates of a transformers model, or why there are none."""

    def forward(tokens: Tensor, cache: Any) -> Any:
        with torch.inference_mode():
            return model(tokens, past_key_values=cache, use_cache=True)

    def decode(batch: int) -> Callable[[], Any]:
        state = [forward(torch.ones(batch, 64, dtype=torch.int64, device=device), None).past_key_values]
        token = torch.full((batch, 1), 2, device=device)

        def step() -> Any:
            out = forward(token, state[0])
            state[0] = out.past_key_values
            return out.logits[:, -1].argmax(-1).tolist()

        return step

    def prefill(length: int) -> Callable[[], Any]:
        tokens = torch.ones(1, length, dtype=torch.int64, device=device)
        return lambda: forward(tokens, None).logits[:, -1].argmax(-1).tolist()

    try:
        return rates(decode, prefill)
    except Exception as error:  # a peer may fail in its own way: it is reported
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def write_model(folder: Path) -> None:
    """The folder that `moec compile` and `peer` read."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from model_systems import CONFIG

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("what", choices=("model", "expect", "check", "peer"))
    parser.add_argument("folder", type=Path, help="an engine's; for model and peer one with config.json")
    parser.add_argument("expected", nargs="?", type=Path)
    parser.add_argument("--device", default="cuda", help="of peer")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if (options.what != "model" and options.out is None) or (options.what == "check" and options.expected is None):
        parser.error("check needs the expected logits and --out, expect and peer need --out")
    try:
        if options.what == "model":
            write_model(options.folder)
        elif options.what == "peer":
            options.out.write_text(json.dumps(peer_rates(options.folder, options.device), indent=1))
        elif options.what == "expect":
            expect(load(options.folder), options.out)
        else:
            return report(options.folder, load_file(options.expected), options.out)
    except (EngineError, ImportError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def report(folder: Path, expected: dict[str, Tensor], out: Path) -> int:
    """Writes what `check` and the like find, and the rates of an engine that is right; -> the exit code."""
    without_memory = scarce(folder)
    engine = load(folder)
    result = check(engine, expected) | {"without_memory": without_memory, "waits": waits(engine)}
    result["tokens_per_s"] = engine_rates(engine) if result["right"] else None
    out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result))
    return 0 if result["right"] else 1


if __name__ == "__main__":
    sys.exit(main())

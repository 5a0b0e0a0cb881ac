"""Compiles every MoE family that transformers has as a causal language model, tiny, and compares it with the original.

    python benchmarks/family_sweep.py [--families mixtral,gpt_oss] [--json F] [--write]

Each model is written as a checkpoint, compiled from the directory to an engine, and must give the original's logits and
greedy tokens: all prompts in one batch, and one by one with the prompt fed in two parts. --write makes docs/models.md
of the rows (all families only). families.json has the sizes. Exit code 1 where an engine answers something else.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from results_file import write_json
from rich.console import Console
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

import moec
from moec.compiler.errors import CompileError
from moec.runtime.engine import Engine

TABLE = Path(__file__).with_name("families.json")
DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
PROMPT_LENGTHS, STEPS = (5, 13, 1, 9), 8
# float32 sums taken in another order than the library's
REL_TOLERANCE = 1e-5
PASSES = {"gates": "lift-gate", "norms": "lift-norm", "ropes": "lift-rope", "experts": "group-expert-gemms"}
OK, REFUSED, WRONG, FAILED = "ok", "refused", "wrong", "failed"
console = Console()


@dataclasses.dataclass
class Row:
    """What became of one family.

    status: "ok"; "refused" by the compiler, with its reason; "wrong": the engine answers something else; "failed": an
        error that is no refusal.
    gate: the lifted gate in words.  sites: what -> "matched/looked at".  error: greatest relative logit error.
    """

    family: str
    status: str
    reason: str = ""
    gate: str = ""
    sites: dict[str, str] = dataclasses.field(default_factory=dict)
    error: float | None = None
    seconds: float = 0.0


def families() -> dict[str, dict[str, Any]]:
    """model_type -> the values of its tiny configuration."""
    table = json.loads(TABLE.read_text())

    def whole(values: dict[str, Any]) -> dict[str, Any]:
        if "text_config" in values:
            return {**values, "text_config": whole(values["text_config"])}
        absent = {k for k, v in values.items() if v is None}
        return {k: v for k, v in {**table["common"], **values}.items() if k not in absent}

    return {family: whole(values) for family, values in table["families"].items()}


def build(family: str, values: dict[str, Any]) -> Any:
    """The tiny model in float32 with seeded weights: normal * 0.15, norm weights near their start, biases not zero."""
    config = CONFIG_MAPPING[family](**values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            centre = p.mean() if p.dim() == 1 and "norm" in name else 0.0  # 1, or 0 where the norm adds 1
            p.copy_(torch.randn(p.shape, generator=generator) * 0.15 + centre)
        for name, b in model.named_buffers():
            if "bias" in name and b.is_floating_point():
                b.copy_(torch.randn(b.shape, generator=generator) * 0.05)
            elif name.endswith("tid2eid"):  # DeepSeek-V4's experts by token: all expert 0 in a new model
                order = torch.rand(b.shape[0], config.n_routed_experts, generator=generator).argsort(1)
                b.copy_(order[:, : b.shape[1]])
    return model


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 128, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def expected(model: Any, prompt: list[int]) -> torch.Tensor:
    """What the library gives: logits [STEPS, V] of its greedy tokens."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.cat(out.logits)


def batched(engine: Engine) -> list[torch.Tensor]:
    """Logits [STEPS, V] of each prompt's greedy tokens, all prompts in one ragged batch."""
    asked = prompts()
    cache = engine.new_cache(len(asked), max(PROMPT_LENGTHS) + STEPS)
    slots = [cache.allocate() for _ in asked]
    rows = [engine.step(cache, slots, asked).clone()]
    while len(rows) < STEPS:
        rows.append(engine.step(cache, slots, rows[-1].argmax(-1)[:, None].tolist()).clone())
    return list(torch.stack(rows, 1))


def alone(engine: Engine, prompt: list[int]) -> torch.Tensor:
    """The same of one prompt by itself, which is fed in two parts."""
    cache = engine.new_cache(1, len(prompt) + STEPS)
    slots, half = [cache.allocate()], len(prompt) // 2
    if half:
        engine.step(cache, slots, [prompt[:half]])
    rows = [engine.step(cache, slots, [prompt[half:]]).clone()]
    while len(rows) < STEPS:
        rows.append(engine.step(cache, slots, rows[-1].argmax(-1)[:, None].tolist()).clone())
    return torch.cat(rows)


def compare(engine: Engine, model: Any) -> tuple[float, bool]:
    """The greatest relative logit error, and whether all greedy tokens are equal."""
    wanted = [expected(model, p) for p in prompts()]
    error, equal = 0.0, True
    for found in (batched(engine), [alone(engine, p) for p in prompts()]):
        for a, b in zip(found, wanted, strict=True):
            error = max(error, float((a - b).abs().max() / b.abs().max()))
            equal = equal and torch.equal(a.argmax(-1), b.argmax(-1)) and bool(torch.isfinite(a).all())
    return error, equal


def study(family: str, values: dict[str, Any]) -> Row:
    """Builds, compiles and compares one family; never raises."""
    start = time.perf_counter()
    try:
        row = _study(family, values)
    except CompileError as refusal:
        row = Row(family, REFUSED, str(refusal))
    except Exception as error:  # a defect of ours or a configuration that the library does not take: listed as such
        row = Row(family, FAILED, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}")
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def _study(family: str, values: dict[str, Any]) -> Row:
    model = build(family, values)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine, note = compiled(model, folder)
    error, equal = compare(engine, model)
    facts = engine.inspect()
    status = OK if equal and error <= REL_TOLERANCE else WRONG
    if not equal:
        note = "greedy tokens differ"
    elif status == WRONG:
        note = "logits differ"
    return Row(family, status, note, describe(facts["gate"]), sites(facts), error)


def compiled(model: Any, folder: str) -> tuple[Engine, str]:
    """The engine of the saved checkpoint; where that is refused, of the model in memory, and a note that says so.

    Raises: CompileError: both are refused; the reason is that of the model in memory.
    """
    try:
        return moec.compile(folder, verify="off"), ""
    except CompileError:
        return moec.compile(model, verify="off"), "ok, from a model in memory; its directory is refused"


def sites(facts: dict[str, Any]) -> dict[str, str]:
    """What the passes matched, of what they looked at."""
    ledger = facts["ledger"]
    counts = {what: (ledger[p]["matched"], len(ledger[p]["refused"])) for what, p in PASSES.items()}
    return {what: f"{matched}/{matched + refused}" for what, (matched, refused) in counts.items()}


def describe(gate: dict[str, Any] | None) -> str:
    """A gate in words. gate: a GateSpec's fields without the defaults."""
    if gate is None:
        return "not lifted"
    score = gate.get("score", "softmax")
    first = f"top {gate['top_k']}" if gate.get("order") == "topk_then_score" else score
    second = score if gate.get("order") == "topk_then_score" else f"top {gate['top_k']}"
    words = [f"{first}, {second}"]
    if gate.get("transform"):
        words.insert(0, f"{gate['transform']} {gate.get('transform_param', 0):g}")
    if gate.get("bias_on"):
        words.append(f"bias on {gate['bias_on']}")
    if gate.get("num_groups", 1) > 1:
        words.append(f"{gate.get('groups_kept', 1)} of {gate['num_groups']} groups by {gate.get('group_score', 'max')}")
    if gate.get("renormalise"):
        rule = {"add": "+", "clamp": "at least "}[gate.get("renorm_rule", "add")]
        words.append(f"renormalised ({rule}{gate['renorm_eps']:g})" if gate.get("renorm_eps") else "renormalised")
    if gate.get("scale", 1.0) != 1.0:
        words.append(f"times {gate['scale']:g}")
    return ", ".join(words)


INTRODUCTION = """\
# Models

Every mixture-of-experts family that transformers {version} ships as a causal language model, {total} entries. Made by
`python benchmarks/family_sweep.py --write`: each is built tiny from its configuration class (benchmarks/families.json),
written as a checkpoint, compiled to a float32 engine from that directory, and compared with the original's own
`generate`: greedy, {prompts} prompts of {lengths} tokens, {steps} new tokens, in one batch and one by one.
"ok" means that all tokens are equal and that the logits differ by at most {tolerance:g} of the largest.

{ok} agree, {refused} are refused, {failed} fail, {wrong} are wrong. A refusal is one line of error at compile time; no
model is compiled to something else. Sites are what the passes matched, of what they looked at. The families that moec
brings itself (Skywork-MoE, XVERSE-MoE, DeepSeekMoE, Grok-1) are in compiler/families and have tests of their own.
"""


def document(rows: list[Row]) -> str:
    """The text of docs/models.md."""
    from transformers import __version__

    count = {s: sum(r.status == s for r in rows) for s in (OK, REFUSED, FAILED, WRONG)}
    text = INTRODUCTION.format(
        version=__version__,
        total=len(rows),
        prompts=len(PROMPT_LENGTHS),
        lengths=", ".join(map(str, PROMPT_LENGTHS)),
        steps=STEPS,
        tolerance=REL_TOLERANCE,
        **count,
    )
    lines = ["## Compiled", "", "| Family | Gate | Gates | Norms | Ropes | Experts | Error | |", "|" + "---|" * 8]
    for r in (r for r in rows if r.error is not None):
        cells = [f"`{r.family}`", r.gate, *(r.sites[what] for what in PASSES), f"{r.error:.1e}"]
        verdict = (r.reason or OK) if r.status == OK else f"**wrong: {r.reason}**"
        lines.append(f"| {' | '.join([*cells, verdict])} |")
    without = [f"| `{r.family}` | {r.status} | {r.reason.replace('|', '/')} |" for r in rows if r.error is None]
    lines += ["", "## Not compiled", "", "| Family | | Reason |", "|---|---|---|", *without] if without else []
    return text + "\n" + "\n".join(lines) + "\n"


def main(
    chosen: Annotated[str, typer.Option("--families", help="model types, separated by commas; all by default")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows here")] = None,
    write: Annotated[bool, typer.Option("--write", help="write docs/models.md")] = False,
) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    table = families()
    names = chosen.split(",") if chosen else list(table)
    unknown = [n for n in names if n not in table]
    if unknown or (write and chosen):
        fault = f"unknown families {unknown}" if unknown else "--write needs all families"
        raise typer.BadParameter(f"{fault}; {TABLE.name} lists them")
    rows = []
    for name in names:
        rows.append(row := study(name, table[name]))
        error = "" if row.error is None else f"{row.error:.1e} {row.sites}"
        console.print(
            f"{name:20} {row.status:8} {row.seconds:5} s  {error} {row.reason}", highlight=False, soft_wrap=True
        )
    write_json(json_file, rows)
    if write:
        DOCUMENT.write_text(document(rows))
    raise typer.Exit(int(any(r.status == WRONG for r in rows)))


if __name__ == "__main__":
    typer.run(main)

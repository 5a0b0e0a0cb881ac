"""What each weight format costs in quality and saves in bytes, on the trained model of the repository.

    python benchmarks/format_quality.py [--formats int8,int4-g32,..] [--tokens N] [--json F] [--markdown docs/FILE.md]

The model's experts are stored in each format in turn, everything else and all arithmetic is float32 (the row
"model=bf16" is the whole model in bfloat16). Measured on held-out text against float32: perplexity; routing, the share
of chosen experts that are the same, over all layers; logits, root mean square of the difference over that of the
logits.
Exit code 1 where a format misses its goal.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from results_file import write_json
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from moec.compiler.calibration import weight_plan
from moec.compiler.capture import capture
from moec.compiler.lowering.emit import lower
from moec.compiler.lowering.packing import make
from moec.compiler.weights_option import parse_weights
from moec.passes.infra.base import PassContext
from moec.passes.ir.formats import NAMES, FormatError, parse_format
from moec.passes.ir.quantised import formats_of
from moec.passes.ir.weights import weights_of
from moec.passes.pipeline import run_pipeline
from moec.passes.quantise_weights import QuantiseWeights
from moec.runtime.batch import Batch
from moec.runtime.executor import Executor

ROOT = Path(__file__).parents[1]
MODEL, TEXT = ROOT / "examples" / "data" / "tiny-moe", ROOT / "examples" / "data" / "heldout.txt"
CONTEXT = 512
REFERENCE = "f32"
GOALS = {
    "model=bf16": 0.5,
    "f16": 0.5,
    "fp8": 0.5,
    "fp8-tensor": 0.5,
    "fp8-block128": 0.5,
    "int8": 0.5,
    "int4-g32": 4.0,
}
"""Largest rise of the perplexity over float32, in percent."""
SIZES = ("auto:3.0bits", "auto-layers:3.0bits", "auto:2.5bits")
BEGIN, END = "<!-- generated: quality -->", "<!-- end of generated: quality -->"


@dataclasses.dataclass(frozen=True)
class Seen:
    """logits [T, V]; chosen: expert indices [T, K] of each layer; sizes of the experts alone."""

    logits: Tensor
    chosen: list[Tensor]
    expert_bytes: int
    expert_values: int


@dataclasses.dataclass(frozen=True)
class Quality:
    """One row. rise, routing and logits: against float32; percent, share, relative error."""

    name: str
    bits: float
    expert_bytes: int
    perplexity: float
    rise: float
    routing: float
    logits: float
    note: str = ""


def windows(count: int | None) -> list[Tensor]:
    """The held-out text in windows of the model's context less one."""
    ids = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(TEXT.read_text(encoding="utf-8")).ids
    return list(torch.tensor(ids[:count]).split(CONTEXT - 1))


@torch.no_grad()
def look(weights: str, texts: Sequence[Tensor]) -> Seen:
    """Runs the model with experts stored so, by the library's functions, on all windows at once."""
    option = parse_weights(weights)
    captured = capture(MODEL, dtype=option.dtype or torch.float32)
    plan = weight_plan(option, captured)
    context = PassContext(read=captured.read, options={QuantiseWeights.name: plan})
    gm = run_pipeline(captured.graph_module, context, evidence="off").graph
    gates = gm.graph.find_nodes(op="call_function", target=torch.ops.moec.gate_linear.default)
    chosen = [next(u for u in g.users if u.args[1] == 1) for g in gates]
    end = gm.graph.output_node()
    end.args = ([*_as_list(end.args[0]), *chosen],)
    lowered = lower(dataclasses.replace(captured, graph_module=gm, kind="module"))
    made = {name: make(w, captured.read) for name, w in lowered.weights.items()}
    inputs, batch = _inputs(captured, texts)
    logits, *experts = Executor(lowered.program, made, {})(inputs, batch)
    return Seen(logits.float(), experts, *_expert_size(gm))


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _inputs(captured: Any, texts: Sequence[Tensor]) -> tuple[list[Tensor], Batch]:
    """Every window behind one end-of-text token, each a sequence of its own in empty caches."""
    starts = [torch.cat([torch.tensor(captured.info.eos_token_ids[:1]), t[:-1]]) for t in texts]
    lengths = [len(s) for s in starts]
    positions = torch.cat([torch.arange(n) for n in lengths])
    slots = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    caches = [torch.zeros(len(texts), CONTEXT, *c.shape, dtype=c.dtype) for c in captured.info.caches]
    batch = Batch.of_lengths(range(len(lengths)), lengths, [0] * len(lengths))
    return [torch.cat(starts), positions, slots, *caches], batch


def _expert_size(gm: torch.fx.GraphModule) -> tuple[int, int]:
    """Bytes and values of the stacks of experts that the graph reads."""
    read = {str(n.target) for n in gm.graph.find_nodes(op="get_attr")}
    stacks = [w for name, w in weights_of(gm).items() if name in read and len(w.shape) == 3]
    total = values = 0
    for w in stacks:
        count, rows, columns = w.shape
        formats = formats_of(w)
        each = formats * count if len(formats) == 1 else formats
        total += sum(f.matrix_bytes(rows, columns) for f in each) if formats else w.num_bytes
        values += count * rows * columns
    return total, values


def compare(name: str, seen: Seen, reference: Seen, texts: Sequence[Tensor]) -> Quality:
    """The row of one format."""
    targets = torch.cat(list(texts))
    ours, exact = (math.exp(float(F.cross_entropy(s.logits, targets))) for s in (seen, reference))
    same = [
        (a[:, :, None] == b[:, None]).any(-1).float().mean() for a, b in zip(seen.chosen, reference.chosen, strict=True)
    ]
    error = (seen.logits - reference.logits).square().mean().sqrt() / reference.logits.square().mean().sqrt()
    return Quality(
        name,
        8 * seen.expert_bytes / seen.expert_values,
        seen.expert_bytes,
        ours,
        100 * (ours / exact - 1),
        float(torch.stack(same).mean()),
        float(error),
    )


def measure(names: Sequence[str], tokens: int | None = None) -> list[Quality]:
    """One row for each name, in order; a format that the model's widths do not allow has a note instead of figures."""
    texts = windows(tokens)
    reference = look("f32", texts)
    rows = []
    for name in names:
        try:
            seen = reference if name == REFERENCE else look(name if "=" in name else f"model=f32,experts={name}", texts)
        except Exception as error:
            if not isinstance(error.__cause__, FormatError):
                raise
            rows.append(
                Quality(name, math.nan, 0, math.nan, math.nan, math.nan, math.nan, "does not divide 192 and 64")
            )
            continue
        rows.append(compare(name, seen, reference, texts))
        sys.stderr.write(f"{name}: perplexity {rows[-1].perplexity:.3f} ({rows[-1].rise:+.2f} %)\n")
    return rows


def table(rows: Sequence[Quality]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| experts stored as | bits a value | bytes | perplexity | against f32 | same experts chosen | logit error |"
    ]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for r in rows:
        if r.note:
            lines.append(f"| {r.name} | {parse_format(r.name).bits:g} + scales | {r.note} | | | | |")
            continue
        lines.append(
            f"| {r.name} | {r.bits:.3f} | {r.expert_bytes:,} | {r.perplexity:.2f} | {r.rise:+.2f} % | "
            f"{100 * r.routing:.1f} % | {r.logits:.4f} |"
        )
    return "\n".join(lines)


def missed(rows: Sequence[Quality]) -> list[str]:
    """Goals that are not met, in words."""
    return [
        f"{r.name}: perplexity {r.rise:+.2f} %, expected at most {GOALS[r.name]} %"
        for r in rows
        if r.name in GOALS and not r.rise <= GOALS[r.name]
    ]


def main(
    formats: Annotated[str, typer.Option(help="comma-separated; default: all")] = "",
    tokens: Annotated[int | None, typer.Option(help="of the held-out text; default: all")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    markdown: Annotated[Path | None, typer.Option(help="a page whose generated table to replace")] = None,
) -> None:
    """Measures, prints the table, and fails where a goal is missed."""
    names = formats.split(",") if formats else [REFERENCE, "model=bf16", *NAMES[2:], *SIZES]
    rows = measure(names, tokens)
    text = table(rows)
    sys.stdout.write(text + "\n")
    write_json(json_file, rows)
    if markdown:
        page = markdown.read_text(encoding="utf-8")
        head, rest = page.split(BEGIN)
        markdown.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    bad = missed(rows)
    for line in bad:
        sys.stderr.write(f"missed: {line}\n")
    raise typer.Exit(1 if bad else 0)


if __name__ == "__main__":
    typer.run(main)

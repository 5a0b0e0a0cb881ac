"""Writes tiny models of every family as ONNX, in both forms, and compares ONNX Runtime's answers with the model's own.

    PYTHONPATH=tests/support python benchmarks/onnx_sweep.py [--families mixtral,gpt_oss] [--all] [--json F] [--write]

Without --all: the zoo of the tests and the families of compiler/families; with it also benchmarks/families.json. The
reference is the family's own code (transformers or compiler/families), not moec's graph. --write puts the table into
docs/onnx.md. Exit code 1 where a file answers something else, or its nodes grow with the number of experts.
"""

from __future__ import annotations

import dataclasses
import gc
import tempfile
from pathlib import Path
from typing import Annotated, Any

import family_sweep
import numpy as np
import torch
import typer
import zoo
from results_file import write_json
from rich.console import Console

from moec.compiler.capture import capture
from moec.compiler.errors import CompileError
from moec.compiler.export.onnx.api import KINDS
from moec.compiler.export.onnx.interface import interface_of
from moec.compiler.export.onnx.publish import prepare, publish
from moec.compiler.export.onnx.session import open_session
from moec.compiler.export.onnx.translate import translate
from moec.passes.infra.base import PassContext
from moec.passes.infra.runner import run_passes
from moec.passes.pipeline import CANONICALISE

DOCUMENT = Path(__file__).parents[1] / "docs" / "onnx.md"
BEGIN, END = "<!-- sweep -->", "<!-- end of sweep -->"
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOKENS, TOLERANCE = 9, 1e-4
console = Console()


@dataclasses.dataclass
class Row:
    """What became of one family.

    forms: kind -> {"error", "nodes"} or {"refused"}.  nodes_more: of the portable form, with twice the experts.
    """

    family: str
    experts: str = ""
    forms: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    nodes_more: int | None = None

    @property
    def wrong(self) -> bool:
        errors = [f["error"] for f in self.forms.values() if "error" in f]
        portable = self.forms.get("portable", {})
        grows = self.nodes_more is not None and self.nodes_more != portable.get("nodes", self.nodes_more)
        return any(not e <= TOLERANCE for e in errors) or grows


def quiet(stage: str, done: int, total: int) -> None:
    """No progress."""


def check(family: str, model: Any, larger: Any) -> Row:
    """One family. larger: a model of twice the experts, or None."""
    row = Row(family)
    ids = torch.randint(2, 100, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(ids).logits
    try:
        prepared = prepare(capture(model), None, quiet)
    except CompileError as error:
        row.forms = {kind: {"refused": str(error)} for kind in KINDS}
        return row
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                made = publish(prepared, Path(folder) / "model.onnx", kind, 21, quiet)
            except CompileError as error:
                row.forms[kind] = {"refused": str(error)}
                continue
            error = compare(made.path, ids, expected)
            row.forms[kind] = {"error": error, "nodes": made.nodes}
            covered = made.record["coverage"]
            row.experts = f"{len(covered)} x {covered[0]['experts']}" if covered else "none"
    if larger is not None and "nodes" in row.forms["portable"]:
        row.nodes_more = count_nodes(larger)
    return row


def compare(path: Path, ids: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest relative error of all logits: the prompt in one call."""
    session = open_session(path, threads=1)
    feed = {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64)}
    for port in session.get_inputs()[2:]:
        feed[port.name] = np.zeros([len(ids), *(d if isinstance(d, int) else 0 for d in port.shape[1:])], np.float32)
    logits = torch.from_numpy(session.run(["logits"], feed)[0])
    return float((logits - expected).abs().max() / expected.abs().max())


def count_nodes(model: Any) -> int:
    captured = capture(model)
    interface = interface_of(captured)
    result = run_passes(captured.graph_module, CANONICALISE, PassContext(read=captured.read))
    captured = dataclasses.replace(captured, graph_module=result.graph)
    return len(translate(captured, interface, "portable", 21).model.graph)


def zoo_models(family: str) -> tuple[Any, Any]:
    """The tiny model, and one with twice the experts where the configuration has one number for them."""
    config = zoo.tiny(family)
    key = next((k for k in COUNTS if isinstance(getattr(config, k, None), int)), None)
    larger = None if key is None else zoo.build(zoo.tiny(family, **{key: 2 * getattr(config, key)}))
    return zoo.build(config), larger


def markdown(rows: list[Row]) -> str:
    lines = ["| family | experts | portable | com.microsoft |", "|---|---|---|---|"]
    for row in rows:
        cells = [cell(row, kind) for kind in KINDS]
        lines.append(f"| {row.family} | {row.experts} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(row: Row, kind: str) -> str:
    form = row.forms[kind]
    if "refused" in form:
        return "refused: " + form["refused"].replace("|", "\\|")
    same = " (as many with twice the experts)" if kind == "portable" and row.nodes_more == form["nodes"] else ""
    return f"{form['error']:.1e}, {form['nodes']} nodes{same}"


def main(
    families: Annotated[str, typer.Option(help="comma-separated; default: all")] = "",
    every: Annotated[bool, typer.Option("--all", help="benchmarks/families.json, too")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the rows here")] = None,
    write_table: Annotated[bool, typer.Option("--write", help="put the table into docs/onnx.md")] = False,
) -> None:
    torch.set_num_threads(1)
    asked = [f for f in families.split(",") if f]
    known = {**zoo.TINY, **zoo.OWN}
    more = {f: values for f, values in family_sweep.families().items() if f not in known} if every or asked else {}
    rows = []
    for family in asked or [*known, *more]:
        model, larger = zoo_models(family) if family in known else (family_sweep.build(family, more[family]), None)
        row = check(family, model, larger)
        rows.append(row)
        console.print(f"{family}: {'; '.join(f'{k}: {cell(row, k)}' for k in KINDS)}", soft_wrap=True, highlight=False)
        del model, larger
        gc.collect()
        write_json(json_file, rows)
    if write_table:
        text = DOCUMENT.read_text()
        before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
        DOCUMENT.write_text(f"{before}\n\n{markdown(rows)}\n{after}")
    raise typer.Exit(any(row.wrong for row in rows))


if __name__ == "__main__":
    typer.run(main)

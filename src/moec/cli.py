"""The command line: every command is a thin face over the Python API, and fails in one line."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moec.compiler.export.onnx.command import register as register_export_onnx
from moec.compiler.plan.command import register as register_plan
from moec.compiler.terminal import (
    Json,
    Layers,
    Model,
    RandomWeights,
    Trust,
    TrustPt2,
    print_json,
    progress_bar,
    whole_numbers,
)
from moec.compiler.tune.command import register as register_tune
from moec.compiler.tune.data_command import register as register_tune_data
from moec.compiler.tune.trace_command import register as register_trace

app = typer.Typer(
    help="moec compiles Mixture-of-Experts models into engines that a small runtime executes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

register_plan(app)
register_tune_data(app)
register_tune()
register_trace(app)
register_export_onnx(app)

WEIGHTS_HELP = (
    "f32 or bf16; a format for the experts (int4, int8, bf16-packed, ..); formats by kind "
    "(experts=int4-g64,attention=int8); or a size (auto:8GB, auto:3.0bits). Default: as in the checkpoint"
)


@app.command(name="compile")
def compile_(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="engine folder to write; must not exist")],
    target: Annotated[
        str, typer.Option(help="cpu, cpu:amx, cpu:avx512, cpu:avx2, or cuda:sm_90a and the like")
    ] = "cpu",
    weights: Annotated[str | None, typer.Option(help=WEIGHTS_HELP)] = None,
    layers: Layers = None,
    random_weights: RandomWeights = None,
    trust_remote_code: Trust = False,
    trust_pt2: TrustPt2 = False,
    kv_cache: Annotated[str | None, typer.Option(help="int8: keys and values as codes with scales")] = None,
    verify: Annotated[str, typer.Option(help="evidence for every rewrite: off, sampled or full")] = "sampled",
    dump: Annotated[Path | None, typer.Option(help="write the graph's text before and after every pass")] = None,
    tune_db: Annotated[Path | None, typer.Option(help="configure the expert kernels by this tuning database")] = None,
    combine: Annotated[str, typer.Option(help="ordered; of a GPU, fast: atomic sums, last bits vary")] = "ordered",
    devices: Annotated[int | None, typer.Option(help="for so many ranks, CPU processes")] = None,
    mesh: Annotated[str | None, typer.Option(help="for a rank per device of a mesh, as for plan")] = None,
    strategy: Annotated[str | None, typer.Option(help="how to spread it, as for plan; default: the fastest")] = None,
    chunks: Annotated[int, typer.Option(help="send tokens to their experts in so many parts")] = 1,
    capacity: Annotated[float | None, typer.Option(help="drop slots beyond this many times the mean load")] = None,
    capacity_per: Annotated[str, typer.Option(help="whose load: device or expert")] = "device",
    trace: Annotated[Path | None, typer.Option(help="place experts by this recorded routing; default: Zipf")] = None,
    as_json: Json = False,
) -> None:
    """Compile MODEL into an engine folder; with --devices or --mesh for several ranks."""
    import moec
    from moec.compiler.errors import CompileError
    from moec.runtime.reports import inspect_engine

    shared: dict[str, Any] = {
        "target": target, "weights": weights, "layers": layers, "random_weights": random_weights,
        "trust_remote_code": trust_remote_code, "verify": verify, "tune_db": tune_db, "combine": combine,
    }  # fmt: skip
    if devices is not None or mesh is not None:
        if kv_cache is not None or dump is not None:
            raise CompileError("--kv-cache and --dump work for one rank; leave them out with --devices and --mesh")
        ranks = moec.RankOptions(mesh, devices, strategy, chunks, capacity, capacity_per, trace)
        with progress_bar(as_json) as progress:
            manifest = moec.compile_ranks(model, output, ranks, progress=progress, **shared)
        _print_ranks(manifest, output, as_json)
        return
    if any(given is not None for given in (strategy, capacity, trace)):
        raise CompileError(
            "--strategy, --capacity and --trace are for placed engines; give --devices or --mesh as well"
        )
    with progress_bar(as_json) as progress:
        moec.compile_to(model, output, trust_pt2=trust_pt2, kv_cache=kv_cache, dump=dump, progress=progress, **shared)
    report = inspect_engine(output)
    if as_json:
        print_json(report)
        return
    out.print(_ledger_table(report))
    out.print(f"engine: {output}", soft_wrap=True)


def _print_ranks(manifest: dict[str, Any], output: Path, as_json: bool) -> None:
    """What became of a placed engine: its placement."""
    where = manifest["placement"]
    if as_json:
        print_json(where)
        return
    told = f"{manifest['ranks']} ranks, {where['strategy']} on {where['mesh']}; engine: {output}"
    out.print(told, soft_wrap=True)


@app.command()
def run(
    engine: Annotated[Path, typer.Argument(help="engine folder")],
    tokens: Annotated[str | None, typer.Option(help="comma-separated token ids")] = None,
    prompt: Annotated[str | None, typer.Option(help="text; needs the engine's tokenizer")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0: all")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    trace_out: Annotated[Path | None, typer.Option(help="write what ran when, for ui.perfetto.dev")] = None,
    as_json: Json = False,
) -> None:
    """Generate from a prompt; text appears as it is made. Ranks of a placed engine are started here, or joined."""
    import moec
    from moec.runtime.errors import EngineError
    from moec.runtime.timeline import overlap

    if (tokens is None) == (prompt is None):
        raise EngineError("run: give exactly one of --tokens and --prompt")
    loaded = moec.load(engine)
    if loaded.rank:
        loaded.serve()
        return
    tokenizer = _tokenizer(loaded.directory, needed=prompt is not None)
    ids = whole_numbers(tokens, "--tokens") if tokens is not None else tokenizer.encode(prompt).ids
    made: list[int] = []
    started = time.perf_counter()
    times = [started]
    shown = "" if tokenizer is None else tokenizer.decode(ids)
    if not as_json:
        sys.stdout.write(shown)
    with nullcontext() if trace_out is None else loaded.trace(trace_out):
        for event in loaded.stream([ids], max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed):
            times.append(time.perf_counter())
            made.append(event.token)
            text = f" {event.token}" if tokenizer is None else tokenizer.decode(ids + made)[len(shown) :]
            if not as_json:
                sys.stdout.write(text)
                sys.stdout.flush()
            shown += text
    counters = loaded.counters()
    loaded.close()
    prefill_ms = (times[1] - started) * 1e3
    decode = (len(made) - 1) / (times[-1] - times[1]) if len(made) > 1 else 0.0
    if as_json:
        text = "" if tokenizer is None else tokenizer.decode(made)
        speed = {"prefill_ms": prefill_ms, "decode_tokens_per_s": decode}
        traced = {"overlap": [overlap(spans) for spans in loaded.spans]} if trace_out is not None else {}
        print_json({"tokens": made, "text": text, **speed, "counters": counters, **traced})
        return
    sys.stdout.write("\n")
    if counters["dropped"]:
        err.print(f"{counters['dropped']} of {counters['slots']} slots of experts were beyond the capacity")
    err.print(f"prefill {prefill_ms:.1f} ms, decode {decode:.1f} tokens/s")


def _tokenizer(engine: Path, needed: bool) -> Any:
    """The engine's tokenizer; None where it has none and none is needed."""
    from moec.runtime.errors import EngineError

    file = engine / "tokenizer.json"
    try:
        from tokenizers import Tokenizer
    except ImportError as missing:
        if needed:
            raise EngineError(
                "--prompt needs the package tokenizers: pip install tokenizers, or give --tokens"
            ) from missing
        return None
    if not file.is_file():
        if needed:
            raise EngineError(f"{engine} has no tokenizer.json: give --tokens instead of --prompt")
        return None
    return Tokenizer.from_file(str(file))


def _ledger_table(report: dict[str, Any]) -> Table:
    table = Table(title="match ledger", title_justify="left")
    for column, justify in (("pass", "left"), ("sites", "right"), ("matched", "right"), ("refused", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for name, row in report["ledger"].items():
        refused = "\n".join(f"{r['node']}: {r['reason']}" for r in row["refused"][:4])
        more = len(row["refused"]) - 4
        table.add_row(
            name, str(row["sites"]), str(row["matched"]), refused + (f"\n.. and {more} more" if more > 0 else "")
        )
    return table


def _kernel_table(report: dict[str, Any]) -> Table:
    table = Table(title="kernels", title_justify="left")
    for column in ("kernel", "uses", "instead of"):
        table.add_column(column)
    uses: dict[str, int] = {}
    losers: dict[str, str] = {}
    for row in report["kernels"]:
        ways = ",\n".join(
            v["kernel"] if v["max_tokens"] is None else f"{v['kernel']} to T={v['max_tokens']}" for v in row["variants"]
        )
        uses[ways] = uses.get(ways, 0) + 1
        losers[ways] = "\n".join(f"{r['kernel']}: {r['reason']}" for r in row["rejected"])
    for kernel, count in sorted(uses.items()):
        table.add_row(kernel, str(count), losers[kernel])
    return table


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="engine folder, or a model as for compile")],
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Say what an engine or a model holds: sizes, gate, ledger, evidence, kernels."""
    from moec.runtime.reports import inspect_engine

    if (Path(model) / "manifest.json").is_file():
        report = inspect_engine(Path(model))
        if as_json:
            print_json(report)
            return
        out.print(_facts_table(report))
        out.print(_ledger_table(report))
        out.print(_kernel_table(report))
        errors = [e["max_rel_err"] for e in report["evidence"] if e["max_rel_err"] is not None]
        skipped = len(report["evidence"]) - len(errors)
        out.print(f"evidence: {len(errors)} records, largest relative error {max(errors, default=0.0):.1e}")
        if skipped:
            out.print(f"not evaluated: {skipped} records; --json says why")
        return
    from moec.compiler.inspect_model import inspect_model

    report = inspect_model(model, trust_remote_code)
    if as_json:
        print_json(report)
    else:
        out.print(_facts_table(report))


def _facts_table(report: dict[str, Any]) -> Table:
    table = Table(show_header=False)
    for key, value in report.items():
        if key not in ("ledger", "evidence", "kernels"):
            table.add_row(key, _told(key, value))
    return table


def _told(key: str, value: Any) -> str:
    """A fact in short: what is long has its whole under --json."""
    if key == "placement" and value is not None:
        parts = (f"{len(value['ranks'])} ranks", f"{value['stages']} stages", f"{value['lanes']} lanes")
        copies = f", experts of {len(value['copies'])} layers copied" if value["copies"] else ""
        return f"{value['strategy']} on {value['mesh']}: {', '.join(parts)}{copies}"
    if key.endswith("_bytes") and isinstance(value, dict):
        sizes = sorted(value.items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in sizes)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


@app.command()
def verify(engine: Annotated[Path, typer.Argument(help="engine folder")], as_json: Json = False) -> None:
    """Check an engine's files against their digests, and its evidence against its tolerances."""
    from moec.runtime.errors import EngineError
    from moec.runtime.reports import verify_engine

    report = verify_engine(engine)
    if as_json:
        print_json(report)
    else:
        out.print(f"{report['files']} files as made, {report['evidence']} evidence records", soft_wrap=True)
    if not report["passed"]:
        first = report["failed"][0]
        raise EngineError(
            f"{engine}: evidence of pass {first['pass']}, layer {first['layer']}: error {first['max_rel_err']:.1e}, "
            f"tolerance {first['tolerance']:.1e}; compile the model again"
        )


@app.command()
def bench(
    engine: Annotated[Path, typer.Argument(help="engine folder")],
    batch: Annotated[str, typer.Option(help="comma-separated batch sizes")] = "1,4",
    prompt_len: Annotated[str, typer.Option(help="comma-separated prompt lengths")] = "16,64",
    gen_len: Annotated[int, typer.Option(min=1, help="tokens to decode")] = 32,
    as_json: Json = False,
) -> None:
    """Time prefill and decode over batch sizes and prompt lengths."""
    import moec
    from moec.runtime.bench import bench_engine

    batches, lengths = whole_numbers(batch, "--batch"), whole_numbers(prompt_len, "--prompt-len")
    loaded = moec.load(engine)
    if loaded.rank:
        loaded.serve()
        return
    with progress_bar(as_json) as progress:
        rows = bench_engine(loaded, batches, lengths, gen_len, progress)
    loaded.close()
    if as_json:
        print_json(rows)
        return
    table = Table()
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()))
    out.print(table)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine can do, and what is missing; exit code 1 if engines cannot run here."""
    import dataclasses

    from moec.compiler.doctor import examine

    findings = examine()
    if as_json:
        print_json([dataclasses.asdict(f) for f in findings])
    else:
        table = Table(show_header=False)
        for f in findings:
            table.add_row(f.topic, {"ok": "[green]ok[/]", "missing": "[red]missing[/]"}.get(f.state, f.state), f.text)
        out.print(table)
    if any(f.state == "missing" for f in findings):
        raise typer.Exit(1)


def main() -> None:
    """Runs the command line; our errors become one line on standard error and exit code 1."""
    from moec.compiler.errors import CompileError
    from moec.passes.infra.errors import PassError
    from moec.runtime.errors import EngineError, RankError

    try:
        app()
    except (CompileError, PassError, EngineError) as error:
        err.print(f"[red]error:[/] {error}", soft_wrap=True, highlight=False)
        if isinstance(error, RankError):
            os._exit(1)  # threads of torch.distributed may wait for the rank that is gone
        sys.exit(1)


if __name__ == "__main__":
    main()

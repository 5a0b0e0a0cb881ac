"""Part two of bench_tuning.py: the tiny model's layer tuned on recorded routing and on uniform, timed on other text."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from moec.compiler.codegen.llvm import default_cache_dir
from moec.compiler.tune.api import FACTORY, TunedModel, plan_of, run_jobs
from moec.compiler.tune.measure import Effort, Measurer
from moec.compiler.tune.routing import UNIFORM, Routing, recorded
from moec.compiler.tune.search import Settings
from moec.compiler.tune.statistics import geometric_mean
from moec.compiler.tune.subject import SubjectSpec

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples" / "data" / "tiny-moe"
TEXT, HELD_OUT = ROOT / "docs" / "engine.md", ROOT / "docs" / "formats.md"
TOKENS = (1, 16, 64, 512)
SEQUENCE = 64  # tokens of one
FRESH_SEED = 2000


@dataclasses.dataclass(frozen=True)
class TraceRow:
    """One token count. gain: uniform's time over the trace's on held-out routing, with its 95 % bound."""

    tokens: int
    gain: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class TraceResult:
    """names: of the routing classes that were recorded for tuning and held out."""

    names: tuple[str, str]
    rows: tuple[TraceRow, ...]

    @property
    def is_no_slower(self) -> bool:
        """Whether no bound says that the winner of the trace is slower."""
        return all(row.high >= 1.0 for row in self.rows)

    @property
    def text(self) -> str:
        """By how much."""
        parts = ", ".join(f"T={r.tokens} {r.gain:.3f}x ({r.low:.3f} .. {r.high:.3f})" for r in self.rows)
        gain = geometric_mean([r.gain for r in self.rows])
        return f"tuned on a recorded trace against tuned on uniform routing, on held-out text: {gain:.3f}x; {parts}"


def record(text: Path) -> Routing:
    """The routing of the tiny model on a text."""
    from tokenizers import Tokenizer

    import moec
    from moec.runtime.recording import record_routing, run_sequences

    ids = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(text.read_text()).ids
    sequences = [ids[at : at + SEQUENCE] for at in range(0, min(len(ids), 4096), SEQUENCE)]
    engine = moec.compile(str(MODEL), verify="off")
    with record_routing(engine) as recorder:
        run_sequences(engine, sequences, 8, 0)
    found = recorder.routing("tiny-moe")
    return recorded([layer.counts.tolist() for layer in found.layers], found.name)


def trace_against_uniform(folder: Path, settings: Settings, effort: Effort) -> TraceResult:
    """Tunes twice, and times the winners in turn on the held-out routing."""
    traced, held_out = record(TEXT), record(HELD_OUT)
    winners = []
    for routing in (traced, UNIFORM):
        plan = plan_of(TunedModel(str(MODEL)), routing, TOKENS, settings.seed)
        outcomes = run_jobs(plan.jobs, default_cache_dir(), folder / f"tiny-{routing.name}.db", settings)
        winners.append({o.key.tokens: o.winner.config for o in outcomes})
    job = plan.jobs[0]
    arguments = {
        "problem": dataclasses.asdict(job.problem), "level": job.level, "cache_dir": str(default_cache_dir())
    }  # fmt: skip
    rows = []
    with Measurer(SubjectSpec(FACTORY, arguments)) as measurer:
        for tokens in TOKENS:
            mine, other = (w[tokens] for w in winners)
            if mine == other:
                rows.append(TraceRow(tokens, 1.0, 1.0, 1.0))
                continue
            measurer.prepare({"tokens": tokens, "routing": held_out.to_json(), "seed": FRESH_SEED})
            ratio = measurer.measure(mine, other, effort, FRESH_SEED).ratio
            rows.append(TraceRow(tokens, 1 / ratio.median, 1 / ratio.high, 1 / ratio.low))
    return TraceResult((traced.name, held_out.name), tuple(rows))

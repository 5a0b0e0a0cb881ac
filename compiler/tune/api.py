"""moec.tune: finds the layers of experts of a model and tunes the kernel of each distinct one."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moec.compiler.kernels.spec import ExpertsProblem
from moec.compiler.tune.database import Database
from moec.compiler.tune.environment import experts_key
from moec.compiler.tune.errors import TuneError
from moec.compiler.tune.measure import Limits, Measurer
from moec.compiler.tune.model import Sample
from moec.compiler.tune.record import Key
from moec.compiler.tune.routing import ASSUMED, Routing, read_trace, zipf
from moec.compiler.tune.search import Event, Outcome, Search, Settings, sample_of
from moec.compiler.tune.space import experts_space
from moec.compiler.tune.subject import SubjectSpec

if TYPE_CHECKING:
    from moec.compiler.options import CompileOptions
    from moec.compiler.ranks import RankOptions

DEFAULT_TOKENS = (1, 4, 16, 64, 512, 2048)
FACTORY = "moec.compiler.tune.experts:ExpertsSubject"
Show = Callable[[Event], None]


@dataclasses.dataclass(frozen=True)
class TunedModel:
    """The model whose layers are tuned; every field as for moec.compile, ranks as for moec.compile_ranks."""

    model: Any
    target: str = "cpu"
    weights: str | None = None
    layers: int | None = None
    random_weights: int | None = None
    trust_remote_code: bool = False
    example_inputs: Sequence[Any] | None = None
    ranks: RankOptions | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """One problem to tune. task: what the measuring process prepares for it. share: of the settings' time budgets."""

    key: Key
    problem: ExpertsProblem
    level: str
    task: dict[str, Any]
    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will do: jobs, by layer and rising tokens; layers: distinct ones, sites: of the model."""

    jobs: tuple[Job, ...]
    layers: int
    sites: int
    cache_dir: Path


def tune(
    model: Any,
    target: str = "cpu",
    *,
    db: str | Path,
    trials: int = 32,
    trace: str | Path | None = None,
    zipf_exponent: float | None = None,
    tokens: Sequence[int] = DEFAULT_TOKENS,
    weights: str | None = None,
    layers: int | None = None,
    random_weights: int | None = None,
    trust_remote_code: bool = False,
    example_inputs: Sequence[Any] | None = None,
    ranks: RankOptions | None = None,
    resume: bool = False,
    seed: int = 0,
    workers: int = 1,
    budget_s: float = 0.0,
    cpu_clock: bool = False,
    show: Show | None = None,
) -> list[Outcome]:
    """Tunes the expert kernels of a model on this machine and keeps what it finds in a database.

    Args:
        model, target, weights, layers, random_weights, trust_remote_code, example_inputs: as for moec.compile. No
            weight is read: times do not depend on values.
        db: the tuning database, made where there is none; moec.compile(.., tune_db=db) uses it.
        trials: candidates measured at each token count of each distinct layer, beside the default.
        trace: a file of `moec trace`. Without one routing is Zipf with zipf_exponent (default 0.4, 0: uniform).
        tokens: token counts to tune at; others are predicted from them.
        ranks: tunes what each rank of a placed engine has of the layers, as for moec.compile_ranks.
        resume: continue with what the database holds of these problems; without it that is an error.
        workers: measuring processes; they build and check side by side and take turns at timing.
        budget_s: of one problem, after which no further candidate is begun; 0: none.
        cpu_clock: by processor time, for a machine that others use; needs OMP_NUM_THREADS=1.
    Raises: TuneError: nothing to tune, or no measuring process can be started. DatabaseError. CompileError, PassError.
    """
    routing = ASSUMED if zipf_exponent is None else zipf(zipf_exponent)
    if trace is not None:
        routing = read_trace(trace)
    tuned = TunedModel(model, target, weights, layers, random_weights, trust_remote_code, example_inputs, ranks)
    plan = plan_of(tuned, routing, tokens, seed)
    settings = Settings(trials=trials, budget_s=budget_s, seed=seed)
    if cpu_clock:
        if torch.get_num_threads() != 1:
            raise TuneError("processor time says what one thread takes: set OMP_NUM_THREADS=1, or measure by the clock")
        settings = settings.by_cpu_clock()
    return run_jobs(plan.jobs, plan.cache_dir, Path(db), settings, resume=resume, workers=workers, show=show)


def plan_of(tuned: TunedModel, routing: Routing, tokens: Sequence[int], seed: int = 0) -> Plan:
    """The jobs of a model. Raises: TuneError: another target than a CPU, or no layer that a tunable kernel serves."""
    from moec.compiler.options import CompileOptions

    options = CompileOptions.of(tuned.target, tuned.weights, "off", None)
    if options.level is None:
        raise TuneError(f"target {tuned.target}: kernels are tuned where they run, on a CPU; for a GPU use --bundle")
    found = _problems(tuned, options)
    problems = tuple(dict.fromkeys(found))
    return Plan(jobs_of(problems, options.level, routing, tokens, seed), len(problems), len(found), options.cache_dir)


def _problems(tuned: TunedModel, options: CompileOptions) -> list[ExpertsProblem]:
    """The problem of every layer that tuning can serve, of all ranks. Raises: TuneError: there is none."""
    from moec.compiler.api import capture_as, lowered_of, quiet

    m = tuned
    captured = capture_as(m.model, m.example_inputs, m.layers, m.random_weights, options, m.trust_remote_code)
    if m.ranks is None:
        programs, whole = [lowered_of(captured, options, quiet, m.example_inputs)[2]], 0
    else:
        from moec.compiler.ranks import lowered_ranks

        made = lowered_ranks(captured, m.ranks, options, quiet)
        programs, whole = made.lowered, int(made.facts["experts"])
    choices = [c for program in programs for c in program.choices]
    found = [c.site.problem for c in choices if c.site.problem is not None and c.kernels[0].configured is not None]
    if not found:
        raise TuneError("no layer of experts that a kernel of this processor serves; there is nothing to tune")
    found = [problem for problem in found if problem.num_experts >= whole]
    if not found:
        raise TuneError("each rank has some of the experts (EP); tuning measures layers with all of them: plan with TP")
    return found


def jobs_of(
    problems: Iterable[ExpertsProblem], level: str, routing: Routing, tokens: Sequence[int], seed: int
) -> tuple[Job, ...]:
    """A job for each problem and token count. Raises: TuneError: a token count below 1."""
    if not tokens or min(tokens) < 1:
        raise TuneError(f"token counts are 1 or more, got {','.join(map(str, tokens)) or 'none'}")
    return tuple(
        Job(
            experts_key(problem, level, count, routing.name), problem, level,
            {"tokens": count, "routing": routing.to_json(), "seed": seed},
        )
        for problem in problems
        for count in sorted(set(tokens))
    )  # fmt: skip


def run_jobs(
    jobs: Sequence[Job],
    cache_dir: Path,
    db: Path,
    settings: Settings,
    *,
    resume: bool = False,
    workers: int = 1,
    limits: Limits | None = None,
    show: Show | None = None,
) -> list[Outcome]:
    """Tunes jobs, each layer's in one measuring process. Raises: as tune."""
    with Database(db) as database:
        known = [job for job in jobs if database.records(job.key)]
        if known and not resume:
            raise TuneError(
                f"{db} holds results of {len(known)} of the {len(jobs)} problems; --resume continues with them"
            )
        run = _Run(jobs, cache_dir, database, settings, limits, show or (lambda event: None))
        return run.all(max(1, workers))


class _Run:
    """Workers that take layers of a shared list; the first error ends all."""

    def __init__(
        self, jobs: Sequence[Job], cache_dir: Path, database: Database, settings: Settings, limits: Limits | None,
        show: Show,
    ) -> None:  # fmt: skip
        self._cache_dir, self._database, self._settings, self._limits = cache_dir, database, settings, limits
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._show_all = show
        by_layer: dict[tuple[ExpertsProblem, str], list[Job]] = {}
        for job in jobs:
            by_layer.setdefault((job.problem, job.level), []).append(job)
        self._order = [job.key for job in jobs]
        self._waiting = list(by_layer.values())
        self._outcomes: dict[Key, Outcome] = {}
        self._errors: list[BaseException] = []

    def all(self, workers: int) -> list[Outcome]:
        """Outcomes in the order of the jobs."""
        count = min(workers, len(self._waiting))
        threads = [threading.Thread(target=self._work, args=(f"worker-{n}",)) for n in range(1, count)]
        for thread in threads:
            thread.start()
        try:
            self._work("worker-0")
        finally:
            if self._errors or len(self._outcomes) < len(self._order):
                self._stop.set()
            for thread in threads:
                thread.join()
        if self._errors:
            raise self._errors[0]
        return [self._outcomes[key] for key in self._order]

    def _work(self, worker: str) -> None:
        try:
            while not self._stop.is_set():
                with self._lock:
                    if not self._waiting:
                        return
                    jobs = self._waiting.pop(0)
                self._layer(jobs, worker)
        except BaseException as error:
            self._errors.append(error)
            self._stop.set()
            if not isinstance(error, Exception):
                raise

    def _layer(self, jobs: Sequence[Job], worker: str) -> None:
        problem, level = jobs[0].problem, jobs[0].level
        arguments = {"problem": dataclasses.asdict(problem), "level": level, "cache_dir": str(self._cache_dir)}
        with Measurer(SubjectSpec(FACTORY, arguments), self._limits) as measurer:
            for job in jobs:
                if self._stop.is_set():
                    return
                if winner := self._database.winner(job.key):
                    outcome = Outcome(job.key, winner, 0, 0, len(self._database.records(job.key)))
                    self._show(Event("end", job.key, 0, 0, winner, winner.ratio or 1.0))
                else:
                    space, settings = experts_space(problem, level, job.key.tokens), self._settings.scaled(job.share)
                    search = Search(
                        job.key, space, self._database, measurer, settings, worker, self._known(job), self._show
                    )
                    outcome = search.run(job.task)
                self._outcomes[job.key] = outcome

    def _known(self, job: Job) -> list[Sample]:
        """What was measured of the layer at other token counts, by this run or before."""
        key = job.key
        records = self._database.records(
            kernel_sha256=key.kernel_sha256, op=key.op, shape=key.shape, weight_format=key.weight_format,
            device=key.device,
        )  # fmt: skip
        return [s for r in records if r.key != job.key and not r.is_default and (s := sample_of(r))]

    def _show(self, event: Event) -> None:
        with self._lock:
            self._show_all(event)

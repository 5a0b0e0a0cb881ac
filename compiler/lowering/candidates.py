"""What lowering chooses among at one site: kernels of the catalogue and library calls, each able to write its steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import fx

from moec.compiler.kernels.spec import KernelSpec
from moec.compiler.lowering import cost_model
from moec.compiler.lowering.writer import Writer
from moec.runtime.launch.cpu_features import LEVELS

Results = Sequence[int | None]
Write = Callable[[Writer, Results], None]
Predict = Callable[[int], float]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to do a site.

    name: of the kernel.  predict: tokens -> microseconds.  write: appends its steps to a writer; they fill `results`.
    refused: why it cannot be used here, None where it can.  functions: builds {symbol: function} for the library.
    symbols: of those functions.  packs: its weights lie in a layout of their own, so it serves all T or none.
    configured: gives the same kernel, reading the same weights, in another configuration (compiler/tune); None: it has
    one only.  absorbs: nodes whose work it does too: their sites do nothing in its range of T, it fills
    their results.
    """

    name: str
    predict: Predict
    write: Write
    refused: str | None = None
    functions: Callable[[], dict[str, Any]] | None = None
    symbols: tuple[str, ...] = ()
    packs: bool = False
    configured: Callable[[Mapping[str, Any]], Candidate] | None = None
    absorbs: tuple[fx.Node, ...] = ()


@dataclasses.dataclass(frozen=True)
class Site:
    """A node to lower and its candidates, library first. covers: nodes that its steps make unnecessary.

    problem: what its kernels are built for, where tuning knows that kind of problem.
    """

    node: fx.Node
    candidates: tuple[Candidate, ...]
    covers: tuple[fx.Node, ...] = ()
    problem: Any = None


def nothing(writer: Writer, results: Results) -> None:
    """The Write of a site whose work another one does."""


def of_specs(
    specs: Iterable[KernelSpec[Any]], problem: Any, dtype: str, level: str | None, write: Callable[[str], Write]
) -> list[Candidate]:
    """A candidate for each kernel of the catalogue, the highest level first, so that it wins where times are equal.

    level: of the target, None: no kernels. write: symbol -> Write.
    """
    rank = list(LEVELS).index
    ordered = sorted(specs, key=lambda s: -rank(s.level) if s.level else 0)
    return [_of_spec(spec, problem, dtype, level, write) for spec in ordered]


def _of_spec(
    spec: KernelSpec[Any], problem: Any, dtype: str, level: str | None, write: Callable[[str], Write]
) -> Candidate:
    refused = _level_refusal(spec, level) or spec.supports(problem)
    if refused:
        return Candidate(spec.name, lambda tokens: float("inf"), lambda writer, results: None, refused)
    symbols = tuple(spec.symbols(problem))
    arithmetic = spec.arithmetic or ("widened" if dtype == "bfloat16" else "float32")
    build = spec.build
    return Candidate(
        spec.name,
        lambda tokens: cost_model.kernel_us(spec.cost(problem, tokens), spec.level or "avx2", arithmetic, level),
        write(symbols[0]),
        None,
        (lambda: build(problem)) if build else None,
        symbols,
        spec.pack(problem) is not None,
    )


def _level_refusal(spec: KernelSpec[Any], level: str | None) -> str | None:
    """Why a kernel of another level is out: the target lacks its instructions."""
    if level is None:
        return "the target has no instruction-set level that kernels are built for"
    if spec.level is not None and not LEVELS[spec.level] <= LEVELS[level]:
        return f"needs {spec.level}, the target is {level}"
    return None

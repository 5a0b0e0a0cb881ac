"""Parts that were found on a narrow twin, put onto the block itself and checked there in float64, expert by expert."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moec.compiler.capture.lifting.calls import Call
from moec.compiler.capture.lifting.expert_graphs import GraphExperts
from moec.compiler.capture.lifting.gates import LinearLogits, Router, WeightGraph
from moec.compiler.capture.lifting.held import tensors
from moec.compiler.capture.lifting.native import check_native
from moec.compiler.capture.lifting.program import Linear, Program, ProgramStep
from moec.compiler.capture.lifting.refused import Refused
from moec.compiler.capture.lifting.replacement import Parts, Replacement
from moec.compiler.capture.lifting.source import Source
from moec.compiler.capture.lifting.steer import steer
from moec.compiler.capture.lifting.study import Found, Study
from moec.compiler.capture.lifting.trace import HOST
from moec.compiler.capture.lifting.twin import with_tensors
from moec.compiler.capture.lifting.verify import LIMIT
from moec.compiler.capture.lifting.widths import Widths

POOL = 96  # random rows among which each expert's are looked for
ROWS_EACH = 3


def at_full_width(parts: Parts, call: Call, widths: Widths, held: Mapping[str, Tensor]) -> Parts:
    """The twin's parts with the block's own call, tensors and widths. held: float64 tensors by name, experts' apart.

    Raises: Refused("width"): a constant of the twin's trace has the shape of a width.
    """

    def program(p: Program) -> Program:
        leaves = [_leaf(n, t, widths, held) for n, t in zip(p.leaf_names, p.leaf_tensors, strict=True)]
        return dataclasses.replace(p, leaf_tensors=leaves, steps=[_step(s, widths) for s in p.steps])

    def found(f: Any) -> Any:
        if not isinstance(f, Found):
            return f
        form = dataclasses.replace(f.form, width=widths.full(f.form.width))
        return dataclasses.replace(f, program=program(f.program), form=form)

    if isinstance(parts.shared, Tensor):
        raise Refused("width", "the shared part is a vector that is no tensor of the block")
    if isinstance(parts.experts, GraphExperts):
        following = {k: (widths.full(a), widths.full(b)) for k, (a, b) in parts.experts.by_expert.items()}
        experts: Any = dataclasses.replace(
            parts.experts, program=program(parts.experts.program), by_expert=following, many={}
        )
    else:
        experts = dataclasses.replace(parts.experts, entry=found(parts.experts.entry))
    outputs = tuple(
        dataclasses.replace(o, found=found(o.found), tail=o.tail and tuple(widths.full(s) for s in o.tail))
        for o in parts.outputs.parts
    )
    return dataclasses.replace(
        parts,
        call=call,
        experts=experts,
        router=_router(parts.router, found, widths),
        shared=found(parts.shared),
        outputs=dataclasses.replace(parts.outputs, parts=outputs),
    )


def _router(router: Router, found: Any, widths: Widths) -> Router:
    rules = tuple(
        dataclasses.replace(r, spec=dataclasses.replace(r.spec, scale=widths.full(r.spec.scale))) for r in router.rules
    )
    graph = router.graph and WeightGraph(
        found(router.graph.weights), found(router.graph.indices), widths.full(router.graph.scale)
    )
    logits = router.logits if isinstance(router.logits, LinearLogits) else found(router.logits)
    factor = found(router.row_factor)
    return dataclasses.replace(router, rules=rules, graph=graph, logits=logits, row_factor=factor)


def _leaf(name: str, traced: Tensor, widths: Widths, held: Mapping[str, Tensor]) -> Tensor:
    shape = tuple(widths.full(s) for s in traced.shape)
    if name == HOST and shape != tuple(traced.shape):
        raise Refused("width", "a tensor that the code makes is as long as a width")
    if name == HOST:
        return traced
    if name in held:
        return held[name]
    return torch.empty(shape, dtype=traced.dtype, device="meta")  # the rows, or an expert's own tensor


def _step(step: ProgramStep, widths: Widths) -> ProgramStep:
    def full(value: Any) -> Any:
        return Linear(widths.full(value.a), widths.full(value.b)) if isinstance(value, Linear) else widths.full(value)

    return dataclasses.replace(step, flat=tuple(full(v) for v in step.flat))


class FullWidthCheck:
    """Compares parts with the block at its full width.

    One expert at a time has its weights, in float64; the others are zero, in memory that is never touched.
    """

    def __init__(self, module: nn.Module, call: Call, parts: Parts, widths: Widths, seed: int) -> None:
        self.module, self.held, self.groups = module, tensors(module), parts.partition.groups
        own = {id(self.held[n]) for g in self.groups for n in g.names}
        self.wide = {n: t.double() for n, t in self.held.items() if t.is_floating_point() and id(t) not in own}
        self.parts = at_full_width(parts, call, widths, self.wide)
        self.study = Study(module, call.args, call.kwargs, seed, wide=self._with_expert(0))
        self.source = Source(self.study.wide)
        self.worst = 0.0

    def _with_expert(self, expert: int) -> nn.Module:
        """The block in float64 where only this expert (and those tied to it) is not zero."""
        partial: dict[int, Tensor] = {}
        for group in self.groups:
            for name in group.names:
                tensor = self.held[name]
                partial.setdefault(id(tensor), torch.from_numpy(np.zeros(tuple(tensor.shape))))
            by_name = {n: partial[id(self.held[n])] for n in group.names}
            group.view(by_name, expert).copy_(group.view(self.held, expert))

        def made(name: str, tensor: Tensor) -> Tensor:
            return partial[id(tensor)] if id(tensor) in partial else self.wide.get(name, tensor)

        return with_tensors(self.module, made)

    def check(self, twin_lines: set[tuple[str, int]]) -> dict[str, Any]:
        """What was compared, for the certificate. Raises: Refused("width" | "native")."""
        rows = self._rows()
        with torch.no_grad(), self.source:
            for e, x in enumerate(rows):
                if e:
                    self.study.wide = self._with_expert(e)
                self._compare(e, x)
        self.study.wide = nn.Module()
        extra = lines_run(self.source) - twin_lines
        if extra:
            raise Refused("width", f"line {min(extra)[1]} runs at full width and not on a narrow twin")
        return {
            "hidden": self.study.hidden,
            "worst_relative_error_f64": self.worst,
            "rows_per_expert": min(len(x) for x in rows),
            "lines": len(lines_run(self.source)),
            "median_relative_error_own_dtype": check_native(self.parts, self.module),
        }

    def _replacement(self) -> Replacement:
        return Replacement(self.parts, tensors(self.study.wide), torch.float64)

    def _rows(self) -> list[Tensor]:
        """Rows for each expert: random ones, and steered ones where these do not reach it."""
        count, top = self.parts.partition.num_experts, self.parts.router.num_logits
        router = self._replacement()
        targets = torch.randn(count, top, generator=self.study.generator, dtype=torch.float64) * 0.3
        targets[torch.arange(count), torch.arange(count)] += 4
        with torch.no_grad():
            x = torch.cat([self.study.rows(POOL), steer(self.study, self.parts.router, targets)])
            experts = router.route(x)[1]
        rows = [x[(experts == e).any(1)][:ROWS_EACH] for e in range(count)]
        missing = [e for e, r in enumerate(rows) if not len(r)]
        if missing:
            raise Refused("width", f"no row reaches experts {missing[:6]} at full width")
        return rows

    def _compare(self, expert: int, x: Tensor) -> None:
        first = self.groups[0]
        tied = [expert]
        if first.kind == "list":
            mine = self.held[first.names[first.kept[expert]]]
            tied = [e for e, i in enumerate(first.kept) if self.held[first.names[i]] is mine]
        lifted = self._replacement()
        weights, experts = lifted.route(x)
        weight = (weights * torch.isin(experts, torch.tensor(tied, dtype=experts.dtype))).sum(1)
        found = lifted.alone(expert, x, weight, tensors(self.study.wide))
        expected = self.study.run(x)
        error = (found - expected).abs().amax(1) / expected.abs().amax(1).clamp_min(1e-300)
        self.worst = max(self.worst, float(error.max()))
        if not bool((error <= LIMIT).all()):
            raise Refused("width", f"at full width expert {expert} differs by {float(error.max()):.2g}")


def lines_run(source: Source) -> set[tuple[str, int]]:
    """Lines that ran, by file."""
    return {(code.co_filename, line) for code, lines in source.hit.items() for line in lines}

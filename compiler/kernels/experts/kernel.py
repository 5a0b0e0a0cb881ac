"""A kernel for whole expert layers: the template with an instruction set's tiles, and what the catalogue says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from moec.compiler.kernels.experts import call
from moec.compiler.kernels.experts.blocking import Blocking
from moec.compiler.kernels.experts.call import PackedExperts
from moec.compiler.kernels.experts.plan import Plan
from moec.compiler.kernels.experts.template import build_experts
from moec.compiler.kernels.experts.tiles import Tiles
from moec.compiler.kernels.spec import ExpertsProblem, KernelSpec
from moec.compiler.kernels.template import intrinsics as ins


@dataclasses.dataclass(frozen=True)
class ExpertsKernel:
    """name, level: as in KernelSpec.  dtypes: of the rows.  tiles: plan -> the inner loops.

    takes: which weights: call.PLAIN, or quantised ones multiplied as numbers (call.NUMBERS) or as int8 (call.INT8).
    variant: what tells the function from that of the same kernel with another blocking, in one library; "": none.
    """

    name: str
    level: str
    dtypes: tuple[str, ...]
    blocking: Blocking
    tiles: Callable[[Plan], Tiles]
    takes: str = call.PLAIN
    variant: str = ""

    def symbol(self, problem: ExpertsProblem) -> str:
        """The name of the problem's function in a library."""
        return call.symbol(problem) + (f"_{self.variant}" if self.variant else "")

    def plan(self, problem: ExpertsProblem) -> Plan:
        """The kernel's numbers for a problem: padded sizes, blocking, workspace."""
        return Plan(problem, self.level, self.blocking)

    def build(self, problem: ExpertsProblem) -> dict[str, Any]:
        """{exported name: PrimFunc}; tensors in the order of buffers.Arguments."""
        plan = self.plan(problem)
        return {self.symbol(problem): build_experts(plan, self.tiles(plan))}

    def spec(self) -> KernelSpec[ExpertsProblem]:
        """The catalogue's entry."""
        return KernelSpec(
            name=self.name,
            op="moec::experts",
            level=self.level,
            supports=lambda problem: call.refusal(problem, self.dtypes, self.level, self.takes),
            cost=call.cost,
            symbols=lambda problem: (self.symbol(problem),),
            build=self.build,
            pack=call.weight_layout,
            arithmetic="int8" if self.takes == call.INT8 else "bfloat16" if ins.has_dot(self.level) else None,
            workspace_bytes=lambda problem, num_tokens: self.plan(problem).workspace_bytes(num_tokens),
        )

    def __call__(
        self,
        library: Any,
        problem: ExpertsProblem,
        packed: PackedExperts,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        shared_weight: Tensor | None = None,
    ) -> Tensor:
        """The kernel on torch tensors, see call.call. Raises: KernelArgumentError."""
        function = library[self.symbol(problem)]
        return call.call(function, self.plan(problem), packed, x, weights, experts, shared_weight)

"""The one ordered list of passes."""

from __future__ import annotations

import torch

from moec.passes.drop_batch_axis import DropBatchAxis
from moec.passes.eliminate_dead_code import EliminateDeadCode
from moec.passes.fold_constants import FoldConstants
from moec.passes.fold_views import FoldViews
from moec.passes.fuse_gate import FuseGate
from moec.passes.fuse_gate_up import FuseGateUp
from moec.passes.fuse_qkv import FuseQkv
from moec.passes.fuse_residual_norm import FuseResidualNorm
from moec.passes.fuse_shared_experts import FuseSharedExperts
from moec.passes.group_expert_gemms import GroupExpertGemms
from moec.passes.infra.base import Pass, PassContext
from moec.passes.infra.runner import Dump, PipelineResult, run_passes
from moec.passes.layout_weights import LayoutWeights
from moec.passes.lift_experts import LiftExperts
from moec.passes.lift_gate import LiftGate
from moec.passes.lift_norm import LiftNorm
from moec.passes.lift_rope import LiftRope
from moec.passes.merge_duplicates import MergeDuplicates
from moec.passes.plan_memory import PlanMemory
from moec.passes.quantise_weights import QuantiseWeights
from moec.passes.sink_transposes import SinkTransposes
from moec.passes.stack_expert_weights import StackExpertWeights

# one form for everything that has many spellings; what is written as ONNX, too
CANONICALISE: tuple[Pass, ...] = (
    LiftExperts(),
    StackExpertWeights(),
    LiftGate(),
    LiftNorm(),
    LiftRope(),
    DropBatchAxis(),
    FoldViews(),
    SinkTransposes(),
    FoldViews(),
    MergeDuplicates(),
    EliminateDeadCode(),
)

PIPELINE: tuple[Pass, ...] = (
    *CANONICALISE,
    # fuse: fewer, larger operations
    FuseGate(),
    FoldConstants(),  # after the gate, which keeps its router weight in the checkpoint's width
    LayoutWeights(),
    FuseGateUp(),
    FuseSharedExperts(),
    FuseQkv(),
    FuseResidualNorm(),
    # group: the experts as grouped products
    GroupExpertGemms(),
    # prepare: what lowering expects
    QuantiseWeights(),
    EliminateDeadCode(),
    PlanMemory(),
)


def run_pipeline(
    gm: torch.fx.GraphModule, context: PassContext, *, evidence: str = "sampled", dump: Dump | None = None
) -> PipelineResult:
    """Runs every pass over a captured graph, in place; see run_passes for the arguments and errors."""
    return run_passes(gm, PIPELINE, context, evidence=evidence, dump=dump)

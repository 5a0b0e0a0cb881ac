"""What `moec export-onnx --weights` says, and a canonical graph with its weights rounded so.

f32                        every weight in float32
bf16, f16                  every matrix in that dtype, widened where it is used: arithmetic stays in float32
int4, experts=int8         the experts as codes and scales (passes/ir/formats.py), everything else in float32
model=bf16,experts=int4    both
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch.fx import GraphModule, Node

from moec.compiler.api import format_errors
from moec.compiler.capture.captured import Captured
from moec.compiler.export.onnx.codes import format_of, has_layout
from moec.compiler.export.onnx.errors import ExportError
from moec.compiler.weights_option import parse_weights
from moec.passes.infra.base import PassContext
from moec.passes.infra.runner import run_passes
from moec.passes.ir.experts_call import ExpertsCall
from moec.passes.ir.formats import FLOATS, SCALE_NAMES, FormatError, WeightFormat, parse_format
from moec.passes.ir.quantised import quantised
from moec.passes.ir.weights import weights_of
from moec.passes.quantise_weights import QuantiseWeights, WeightPlan

WIDE = "f32"


@dataclasses.dataclass(frozen=True)
class FileWeights:
    """dtype: f32, bf16 or f16: of every matrix.  experts: what the experts are stored as instead, None: as the rest."""

    dtype: str = WIDE
    experts: WeightFormat | None = None

    def __str__(self) -> str:
        return f"model={self.dtype}" + ("" if self.experts is None else f",experts={self.experts.name}")

    @property
    def rounds(self) -> bool:
        """Whether numbers change."""
        return self.dtype != WIDE or self.experts is not None


def parse_file_weights(text: str | None) -> FileWeights:
    """Raises: CompileError: a value that has no meaning, or none in an ONNX file."""
    if text is None or text in FLOATS:
        return FileWeights(text or WIDE)
    option = parse_weights(text)
    others = [role for role, _ in option.formats if role != "experts"]
    if option.is_auto or others:
        what = f"{others[0]}={dict(option.formats)[others[0]].name}" if others else "formats for a size"
        raise ExportError(
            f"weights={text!r}: {what}: an ONNX file has codes for experts alone, in one format: f32, bf16, f16, int8, "
            "int4 or model=bf16,experts=int4"
        )
    experts = dict(option.formats).get("experts")
    if experts is not None and (experts.is_packed or not (experts.is_plain or has_layout(experts))):
        raise ExportError(
            f"weights={text!r}: {experts.name} has no codes in ONNX files; known: int8, int4 and int2, with groups and "
            "zeros (int4-g32, int4-g64-asym), and bf16 and f16"
        )
    return FileWeights(SCALE_NAMES[option.dtype] if option.dtype else WIDE, experts)


def rounded(captured: Captured, weights: FileWeights) -> Captured:
    """A canonical model with the numbers that the file will hold; codes of the checkpoint are kept, in place.

    Raises: CompileError: a weight does not fit its format.
    """
    gm = captured.graph_module
    by_role = {} if weights.experts is None else {"experts": _fitted(gm, weights.experts)}
    context = PassContext(read=captured.read, options={QuantiseWeights.name: WeightPlan(by_role)})
    with format_errors():
        gm = run_passes(gm, (QuantiseWeights(),), context, evidence="off").graph
    if weights.dtype != WIDE:
        _narrow(gm, parse_format(weights.dtype))
    return dataclasses.replace(captured, graph_module=gm)


def _stacks(gm: GraphModule) -> list[Node]:
    """What all layers of experts read as their matrices."""
    calls = map(ExpertsCall.of, gm.graph.find_nodes(op="call_function", target=torch.ops.moec.experts.default))
    return [stack for call in calls for stack in (call.w_gate_up, call.w_down)]


def _fitted(gm: GraphModule, format: WeightFormat) -> WeightFormat:
    """The format with a group that divides the widths of all stacks: a node has one for both products."""
    widths = sorted({int(stack.meta["val"].shape[-1]) for stack in _stacks(gm)})
    if not widths:
        raise ExportError(f"weights: experts={format.name}, but no layer with experts was found; leave it out")
    try:
        return format.fitted(math.gcd(*widths))
    except FormatError:
        raise ExportError(
            f"weights: {format.name}: its groups of {' or '.join(map(str, format.groups))} do not divide all widths "
            f"of the experts, {', '.join(map(str, widths))}; choose a smaller group, or int8"
        ) from None


def _narrow(gm: GraphModule, format: WeightFormat) -> None:
    """Every matrix that is not stored as codes rounded to the format's dtype. Vectors stay as they are.

    Raises: ExportError: a matrix is as narrow already, in another dtype.
    """
    stacks = {str(stack.target) for stack in _stacks(gm)}
    for name, weight in weights_of(gm).items():
        coded = name in stacks and format_of(weight) is not None
        if len(weight.shape) < 2 or coded or not weight.dtype.is_floating_point:
            continue
        if weight.dtype != torch.float32 and weight.dtype != format.dtype:
            raise ExportError(
                f"weights={format.name}: {name} is {weight.dtype}; only float32 is narrowed: leave --weights out"
            )
        weights_of(gm)[name] = quantised(weight, format, name)


def check_arithmetic(gm: GraphModule) -> None:
    """Raises: ExportError: the graph computes in a dtype for which ONNX Runtime's CPU provider has no kernels."""
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16:
            raise ExportError(
                f"{node.name} computes in bfloat16, for which ONNX Runtime's CPU provider, which checks the file, has "
                "no kernels; export a float32 model (module.float()) with --weights bf16: the file is as small"
            )

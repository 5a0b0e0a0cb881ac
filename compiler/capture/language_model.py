"""Exports a transformers causal language model as one graph over a flat ragged batch, for prefill and decode."""

from __future__ import annotations

import contextlib
import dataclasses
import string
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as fx_config
from torch.overrides import TorchFunctionMode

import moec.passes.ir.ops  # noqa: F401  (registers torch.ops.moec)
from moec.compiler.capture.captured import CacheSpec
from moec.compiler.capture.context import Context, LayerCache
from moec.compiler.capture.kinds import LayerPlan, only_layers, plan_layers
from moec.compiler.capture.refusal import refusal
from moec.compiler.capture.seams import cache_for, seams
from moec.compiler.capture.state_check import check_state_modules
from moec.compiler.capture.states import tokens_as_sequences, watched
from moec.compiler.errors import UnsupportedModel

MAX_TOKENS, MAX_SLOTS, MAX_LENGTH = 1 << 20, 1 << 16, 1 << 22
INPUTS = ("tokens", "positions", "slots")


class _CopyToContiguous(TorchFunctionMode):
    """x.contiguous() always copies. Whether [T, 1] or a slice of [T, 3] is contiguous already depends on T == 1."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.contiguous and len(args) == 1 and not kwargs:
            return args[0].clone(memory_format=torch.contiguous_format)
        return func(*args, **(kwargs or {}))


class FlatModel(nn.Module):
    """tokens, positions, slots i64[T] and caches -> logits [T, V]; the model itself sees a batch of one sequence.

    kept: layer and role of each cache, in order.  copies: contiguous() copies.
    """

    def __init__(self, model: nn.Module, kept: Sequence[tuple[int, str]] = (), copies: bool = False) -> None:
        super().__init__()
        self.model, self.kept, self.copies = model, kept, copies
        self.context: Context | None = None

    def forward(self, tokens: Tensor, positions: Tensor, slots: Tensor, caches: list[Tensor] | None) -> Tensor:
        """tokens, positions, slots i64[T], the caches in the order of `kept` (None: a first look) -> logits [T, V]."""
        for other in (positions, slots):
            torch._check(other.shape[0] == tokens.shape[0])  # one symbol for the three
        named = None if caches is None else dict(zip(self.kept, caches, strict=True))
        mode = _CopyToContiguous() if self.copies else contextlib.nullcontext()
        with Context(positions, slots, named) as self.context, watched(self.model, self.context), mode:
            out = self.model(
                input_ids=tokens[None],
                position_ids=positions[None],
                past_key_values=cache_for(self.model)(self.context),
                use_cache=True,
            )
        return out.logits[0]


@dataclasses.dataclass(frozen=True)
class Exported:
    """caches: of every layer.  traced: those of them that are inputs of the program.  plan: None where it is whole."""

    program: ExportedProgram
    caches: tuple[CacheSpec, ...]
    traced: tuple[CacheSpec, ...]
    plan: LayerPlan | None


def export_language_model(model: nn.Module, every_layer: bool = False) -> Exported:
    """The model as an exported program with inputs tokens, positions, slots and the caches in order.

    T, N and L are symbolic from 1 up. With backed_size_oblivious a Python branch on T == 1 in the model is an error
    here; without it the branch for larger T would be taken silently.
    every_layer: False traces two or three layers of each kind only, where the model allows it.
    Raises: UnsupportedModel: the model does something that has no meaning here; its text says what.
    """
    device = next(model.parameters()).device
    with torch.no_grad(), seams(model):
        try:
            found, stateful = _dry_run(model, device)
            plan = None if every_layer else plan_layers(model, found)
            traced = found if plan is None else {i: found[i] for i in plan.traced if i in found}
            partly = only_layers(model, plan) if plan is not None else contextlib.nullcontext()
            with partly, tokens_as_sequences(stateful):
                program = _export(model, traced, device)
        except Exception as error:
            raise refusal(model, error) from error
    dtype = _dtype(model)
    return Exported(program, tuple(_specs(found, dtype)), tuple(_specs(traced, dtype)), plan)


def _dry_run(model: nn.Module, device: torch.device) -> tuple[dict[int, LayerCache], list[nn.Module]]:
    """One eager pass that finds which layers cache what, and which modules keep states.

    It also names the activations outside of the trace.
    """
    tokens = torch.zeros(3, dtype=torch.long, device=device)
    flat = FlatModel(model)
    flat(tokens, torch.arange(3, device=device), tokens.clone(), None)
    context = flat.context
    assert context is not None
    if not context.found:
        raise UnsupportedModel(f"{type(model).__name__}: no layer calls transformers' attention interface")
    found = dict(sorted(context.found.items()))
    check_state_modules({m: context.calls[m] for m in context.stateful}, found, len(tokens))
    return found, list(context.stateful)


def _export(model: nn.Module, found: dict[int, LayerCache], device: torch.device) -> ExportedProgram:
    specs = list(_specs(found, _dtype(model)))
    tokens = torch.zeros(5, dtype=torch.long, device=device)
    caches = [torch.zeros(c.input_shape(3, 7), device=device, dtype=c.dtype) for c in specs]
    t, n, length = Dim("T", min=1, max=MAX_TOKENS), Dim("N", min=1, max=MAX_SLOTS), Dim("L", min=1, max=MAX_LENGTH)
    shapes: dict[str, Any] = {name: {0: t} for name in INPUTS}
    shapes["caches"] = [{0: n, 1: length} if c.kind == "tokens" else {0: n} for c in specs]
    args = (tokens, torch.arange(5, device=device), tokens.clone(), caches)
    kept = [(layer, role) for layer, cache in found.items() for role, _ in cache.kept]

    def export(copies: bool) -> ExportedProgram:
        with fx_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            flat = FlatModel(model, kept, copies).eval()
            return torch.export.export(flat, args, dynamic_shapes=shapes, strict=False)

    try:
        return export(copies=False)
    except UserError:
        return export(copies=True)  # where only contiguous() asked for T == 1, this has no such question


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)


def _specs(found: dict[int, LayerCache], dtype: torch.dtype) -> Iterator[CacheSpec]:
    for layer, cache in found.items():
        for letter, (_, kept) in zip(string.ascii_lowercase, cache.kept, strict=False):
            yield CacheSpec(layer, f"cache_{layer}_{letter}", kept.shape, kept.dtype or dtype, kept.kind)

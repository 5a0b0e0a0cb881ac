"""Tensors that are in memory as sources of weights: live parameters, computed buffers, constants of a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.export import ExportedProgram

from moec.passes.ir.weights import Read, Weight, source

COMPUTED = "computed:"  # prefix of the source names of tensors that no checkpoint holds


def storage_of(tensor: Tensor) -> int:
    """A number that all tensors on the same memory share, and no other tensor that is alive; fake ones have it too."""
    return tensor.untyped_storage()._cdata


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by every name that they have (tied ones have two)."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def constants_of(exported: ExportedProgram, prefix: str = "") -> dict[str, Tensor]:
    """Tensors that the model's code makes itself and the trace keeps, by name; those without values are left out."""
    found = {k.removeprefix(prefix): v for k, v in exported.constants.items() if isinstance(v, Tensor)}
    return {k: v for k, v in found.items() if not v.is_meta}


def sources_of(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Weight]:
    """A source, called prefix + name, for each tensor; tied tensors share the first one's name."""
    first: dict[int, str] = {}
    found: dict[str, Weight] = {}
    for name, tensor in tensors.items():
        canonical = first.setdefault(id(tensor), name)
        found[name] = source(prefix + canonical, tuple(tensor.shape), tensor.dtype)
    return found


def with_computed(read: Read, computed: Mapping[str, Tensor]) -> Read:
    """`read`, and beside it the computed tensors under COMPUTED + name."""

    def get(name: str) -> Tensor:
        own = computed.get(name.removeprefix(COMPUTED)) if name.startswith(COMPUTED) else None
        return read(name) if own is None else own.detach()

    return get

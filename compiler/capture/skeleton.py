"""A transformers model without weights: parameters on the meta device, the buffers it computes with real values."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from moec.compiler.errors import UnsupportedModel
from moec.compiler.families.catalogue import FAMILIES
from moec.passes.infra.errors import in_one_line


class _EmptyOnMeta(TorchFunctionMode):
    """Uninitialised tensors, which is how parameters begin, are made on the meta device; the rest is real.

    A model built under torch.device("meta") as a whole would lose its rotary tables.
    """

    _EMPTY = (torch.empty, torch.rand, torch.randn)
    _FILL = frozenset({"normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._EMPTY:
            kwargs["device"] = "meta"
        tensor = args[0] if args else kwargs.get("tensor")
        if getattr(func, "__name__", "") in self._FILL and isinstance(tensor, Tensor) and tensor.is_meta:
            return tensor  # a millisecond for each of a hundred thousand parameters otherwise
        return func(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A model on the meta device. tensors: what a checkpoint must give, by every name. computed: real buffers."""

    model: Any
    tensors: dict[str, Tensor]
    computed: dict[str, Tensor]

    @functools.cached_property
    def ties(self) -> tuple[tuple[str, ...], ...]:
        """Groups of names of one and the same tensor."""
        names: dict[int, list[str]] = {}
        for name, tensor in self.tensors.items():
            names.setdefault(id(tensor), []).append(name)
        return tuple(tuple(n) for n in names.values() if len(n) > 1)

    def names_of(self, name: str) -> tuple[str, ...]:
        """The name itself, then those that share its tensor."""
        group = next((g for g in self.ties if name in g), ())
        return (name, *(n for n in group if n != name))

    def ignores(self, name: str) -> bool:
        """Whether a checkpoint tensor may be left over: computed buffers, what the library ignores, layers cut off."""
        patterns = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        cut_off = layer is not None and int(layer[1]) >= self.model.config.get_text_config().num_hidden_layers
        return (
            name in self.computed
            or name.endswith("rotary_emb.inv_freq")
            or cut_off
            or any(re.search(p, name) for p in patterns)
        )


def build_skeleton(config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> Skeleton:
    """Builds the model of a configuration. Raises: UnsupportedModel: the library cannot build it."""
    try:
        with _EmptyOnMeta():
            model = _build(config, dtype, trust_remote_code)
    except Exception as error:  # any of the library's own checks
        raise UnsupportedModel(f"a {config.model_type} model cannot be built: {in_one_line(error)}") from error
    _keep_float32(model, dtype)
    stored = set(model.state_dict())
    computed = {n: b.detach().clone() for n, b in model.named_buffers() if n not in stored}
    bad = next((n for n, b in computed.items() if b.is_meta), None)
    if bad is not None:
        raise UnsupportedModel(
            f"{config.model_type}: the buffer {bad} has no value when the model is built without weights"
        )
    model.to("meta")
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= {n: b for n, b in model.named_buffers(remove_duplicate=False) if n in stored}
    return Skeleton(model, tensors, computed)


def _build(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    family = next((f for f in FAMILIES if isinstance(config, f.config)), None)
    if family is None:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code).eval()
    return family.model._from_config(config, dtype=dtype).eval()


def _keep_float32(model: Any, dtype: torch.dtype) -> None:
    """Parameters that the library keeps in float32 when it loads a half precision checkpoint."""
    patterns = [re.compile(rf"(?:^|\.){re.escape(p)}(?:\.|$)") for p in model._get_dtype_plan(dtype)]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and any(p.search(name) for p in patterns):
            parent = model.get_submodule(name.rpartition(".")[0])
            kept = tensor.detach().to(torch.float32)
            if isinstance(tensor, nn.Parameter):
                setattr(parent, name.rpartition(".")[2], nn.Parameter(kept, requires_grad=False))
            else:
                setattr(parent, name.rpartition(".")[2], kept)

"""Modules of transformers whose own code cannot be traced over a ragged batch: while a model is traced, the methods
named here are ours, with the same meaning in moec ops. What each module means is said at its function.

Experts that loop over themselves depend on values (own_experts.py; blocks that are not named here go through lifting/,
which needs the weights). Indexers and compressors work on their cache's layers (own_indexers.py, own_deepseek_v4.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from moec.compiler.capture import own_deepseek_v4, own_experts, own_indexers
from moec.compiler.capture.activations import ACTIVATION, function_name
from moec.compiler.capture.own_indexers import HELPER


@dataclasses.dataclass(frozen=True)
class Own:
    """What is ours in modules of one class. methods: by name.  act: the attribute with the activation, "" for none.

    helper: the class of a module elsewhere in the model that the methods need, as HELPER.
    """

    methods: dict[str, Callable[..., Any]]
    act: str = ""
    helper: str = ""


_MODELS = "transformers.models."
CLASSES: dict[str, Own] = {
    "longcat_flash.modeling_longcat_flash.LongcatFlashExperts": Own(
        {"forward": own_experts.longcat_flash_experts}, "act_fn"
    ),
    "dbrx.modeling_dbrx.DbrxExperts": Own({"forward": own_experts.dbrx_experts}, "mlp.activation_fn"),
    "jetmoe.modeling_jetmoe.JetMoeMoE": Own({"forward": own_experts.jetmoe_mlp}, "activation"),
    "jetmoe.modeling_jetmoe.JetMoeMoA": Own({"map": own_experts.jetmoe_queries, "reduce": own_experts.jetmoe_outputs}),
    "minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLIndexer": Own({"forward": own_indexers.minimax_m3_blocks}),
    "qwen4_exp.modeling_qwen4_exp.Qwen4ExpTextQSAIndexer": Own(
        {"forward": own_indexers.qwen4_blocks}, helper="Qwen4ExpTextRotaryEmbedding"
    ),
    "qwen4_exp.modeling_qwen4_exp.Qwen4ExpTextNGramEmbedding": Own({"forward": own_indexers.qwen4_ngrams}),
    "deepseek_v4.modeling_deepseek_v4.DeepseekV4Attention": Own({"forward": own_deepseek_v4.attention}),
}


@contextlib.contextmanager
def own_methods(model: nn.Module) -> Iterator[None]:
    """While it lasts, the methods of CLASSES are ours. Raises: UnsupportedModel: an activation without a name."""
    added: list[tuple[nn.Module, str]] = []
    try:
        for module in model.modules():
            kind = type(module)
            own = CLASSES.get(f"{kind.__module__}.{kind.__qualname__}".removeprefix(_MODELS))
            if own is None:
                continue
            ours: dict[str, Any] = {name: types.MethodType(method, module) for name, method in own.methods.items()}
            if own.act:
                ours[ACTIVATION] = function_name(operator.attrgetter(own.act)(module))
            if own.helper:
                ours[HELPER] = next(m for m in model.modules() if type(m).__name__ == own.helper)
            module.__dict__.update(ours)
            added += [(module, name) for name in ours]
        yield
    finally:
        for module, name in added:
            del module.__dict__[name]

"""The sites of a graph on a GPU: which nodes have CUDA kernels, and what else could do their work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moec.compiler.codegen.cuda_archs import Architecture
from moec.compiler.lowering import bind_experts as cpu_experts
from moec.compiler.lowering import bind_stored
from moec.compiler.lowering.bind_stored import formats_at
from moec.compiler.lowering.candidates import Site
from moec.compiler.lowering.cuda import bind_attention, bind_experts, bind_layers
from moec.passes.ir import ops

BINDINGS: dict[Any, Callable[[fx.Node, Architecture], Site | None]] = {
    ops.rms_norm._opoverload: bind_layers.norm_site,
    ops.add_rms_norm._opoverload: bind_layers.norm_site,
    ops.rope._opoverload: bind_layers.rope_site,
    ops.cached_attention._opoverload: bind_attention.attention_site,
    ops.gate._opoverload: bind_layers.gate_site,
    ops.gate_linear._opoverload: bind_layers.gate_linear_site,
}


def site_of(node: fx.Node, arch: Architecture, fast_combine: bool = False) -> Site | None:
    """The site that a node is; None where torch's operator or the runtime's plain function does it.

    fast_combine: as for bind_experts.experts_site.
    """
    layer = None
    if node.target is cpu_experts.COMBINE:
        layer = cpu_experts.layer_of_chain(node)
    elif node.target is ops.experts._opoverload:
        layer = cpu_experts.layer_of_experts(node)
    if layer is not None:
        return bind_experts.experts_site(layer, arch, cpu_experts.library_candidate, fast_combine)
    if node.target is torch.ops.aten.linear.default and formats_at(node.args[1]):
        return bind_stored.linear_site(Site(node, ()), None)
    if node.target is torch.ops.aten.embedding.default:
        return bind_stored.embedding_site(node, None)
    bind = BINDINGS.get(node.target)
    return bind(node, arch) if bind else None

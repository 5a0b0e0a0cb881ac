"""Which experts stand in a written file: for each layer their number, and a digest of each expert's weights.

A digest is over the bytes of one expert in canonical form (gate rows, up rows, down rows, biases). It is computed once
from the file's external data and once from the checkpoint: they are equal only if every expert is there, unchanged and
in its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.export.onnx import microsoft, portable
from moec.compiler.export.onnx.api import MICROSOFT
from moec.compiler.export.onnx.errors import ExportError
from moec.compiler.export.onnx.experts import ROLES, Site
from moec.compiler.export.onnx.write import as_numpy, data_name
from moec.compiler.lowering.packing import make
from moec.passes.ir.weights import Read

_MOE_INPUTS = ("x", "logits", "w_in", "b_in", "w_out", "b_out")


def coverage(path: Path, sites: Iterable[Site], kind: str, read: Read) -> list[dict[str, Any]]:
    """The certificate of a written model: one record for each layer of experts.

    {"layer", "node", "op", "experts", "top_k", "activation", "sha256": [one for each expert]}
    Raises: ExportError: a layer's node or an expert is missing, or is not the checkpoint's.
    Cost: reads every expert twice, one layer at a time.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    initialisers = {t.name: t for t in model.graph.initializer}
    nodes = {_w_in(n): n for n in model.graph.node if n.domain in (portable.DOMAIN, microsoft.DOMAIN)}
    records = []
    for site in sites:
        node = nodes.pop(site.names["w_in"], None)
        if node is None:
            raise ExportError(f"{site.where}: no node in {path.name} reads {site.names['w_in']}; the experts are lost")
        found = _digests({r: _stored(path, initialisers[name]) for r, name in site.names.items()}, kind, site)
        canonical = {r: as_numpy(make(w, read)) for r, w in site.canonical.items()}
        expected = _digests(canonical, None, site)
        wrong = [e for e, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
        if wrong:
            raise ExportError(f"{site.where}: expert {wrong[0]} in {path.name} is not the checkpoint's; export again")
        records.append(
            {
                "layer": site.layer,
                "node": node.name,
                "op": f"{node.domain}.{node.op_type}",
                "experts": len(found),
                "top_k": site.call.top_k,
                "activation": site.call.act,
                "sha256": found,
            }
        )
    return records


def _w_in(node: Any) -> str:
    """The initialiser of the input projections of an experts node."""
    position = _MOE_INPUTS.index("w_in") if node.domain == microsoft.DOMAIN else 3
    return str(node.input[position])


def _stored(path: Path, tensor: Any) -> np.ndarray:
    """An initialiser as it stands in the file: mapped where it is external."""
    import onnx

    shape = tuple(tensor.dims)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return onnx.numpy_helper.to_array(tensor)
    entry = {e.key: e.value for e in tensor.external_data}
    if entry["location"] != data_name(path):
        raise ExportError(f"{tensor.name}: lies in {entry['location']}, expected {data_name(path)}")
    file = path.with_name(entry["location"])
    return np.memmap(file, dtype, "r", int(entry.get("offset", 0)), shape)


def _digests(stacks: dict[str, np.ndarray], kind: str | None, site: Site) -> list[str]:
    """sha256 of each expert. kind: how the stacks are laid out; None: canonically."""
    shown = []
    for e in range(site.num_experts):
        digest = hashlib.sha256()
        for role in ROLES:
            if role in stacks:
                part = stacks[role][e]
                if kind == MICROSOFT and site.in_turn and role.endswith("_in"):
                    part = np.concatenate([part[0::2], part[1::2]])
                digest.update(np.ascontiguousarray(part).tobytes())
        shown.append(digest.hexdigest())
    return shown

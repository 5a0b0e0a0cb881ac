"""Which experts stand in a written file: for each layer their number, and a digest of each expert's weights.

A digest is over the bytes of one expert in canonical form: gate rows, up rows, down rows, biases; of experts that are
stored as codes, codes, scales and zeros of both stacks as codes.py lays them out. It is computed once from the file's
external data and once from the checkpoint: they are equal only if every expert is there, unchanged and in its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.export.onnx import microsoft, portable
from moec.compiler.export.onnx.codes import laid_out
from moec.compiler.export.onnx.errors import ExportError
from moec.compiler.export.onnx.experts import ROLES, STEMS, Site
from moec.compiler.export.onnx.write import as_numpy, data_name
from moec.compiler.lowering.packing import make
from moec.passes.ir.quantised import parts_by_expert
from moec.passes.ir.weights import Read

Expert = dict[str, np.ndarray]
"""The tensors of one expert by role, without the axis of experts."""


def coverage(path: Path, sites: Iterable[Site], read: Read) -> list[dict[str, Any]]:
    """The certificate of a written model: one record for each layer of experts.

    {"layer", "node", "op", "experts", "top_k", "activation", "stored", "sha256": [one for each expert]}, and "note"
    where the checkpoint's codes are not kept.
    Raises: ExportError: a layer's node or an expert is missing, or is not the checkpoint's.
    Cost: reads every expert twice, one layer at a time.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    initialisers = {t.name: t for t in model.graph.initializer}
    nodes = _readers(model.graph)
    records = []
    for site in sites:
        node = nodes.get(site.names["w_in"])
        if node is None:
            raise ExportError(f"{site.where}: no node in {path.name} reads {site.names['w_in']}; the experts are lost")
        stacks = {role: _stored(path, initialisers[name]) for role, name in site.names.items()}
        found, expected = _digests(_of_file(stacks, site)), _digests(_of_checkpoint(site, read))
        wrong = [e for e, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
        if wrong:
            raise ExportError(f"{site.where}: expert {wrong[0]} in {path.name} is not the checkpoint's; export again")
        record = {
            "layer": site.layer,
            "node": node.name,
            "op": f"{node.domain}.{node.op_type}",
            "experts": len(found),
            "top_k": site.call.top_k,
            "activation": site.call.act,
            "stored": site.stored_as,
            "sha256": found,
        }
        records.append(record | ({"note": site.note} if site.note else {}))
    return records


def _readers(graph: Any) -> dict[str, Any]:
    """Initialiser -> the experts node that reads it, through a Cast where it is stored narrow."""
    widened = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Cast"}
    experts = [n for n in graph.node if n.domain in (portable.DOMAIN, microsoft.DOMAIN)]
    return {widened.get(name, name): n for n in experts for name in n.input}


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


def _of_file(stacks: dict[str, np.ndarray], site: Site) -> Iterator[Expert]:
    """The experts of a written layer, gate rows before up rows."""
    for e in range(site.num_experts):
        expert = {role: stack[e] for role, stack in stacks.items()}
        if site.in_turn:
            halves = {r: np.concatenate([t[0::2], t[1::2]]) for r, t in expert.items() if r.endswith("_in")}
            expert |= halves
        yield expert


def _of_checkpoint(site: Site, read: Read) -> Iterator[Expert]:
    """The same experts from the checkpoint."""
    coded = [r for r in ROLES if r.startswith("w_") and site.format is not None]
    plain = {r: as_numpy(make(w, read)) for r, w in site.canonical.items() if r not in coded}
    parts = {r: parts_by_expert(site.canonical[r], read) for r in coded}
    for e in range(site.num_experts):
        expert = {role: stack[e] for role, stack in plain.items()}
        for role, each in parts.items():
            made = laid_out(next(each), False)
            expert |= {role.replace("w", STEMS[part], 1): as_numpy(t) for part, t in made.items()}
        yield expert


def _digests(experts: Iterable[Expert]) -> list[str]:
    """sha256 of each expert."""
    shown = []
    for expert in experts:
        digest = hashlib.sha256()
        for role in sorted(expert, key=lambda r: (r[0] != "w", r)):
            digest.update(np.ascontiguousarray(expert[role]).tobytes())
        shown.append(digest.hexdigest())
    return shown

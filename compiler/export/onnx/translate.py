"""A module as an ONNX model, through torch.export and torch.onnx: shapes symbolic, weights absent.

torch.onnx translates the ATen calls; its result is then cleaned: names of the interface, no traces of source files, no
values that nobody reads.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as fx_config

from moec.compiler.export.onnx import experts, portable
from moec.compiler.export.onnx.errors import ExportError
from moec.compiler.export.onnx.interface import Interface
from moec.compiler.export.onnx.meaning import META, OnnxModule

TRACED = (3, 5, 7, 11, 13, 17, 19, 23)
"""Sizes of symbolic dimensions while a module is traced: no two alike, none special."""


def translate(module: OnnxModule, opset: int) -> Any:
    """The module as an onnx_ir.Model whose initialisers have names, shapes and dtypes but no values.

    Raises: ExportError: an operator that torch.onnx has no translation for, or a symbolic size became fixed.
    """
    with quiet():
        program = _program(module)
        try:
            model = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                custom_translation_table={torch.ops.aten.sort.stable: sort_stable},
                optimize=False,
                verbose=False,
            ).model
        except Exception as error:  # torch.onnx wraps whatever an operator's translation raised
            raise ExportError(f"torch.onnx cannot translate the model: {_cause(error)}") from error
    _rename(model, module)
    _strip(model)
    _add_functions(model, module, opset)
    return model


def _program(module: OnnxModule) -> ExportedProgram:
    """The traced module; its symbolic sizes go from 1 up, the past's from 0."""
    args, dims = _example(module.interface)
    try:
        with fx_config.patch(backed_size_oblivious=True), torch.no_grad():  # type: ignore[attr-defined]
            program = torch.export.export(module, args, dynamic_shapes={"inputs": dims}, strict=False)
    except ExportError:
        raise
    except Exception as error:  # whatever an operator raises under a trace
        raise ExportError(f"the graph cannot be traced over a batch of rows: {_cause(error)}") from error
    values = {n.name: n.meta["val"] for n in program.graph.find_nodes(op="placeholder")}
    for port, name in zip(module.interface.inputs, program.graph_signature.user_inputs, strict=True):
        fixed = [f"{s} = {n}" for s, n in zip(port.shape, values[str(name)].shape, strict=True) if s != n and isinstance(n, int)]
        if fixed:
            raise ExportError(f"input {port.name}: the model fixes {', '.join(fixed)}; it works for that size only")
    return program


def _example(interface: Interface) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Meta tensors of the inputs, and which of their dimensions are symbolic."""
    symbols = dict.fromkeys(s for port in interface.inputs for s in port.shape if isinstance(s, str))
    sizes = dict(zip(symbols, TRACED, strict=False))
    if interface.caches:
        batch, new, total, past = symbols
        sizes[total] = sizes[past] + sizes[new]
    args = [torch.empty([sizes.get(s, s) for s in p.shape], dtype=p.dtype, device=META) for p in interface.inputs]
    dims = tuple({i: Dim.AUTO for i, s in enumerate(p.shape) if isinstance(s, str)} for p in interface.inputs)
    return tuple(args), dims


def sort_stable(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """aten.sort.stable as TopK over all: of equal values TopK, too, puts the lower index first."""
    from onnxscript import opset18 as op

    size = op.Shape(self, start=dim, end=dim + 1 if dim != -1 else None)
    return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)


def _rename(model: Any, module: OnnxModule) -> None:
    """Inputs, outputs and initialisers get the interface's names and shapes."""
    import onnx_ir as ir

    graph = model.graph
    for attribute, name in module.names.items():
        value = graph.initializers.pop(attribute, None)
        if value is not None:
            value.name, value.const_value = name, None
            graph.initializers[name] = value
    for value, port in zip(graph.inputs, module.interface.inputs, strict=True):
        value.name, value.shape = port.name, ir.Shape(port.shape)
    for value, name in zip(graph.outputs, module.interface.outputs, strict=True):
        value.name = name
    presents = {port.present.name: port.present for port in module.interface.caches}
    for value in graph.outputs:
        if value.name in presents:
            value.shape = ir.Shape(presents[value.name].shape)


def _strip(model: Any) -> None:
    """Drops what only this trace knows: metadata (source files among it), value shapes, values that nobody reads."""
    import onnx_ir as ir
    import onnx_ir.passes.common as common

    common.RemoveUnusedNodesPass()(model)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    kept = {id(v) for v in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values())}
    for graph in (model.graph, *model.functions.values()):
        graph.metadata_props.clear()
        for node in ir.traversal.RecursiveGraphIterator(graph):
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
                if id(value) not in kept:
                    value.shape = value.type = None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _add_functions(model: Any, module: OnnxModule, opset: int) -> None:
    """The bodies of the portable experts nodes, each once, and the domains that the model uses."""
    import onnx_ir as ir

    for form in {experts.form_of(site) for site in module.sites.values()} if module.kind == experts.PORTABLE else ():
        function = ir.serde.deserialize_function(portable.function(form, opset))
        model.functions[function.identifier()] = function
    model.opset_imports[""] = opset


def _cause(error: BaseException) -> str:
    """The first line of what went wrong at the bottom of a chain of exceptions."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without torch.onnx's progress and warnings: what went wrong is an exception."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [log.level for log in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for log in loggers:
            log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for log, level in zip(loggers, levels, strict=True):
                log.setLevel(level)

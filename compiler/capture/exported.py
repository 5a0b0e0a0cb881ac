"""Captures what torch.export made: an ExportedProgram in memory, or a .pt2 file that the user trusts."""

from __future__ import annotations

import copy
import zipfile
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from moec.compiler.capture.captured import Captured, ModelInfo
from moec.compiler.capture.compare import DynamicDims, compare
from moec.compiler.capture.graph import adopt, expert_layers, small_size_guards, symbol_names
from moec.compiler.capture.module import LETTERS
from moec.compiler.capture.tensors import constants_of, sources_of
from moec.compiler.errors import CheckpointError, CompileError, UnsupportedModel
from moec.passes.infra.errors import in_one_line


def load_pt2(path: Path, trusted: bool) -> ExportedProgram:
    """The program in a .pt2 file.

    Raises: CompileError: not trusted; nothing of the file was read.  CheckpointError: there is no such file, or it is
        no archive of torch.export.
    """
    if not trusted:
        raise CompileError(
            f"{path}: torch.export.load may unpickle what is inside, and a pickle can run any code; if you trust the "
            "file's author, give trust_pt2=True (--trust-pt2)"
        )
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; make one with torch.export.save(program, path)")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: not an archive of torch.export.save; is the file whole?")
    try:
        return torch.export.load(path)
    except Exception as error:  # torch gives every kind, by where the file is damaged
        raise CheckpointError(
            f"{path}: torch.export.load fails: {in_one_line(error)}; export the program again"
        ) from error


def capture_exported(program: ExportedProgram, name: str = "ExportedProgram") -> Captured:
    """Captures an exported program; it is not changed. Its symbolic sizes stay symbolic, other sizes stay fixed.

    name: what reports call it.
    Raises: UnsupportedModel: it writes to its own buffers, gives other values than tensors, or holds an operator that
        a compiled graph has no place for.
    """
    tensors = {k: v for k, v in program.state_dict.items() if isinstance(v, Tensor)} | constants_of(program)
    _check_results(program)
    inputs = [s.arg for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    names = [a.name for a in inputs]
    copied = _copied(program)
    with torch.no_grad():
        gm = adopt(copied, names, sources_of(tensors))
        kept = [n for n, a in zip(names, inputs, strict=True) if not isinstance(a, ConstantArgument)]
        dims = _dims(gm)
        symbols = symbol_names(gm, dims)
    captured = Captured(
        graph_module=gm,
        kind="module",
        info=ModelInfo(model_type=name, dtype=_dtype(tensors)),
        read=lambda source: tensors[source].detach(),
        moe_layers=expert_layers(gm),
        symbols=symbols,
        guards=small_size_guards(program),
    )
    _compare(program, captured, kept, dims)
    return captured


class _Flat(nn.Module):
    """The program as a module of its tensor inputs alone, in the graph's order."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self.run = program.module(check_guards=False)
        args, kwargs = program.example_inputs
        self.flat, self.spec = pytree.tree_flatten((args, kwargs))

    def forward(self, *tensors: Tensor) -> Any:
        given = iter(tensors)
        args, kwargs = pytree.tree_unflatten(
            [next(given) if isinstance(v, Tensor) else v for v in self.flat], self.spec
        )
        return self.run(*args, **kwargs)


def _compare(program: ExportedProgram, captured: Captured, names: list[str], dims: dict[tuple[str, int], str]) -> None:
    """Runs the program and the graph on the program's own example; a program without one is taken as it is."""
    if program.example_inputs is None:
        return
    flat = _Flat(program)
    tensors = tuple(v for v in flat.flat if isinstance(v, Tensor))
    at: DynamicDims = {}
    for (name, d), letter in dims.items():
        at.setdefault(names.index(name), {})[d] = letter
    compare(flat, captured, tensors, at)


def _check_results(program: ExportedProgram) -> None:
    for spec in program.graph_signature.output_specs:
        if isinstance(spec.arg, ConstantArgument):
            raise UnsupportedModel(
                f"the program gives {spec.arg.value!r} among its results; an engine gives tensors alone"
            )


def _copied(program: ExportedProgram) -> ExportedProgram:
    """The program with a graph of its own, whose nodes have the same names."""
    graph, known = Graph(), dict[Any, Any]()
    for node in program.graph.nodes:
        known[node] = graph.node_copy(node, known.__getitem__)
        known[node].meta = dict(node.meta)
    other = copy.copy(program)
    other._graph_module = GraphModule(program.graph_module, graph)
    return other


def _dims(gm: GraphModule) -> dict[tuple[str, int], str]:
    """A name for each symbolic dimension of an input; equal symbols share one."""
    letters: dict[Any, str] = {}
    found: dict[tuple[str, int], str] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        for d, expr in _symbols(node):
            letter = LETTERS[len(letters)] if len(letters) < len(LETTERS) else f"D{len(letters)}"
            found[node.name, d] = letters.setdefault(expr, letter)
    return found


def _symbols(node: Node) -> list[tuple[int, Any]]:
    shape = getattr(node.meta.get("val"), "shape", ())
    sizes = [(d, s.node.expr) for d, s in enumerate(shape) if isinstance(s, torch.SymInt)]
    return [(d, e) for d, e in sizes if isinstance(e, sympy.Symbol)]


def _dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    return next((t.dtype for t in tensors.values() if t.dtype.is_floating_point), torch.float32)

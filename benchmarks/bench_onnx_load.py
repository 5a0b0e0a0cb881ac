"""How long ONNX Runtime takes to load a model whose experts are one node a layer, against one with unrolled experts.

    PYTHONPATH=tests/support python benchmarks/bench_onnx_load.py [--experts 32] [--layers 8] [--runs 5]

Both are the same Mixtral with tiny widths, so that what is timed is the graph and not the reading of weights, and both
answer alike. The fused files are moec's. The unrolled one is moec's, too, with each experts node replaced by what
exporters write for a Python loop over the experts: for each expert the rows that chose it (NonZero), Gather, three
MatMul, the activation, the weight of each row, ScatterND. Its constants are shared and its matrices stored as MatMul
takes them; an exporter's own file has more nodes for the same loop. Times are of the processor (one thread loads), the
best of several sessions in one process, with all of ONNX Runtime's graph optimisations.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
import typer
import zoo
from rich.console import Console

from moec.compiler.capture import capture
from moec.compiler.export.onnx.publish import prepare, publish
from moec.compiler.export.onnx.session import open_session

console = Console()


def quiet(stage: str, done: int, total: int) -> None:
    """No progress."""


def unroll(source: Path, target: Path) -> int:
    """Writes the model with every portable experts node unrolled; gives its number of nodes."""
    model = ir.load(source)
    graph = model.graph
    for node in [n for n in graph if n.domain == "moec"]:
        replace(graph, node)
    model.functions.clear()
    graph.opset_imports.pop("moec")
    ir.save(model, target, external_data=f"{target.name}.data")
    return len(graph)


def replace(graph: ir.Graph, node: ir.Node) -> None:
    """One loop over the experts, written out."""
    x, weights, chosen, w_in, w_out = node.inputs
    made: list[ir.Node] = []
    stem = str(node.outputs[0].name)

    def op(op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        made.append(ir.node(op_type, list(inputs), attributes, name=f"{stem}_{len(made)}_{op_type}"))
        made[-1].outputs[0].name = f"{stem}_u{len(made)}"
        return made[-1].outputs[0]

    def weight(name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(np.array(array, order="C"), name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.initializers[name] = value
        return value

    both, down = w_in.const_value.numpy(), w_out.const_value.numpy()
    inner = both.shape[1] // 2
    zero = weight(f"{stem}_zero", np.array(0, np.int64))
    columns = weight(f"{stem}_columns", np.array([1], np.int64))
    y = op("Mul", x, weight(f"{stem}_nothing", np.array(0, np.float32)))
    for e in range(len(both)):
        number = weight(f"{stem}_{e}", np.array(e, np.int32))
        where = op("NonZero", op("Equal", chosen, number))
        rows = op("Gather", where, zero)
        factor = op("Unsqueeze", op("GatherND", weights, op("Transpose", where, perm=[1, 0])), columns)
        h = op("Gather", x, rows)
        gate = op("MatMul", h, weight(f"{stem}_{e}_gate", both[e, :inner].T))
        up = op("MatMul", h, weight(f"{stem}_{e}_up", both[e, inner:].T))
        act = op("Mul", op("Mul", gate, op("Sigmoid", gate)), up)
        share = op("Mul", op("MatMul", act, weight(f"{stem}_{e}_down", down[e].T)), factor)
        y = op("ScatterND", y, op("Unsqueeze", rows, columns), share, reduction="add")
    graph.insert_before(node, made)
    ir.convenience.replace_all_uses_with(node.outputs[0], y)
    graph.remove(node, safe=True)
    for stack in (w_in, w_out):
        graph.initializers.pop(stack.name)


def load_seconds(path: Path, runs: int) -> float:
    best = float("inf")
    for _ in range(runs):
        started = time.process_time()
        open_session(path, threads=1)
        best = min(best, time.process_time() - started)
    return best


def answer(path: Path) -> np.ndarray:
    session = open_session(path, threads=1)
    ids = np.arange(8, dtype=np.int64).reshape(2, 4)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for port in session.get_inputs()[2:]:
        feed[port.name] = np.zeros([2, *(d if isinstance(d, int) else 0 for d in port.shape[1:])], np.float32)
    return session.run(["logits"], feed)[0]


def main(
    experts: Annotated[int, typer.Option()] = 32,
    layers: Annotated[int, typer.Option()] = 8,
    runs: Annotated[int, typer.Option(help="sessions of each file; the best counts")] = 5,
) -> None:
    torch.set_num_threads(1)
    model = zoo.build(zoo.tiny("mixtral", num_local_experts=experts, num_hidden_layers=layers))
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(capture(model), None, quiet)
        made = {k: publish(prepared, Path(folder) / f"{k}.onnx", k, 21, quiet) for k in ("portable", "com.microsoft")}
        files = {k: (m.path, m.nodes) for k, m in made.items()}
        flat = Path(folder) / "unrolled.onnx"
        files["unrolled"] = flat, unroll(files["portable"][0], flat)
        expected = answer(files["portable"][0])
        slowest = load_seconds(flat, max(1, runs // 2))
        versions = f"ONNX Runtime {onnxruntime.__version__}, onnx {onnx.__version__}"
        console.print(f"{versions}; {layers} layers, {experts} experts", soft_wrap=True)
        for kind, (path, nodes) in files.items():
            error = float(np.abs(answer(path) - expected).max() / np.abs(expected).max())
            seconds = slowest if kind == "unrolled" else load_seconds(path, runs)
            times = f"{seconds * 1e3:.1f} ms of processor time, {slowest / seconds:.1f} times as fast as unrolled"
            console.print(f"{kind}: {nodes} nodes, {times}, logits {error:.1e} from portable's", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)

"""The runtime and the GPU benchmark where a rented GPU is: Python 3.12, torch 2.11, no TVM, no transformers.

`make gpu-machine` runs them there for real; these tests keep the way open where only torch 2.13 is installed.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.null
ROOT = Path(__file__).parents[2]

# what torch 2.13 has and 2.11 has not, by tests/support/torch_names.py under both; common words are left out
COMPARED = "2.13."
NEWER = {
    "torch.backends.python_native", "torch.cuda.platform", "torch.dtype.abbr", "torch.thread_safe_generator",
}  # fmt: skip
NEWER_ANYWHERE = {
    "const_data_ptr", "get_graph_data", "caching_allocator_disabled", "current_solver_handle", "all_gather_single",
    "all_gather_single_coalesced", "all_to_all_single", "reduce_scatter_single", "reduce_scatter_single_coalesced",
    "use_pg_for_symm_mem_rendezvous", "record_comm", "linear_cross_entropy",
}  # fmt: skip

IMPORTS = """
import importlib.abc, json, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tvm", "tvm_ffi", "transformers", "scipy", "onnx"):
            raise ModuleNotFoundError(f"{name} is not on a GPU machine", name=name)

sys.meta_path.insert(0, Absent())
sys.path.insert(0, "benchmarks/gpu")
import attention, engine, peers, roofline, run
import moec.cli, moec.compiler.tune.runner.child, moec.runtime.cuda_engine
print(json.dumps([m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "moec" and m.__file__]))
"""


def attributes(tree):
    """Each attribute that a module asks for: its dotted name, as far back as it is plain names, and its line."""
    short = {"F": "torch.nn.functional", "dist": "torch.distributed"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts, value = [node.attr], node.value
            while isinstance(value, ast.Attribute):
                parts, value = [value.attr, *parts], value.value
            first = short.get(value.id, value.id) if isinstance(value, ast.Name) else ""
            yield ".".join([first, *parts]), node.attr, node.lineno
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{a.name}", a.name, node.lineno) for a in node.names)


def newer_names(text):
    """Names in a module's text that torch 2.11 has not."""
    return [
        f"{line}: {name}" for name, last, line in attributes(ast.parse(text)) if name in NEWER or last in NEWER_ANYWHERE
    ]


@pytest.fixture(scope="module")
def needed():
    """The files that running engines and measuring take, imported without a compiler."""
    result = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    found = {Path(name).resolve() for name in json.loads(result.stdout)} | set((ROOT / "runtime").rglob("*.py"))
    return sorted(found | set((ROOT / "benchmarks" / "gpu").glob("*.py")))


def test_running_and_measuring_import_no_compiler(needed):
    names = {path.relative_to(ROOT).as_posix() for path in needed}
    assert names >= {"runtime/cuda_engine.py", "benchmarks/gpu/run.py", "passes/ir/gate.py"}
    assert not [n for n in names if n.startswith(("compiler/capture", "compiler/lowering"))]


def test_torch_2_11_has_every_name(needed):
    found = [f"{p.relative_to(ROOT)}:{name}" for p in needed for name in newer_names(p.read_text())]
    assert not found, f"torch 2.11, which GPU machines have, lacks {', '.join(found)}"
    assert torch.__version__.startswith(COMPARED), "compare tests/support/torch_names.py under both versions again"


def test_a_newer_name_is_found():
    text = (
        "from torch import thread_safe_generator\nx.const_data_ptr()\nF.linear_cross_entropy(x)\ntorch.cuda.platform\n"
    )
    assert sorted(newer_names(text)) == [
        "1: torch.thread_safe_generator", "2: x.const_data_ptr", "3: torch.nn.functional.linear_cross_entropy",
        "4: torch.cuda.platform",
    ]  # fmt: skip

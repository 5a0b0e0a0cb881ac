"""The attention benchmark without a GPU: its launches on emulated kernels, and what it says without a device."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moec.compiler.codegen.cuda import lower
from moec.compiler.codegen.emulator.emulator import Emulated
from moec.compiler.kernels.attention.problem import AttentionProblem
from moec.compiler.kernels.cuda import attention as kernels

pytestmark = pytest.mark.null
FILE = Path(__file__).parents[2] / "benchmarks" / "gpu" / "attention.py"


@pytest.fixture
def bench():
    spec = importlib.util.spec_from_file_location("bench_attention", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_its_launches_are_right_and_its_check_bites(bench, tmp_path):
    heads = (4, 2, 64, 64)

    def launcher(part):
        function = getattr(kernels, f"build_{part}")(AttentionProblem(*heads))
        made = Emulated.build(lower(part, function, "sm_80"), tmp_path)
        return lambda **values: made.run(values, made.source.grid_of(values), lazy=True, seed=2)

    step = bench.Step(heads, {part: launcher(part) for part in bench.PARTS}, 2, 70, "cpu")
    assert bench.is_right(step, 2)
    assert (step.by_torch()[:, :, 0].double() - step.reference()).abs().max() < bench.TOLERANCE
    step.kernels = dict.fromkeys(bench.PARTS, lambda **values: None)
    assert not bench.is_right(step, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    result = subprocess.run([sys.executable, str(FILE), "run", str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "error: torch finds no CUDA device; run this on a machine with a GPU\n"

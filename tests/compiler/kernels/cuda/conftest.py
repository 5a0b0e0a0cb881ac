"""CUDA kernels in emulation: `emulate(source, values)` runs one four ways and checks that all four agree."""

import dataclasses
import re

import pytest
import torch

from moec.compiler.codegen.cuda import lower
from moec.compiler.codegen.emulator.emulator import Emulated


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """(name, function, arch, boxes) -> Emulated, compiled once per text."""
    folder = tmp_path_factory.mktemp("emulated")

    def build(name, function, arch="sm_80", boxes=None):
        return Emulated.build(lower(name, function, arch, boxes), folder)

    return build


@pytest.fixture
def planted(tmp_path):
    """(kernel, pattern, replacement) -> the kernel with a fault in its text."""

    def build(kernel, pattern, replacement):
        text, count = re.subn(pattern, replacement, kernel.source.text)
        assert count, "the fault was not planted"
        return Emulated.build(dataclasses.replace(kernel.source, text=text), tmp_path)

    return build


@pytest.fixture
def run():
    """Runs a kernel with copies as early and as late as allowed, threads in two orders; results must be equal.

    values: parameter -> tensor or number; outputs are changed in place. wave: blocks that run together.
    """

    def go(kernel, values, wave=1, orders=(1, 2)):
        grid = kernel.source.grid_of(values)
        results = []
        for lazy, seed in zip((False, True), orders, strict=True):
            mine = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
            kernel.run(mine, grid, lazy, seed, wave)
            results.append(mine)
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                first, second = (r[name].reshape(-1).view(torch.uint8) for r in results)
                assert torch.equal(first, second), f"{name} depends on the order of threads or copies"
                value.copy_(results[0][name])
        return values

    return go

"""A router with its experts as an engine on an emulated GPU: every way of doing them, next to float32; faults."""

import dataclasses
import re

import pytest
import torch
from cuda_program import relative_error

from moec.compiler import api
from moec.compiler.codegen.emulator.device import EmulatedDevice, build_emulated
from moec.compiler.lowering.cuda import build
from moec.passes.ir.gate import GateSpec
from moec.runtime.engine import load

pytestmark = pytest.mark.null

# of y: h, y and (on_input) x times its weight are rounded to bfloat16, 2**-9 each on average at most
TOLERANCE = 0.006
E4M3_TOLERANCE = 0.08  # e4m3 keeps 3 bits of x, w and h; the reference rounds nothing


class Block(torch.nn.Module):
    """A router and its experts in bfloat16: 128 wide, 6 experts, top 2, one shared."""

    def __init__(self, inner=64, on_input=False):
        super().__init__()
        torch.manual_seed(0)
        self.on_input, self.spec = on_input, GateSpec(2, renormalise=True).encode()
        shapes = {"router": (6, 128), "up": (7, 2 * inner, 128), "down": (7, 128, inner)}
        for name, shape in shapes.items():
            setattr(self, name, torch.nn.Parameter((torch.randn(shape) / shape[-1] ** 0.5).bfloat16()))

    def forward(self, x):
        weights, experts = torch.ops.moec.gate_linear(x, self.router, None, None, self.spec, "float32")
        return torch.ops.moec.experts(
            x, weights, experts, self.up, self.down, None, None, None, "silu", 1, self.on_input
        )


def compiled(block, folder, monkeypatch, arch, weights=None, fault=None, **options):
    """The engine on an emulated GPU. fault: (role, pattern, replacement) in a kernel's text."""
    planted = []

    def build_with_fault(sources, cache_dir):
        return build_emulated([_with(fault, source, planted) for source in sources], cache_dir)

    monkeypatch.setattr(build, "build_cubins", build_with_fault)
    api.compile_to(
        block, folder, [torch.randn(5, 128).bfloat16()], target=f"cuda:{arch}", weights=weights, verify="off", **options
    )
    assert bool(planted) == (fault is not None), "the fault was not planted"
    return load(folder, device=EmulatedDevice(arch))


def _with(fault, source, planted):
    if fault is None or not source.name.startswith(f"{fault[0]}_"):
        return source
    text, count = re.subn(fault[1], fault[2], source.text)
    planted += [source.name] * bool(count)
    return dataclasses.replace(source, text=text)


def roles(engine):
    """What was launched since the last call, by role, in order."""
    launched = [symbol.removesuffix("_kernel").rsplit("_", 1)[0] for symbol, _ in engine.device.library.launches]
    engine.device.library.launches.clear()
    return launched


def check(engine, block, tokens, limit):
    """Runs so many tokens twice: what a launch leaves behind is what the next one finds."""
    wide = Block(block.down.shape[2], block.on_input).float()
    for seed in range(2):
        x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(seed)).bfloat16()
        with torch.no_grad():
            error = relative_error(engine(x), wide(x.float()))
        assert error < limit, f"{tokens} tokens, run {seed}: {error}"


GEMMS = ["gate_up", "down"]
ORDERED = ["place", *GEMMS, "combine"]


def test_each_range_of_tokens_has_its_way(tmp_path, monkeypatch):
    block = Block()
    engine = compiled(block, tmp_path / "engine", monkeypatch, "sm_80")
    for tokens, launched in (
        (1, ["moe_decode"]),
        (2, ["moe_decode"]),
        (3, ["gate_linear", *ORDERED]),
        (9, ["gate", *ORDERED]),
    ):
        check(engine, block, tokens, TOLERANCE)
        assert roles(engine) == 2 * launched

"""A router with its experts as an engine on an emulated GPU: every way of doing them, next to float32; faults.

Ranges of T are those of conftest.py: one launch up to 2 tokens, few up to 4; in CI the kernels for few take all others.
"""

import copy
import dataclasses
import io
import math
import re

import pytest
import torch
from cuda_layer import some_slow
from cuda_program import relative_error
from rich.console import Console

from moec import cli
from moec.compiler import api
from moec.compiler.codegen.emulator.device import EmulatedDevice, EmulatedLibrary, build_emulated
from moec.compiler.lowering.cuda import bind_experts, build
from moec.passes.ir.formats import parse_format
from moec.passes.ir.gate import GateSpec
from moec.passes.ir.quantise import dequantise_parts, quantise
from moec.runtime.engine import load
from moec.runtime.errors import StepError
from moec.runtime.format import TUNING, read_json
from moec.runtime.reports import inspect_engine

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


@dataclasses.dataclass
class Built:
    """An engine's folder, and its kernels in the forms before and after building."""

    folder: object
    arch: str
    built: list

    def load(self, fault=None, **order):
        """On a GPU whose blocks run as far as they get in turn; order: else. fault: (role, pattern, replacement)."""
        library = Replacing(**({"seed": 2} | order))
        for one in self.built if fault else ():
            if one.source.name.startswith(f"{fault[0]}_"):
                text, count = re.subn(fault[1], fault[2], one.source.text)
                assert count, "the fault was not planted"
                (wrong,) = build_emulated([dataclasses.replace(one.source, text=text)], self.folder.parent)
                library.instead[one.path.read_bytes()] = wrong.path.read_bytes()
        assert bool(fault) == bool(library.instead)
        return load(self.folder, device=EmulatedDevice(self.arch, library))


class Replacing(EmulatedLibrary):
    """Loads other machine code in the place of some."""

    def __init__(self, **options):
        super().__init__(**options)
        self.instead = {}

    def cuModuleLoadData(self, module, data):
        return super().cuModuleLoadData(module, self.instead.get(data, data))


def compiled(block, folder, monkeypatch, arch, **options):
    kept = []

    def keeping(sources, cache_dir):
        kept.extend(build_emulated(sources, cache_dir))
        return kept

    monkeypatch.setattr(build, "build_cubins", keeping)
    example = [torch.randn(5, 128).bfloat16()]
    api.compile_to(block, folder, example, target=f"cuda:{arch}", verify="off", **options)
    return Built(folder, arch, kept)


def roles(engine):
    """What was launched since the last call, by role, in order."""
    launched = [symbol.removesuffix("_kernel").rsplit("_", 1)[0] for symbol, _ in engine.device.library.launches]
    engine.device.library.launches.clear()
    return launched


def in_float32(block, weights):
    """The model in float32, its experts rounded to whole numbers of steps where they are stored so."""
    wide = copy.deepcopy(block)
    for stack in (wide.up, wide.down) if weights == INT4["weights"] else ():
        stack.data = dequantise_parts(quantise(stack.detach(), parse_format("int4-g32")))
    return wide.float()


def largest_error(engine, wide, tokens):
    """Of two runs: what a launch leaves behind is what the next one finds."""
    errors = []
    for seed in range(2):
        x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(seed)).bfloat16()
        with torch.no_grad():
            errors.append(relative_error(engine(x), wide(x.float())))
    return max(math.inf if math.isnan(e) else e for e in errors)


GEMMS = ["gate_up", "down"]
ORDERED = ["place", *GEMMS, "combine"]
GATHERED = ["place", "gather", *GEMMS, "combine"]
ROUNDED = ["place", "gather", "gate_up", "quantise_h", "down", "combine"]
FAULTS = {
    "a barrier that is not put back": (1, ("moe_decode", r"moec_count_in\(\(&\(barrier_ptr\[1\]\)\), blocks\)", "0")),
    "a count of blocks that is not put back": (3, ("gate_linear", r"\*counter = 0;", "")),
    "sums that are not put back": (3, ("finish", r"\(uint\)0(, |\))", r"(uint)1065353216\1")),
    "rows without their weight": (3, ("gather", r"condval = weights_ptr\[.*\];", "condval = 1.0f;")),
    "rows of another scale": (2, ("quantise_h", r"(scale_ptr\[.*\]) = ", r"\1 = 2.0f * ")),
}


@dataclasses.dataclass
class Case:
    """ways: tokens -> what is launched.  refused: kernel -> why, as `inspect` says.  faults: of FAULTS, each found."""

    arch: str
    ways: dict
    options: dict = dataclasses.field(default_factory=dict)
    on_input: bool = False
    refused: dict = dataclasses.field(default_factory=dict)
    faults: tuple = ()


FP8, INT4, FAST = {"weights": "fp8"}, {"weights": "experts=int4-g32"}, {"combine": "fast"}
E4M3 = {"cuda-moe-decode": "e4m3 rows: h would have to be rounded between the GEMMs"}
APPLIED = {"cuda-moe-decode": "the weights of the routing are applied to the input"}
PUT_BACK = tuple(FAULTS)[:2]
CASES = {
    "plain": Case(
        "sm_80", {1: ["moe_decode"], 2: ["moe_decode"], 3: ["gate_linear", *ORDERED], 9: ["gate", *ORDERED]},
        refused={"library-experts": "the host would wait for the device, no graphs"}, faults=PUT_BACK,
    ),
    "atomic sums": Case(
        "sm_80", {3: ["gate_linear", "place", *GEMMS, "finish"]}, FAST, faults=("sums that are not put back",)
    ),
    "weights on the input": Case(
        "sm_80", {2: ["gate_linear", *GATHERED]}, {}, True, APPLIED, ("rows without their weight",)
    ),
    "fp8": Case("sm_89", {2: ["gate_linear", *ROUNDED]}, FP8, False, E4M3, ("rows of another scale",)),
    "fp8, wgmma": Case("sm_90a", {2: ["gate_linear", *ROUNDED], 9: ["gate", *ROUNDED]}, FP8, False, E4M3),
    "weights on the input, wgmma": Case("sm_90a", {2: ["gate_linear", *GATHERED], 9: ["gate", *GATHERED]}, {}, True),
    "fp8, weights on the input": Case("sm_89", {2: ["gate_linear", *ROUNDED], 9: ["gate", *ROUNDED]}, FP8, True),
    "fp8, atomic sums": Case("sm_89", {2: ["gate_linear", *ROUNDED[:-1], "finish"]}, FP8 | FAST),
    "int4": Case("sm_80", {2: ["moe_decode"], 3: ["gate_linear", *ORDERED]}, INT4),
}  # fmt: skip
QUICK = 4  # cases in CI


@pytest.mark.parametrize("name", some_slow(CASES, range(QUICK)))
def test_each_range_of_tokens_has_its_way(name, tmp_path, monkeypatch):
    case = CASES[name]
    if name in list(CASES)[:QUICK]:  # fewer kernels to build
        by_size = bind_experts._kernels_us
        monkeypatch.setattr(bind_experts, "_kernels_us", lambda *a: by_size(*a[:4], 1))
    weights = case.options.get("weights")
    block, limit = Block(128 if weights else 64, case.on_input), E4M3_TOLERANCE if weights == "fp8" else TOLERANCE
    made = compiled(block, tmp_path / "engine", monkeypatch, case.arch, **case.options)
    engine, wide = made.load(), in_float32(block, weights)
    for tokens, launched in case.ways.items():
        assert largest_error(engine, wide, tokens) < limit, tokens
        assert roles(engine) == 2 * launched
    if case.options.get("combine") != "fast":
        x = torch.randn(min(case.ways), 128).bfloat16()
        assert torch.equal(engine(x), made.load(seed=1, lazy=False)(x)), "the last bits depend on the order of threads"
    rejected = {r["kernel"]: r["reason"] for k in read_json(made.folder / TUNING)["kernels"] for r in k["rejected"]}
    assert case.refused.items() <= rejected.items()
    assert all(f"{kernel}: {why}" in inspected(made.folder) for kernel, why in case.refused.items())
    for fault in case.faults:
        assert is_found(made.load(FAULTS[fault][1]), wide, FAULTS[fault][0], limit), fault


def inspected(folder):
    """What `moec inspect` says of the kernels."""
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(cli._kernel_table(inspect_engine(folder)))
    return console.export_text()


def is_found(engine, wide, tokens, limit):
    """Whether two runs show a fault: by the emulator's message, or by what they give."""
    try:
        return largest_error(engine, wide, tokens) > limit
    except StepError:
        return True

"""An engine for a GPU with tiles from a tuning database: which are launched for how many tokens, and the result."""

from pathlib import Path

import pytest
import torch
from cuda_program import relative_error

import moec.compiler.api as api
from moec.compiler.codegen.cuda_archs import architecture
from moec.compiler.codegen.cuda_toolchain import Compiler
from moec.compiler.codegen.emulator.device import EmulatedDevice, EmulatedLibrary, build_emulated
from moec.compiler.kernels.cuda.gemm_space import config_of, with_part
from moec.compiler.kernels.cuda.layer import default_tile
from moec.compiler.lowering.cuda import bind_experts, build
from moec.compiler.tune import cuda_lookup
from moec.compiler.tune.cuda_keys import gemm_key, gemm_problem
from moec.compiler.tune.database import Database
from moec.compiler.tune.record import Record
from moec.passes.ir.gate import GateSpec
from moec.runtime.engine import load
from moec.runtime.format import LEDGER, TUNING, read_json

pytestmark = pytest.mark.null

SIZES = {"E": 6, "F": 64, "H": 128, "K": 2, "S": 0}
NARROW = {"kernel": "gemm_mma", "rows": 16, "columns": 32, "stages": 2, "warps_m": 1, "warps_n": 1, "splits": 1}
TOLERANCE = 0.006  # h and y are rounded to bfloat16, 2**-9 each on average at most


class Block(torch.nn.Module):
    """A router and six experts in bfloat16, 128 wide."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.spec = GateSpec(2, renormalise=True).encode()
        for name, shape in {"router": (6, 128), "up": (6, 128, 128), "down": (6, 128, 64)}.items():
            setattr(self, name, torch.nn.Parameter((torch.randn(shape) / shape[-1] ** 0.5).bfloat16()))

    def forward(self, x):
        weights, experts = torch.ops.moec.gate_linear(x, self.router, None, None, self.spec, "float32")
        return torch.ops.moec.experts(x, weights, experts, self.up, self.down, None, None, None, "silu", 0, False)


def database(path, arch):
    """At 4 tokens narrower tiles take half of the default's time."""
    with Database(path) as opened:
        for mode in ("gate_up", "down"):
            problem = gemm_problem(SIZES, mode)
            key = gemm_key(problem, SIZES, 4, "uniform", "NVIDIA A100", "nvcc 13.0")
            default = config_of(default_tile(problem, arch, False), problem)
            narrow = NARROW | ({"part_dtype": "float32"} if mode == "down" else {})
            assert narrow != default and with_part(problem, narrow)
            opened.add(Record(key, default, "ok", "", 10.0, 1.0, 1.0, 1.0, 9, is_default=True))
            opened.add(Record(key, narrow, "ok", "", 5.0, 0.5, 0.49, 0.51, 9))
    return path


def test_tuned_tiles_are_launched_where_they_were_measured(tmp_path, monkeypatch):
    """T=4 speaks for up to 16 (a factor of 4), but one launch does up to 2 (conftest.py); beyond 16 the default tiles
    run. Both give the experts' sum."""
    monkeypatch.setattr(bind_experts, "_kernels_us", lambda layer, arch, made, size, t: 1 + (size == "large"))
    monkeypatch.setattr(build, "build_cubins", build_emulated)
    monkeypatch.setattr(cuda_lookup, "cubin_compiler", lambda: Compiler("nvcc", Path("nvcc"), "nvcc 13.0"))
    block, example = Block(), [torch.randn(5, 128).bfloat16()]
    found = database(tmp_path / "t.db", architecture("sm_80"))
    api.compile_to(block, tmp_path / "e", example, target="cuda:sm_80", verify="off", tune_db=found)
    (site,) = (k for k in read_json(tmp_path / "e" / TUNING)["kernels"] if k.get("tuned"))
    variants = [(v["max_tokens"], v["kernel"]) for v in site["variants"]]
    assert variants == [(2, "cuda-moe-decode"), (16, "cuda-experts-small-tuned"), (None, "cuda-experts-small")]
    assert site["tuned"][0]["config"]["gate_up"] == NARROW and site["tuned"][0]["source"] == "measured"
    assert read_json(tmp_path / "e" / LEDGER)["tune-kernels"]["matched"]
    engine = load(tmp_path / "e", device=EmulatedDevice("sm_80", EmulatedLibrary(seed=2)))
    wide, launched = Block().float(), []
    for tokens in (5, 20):
        x = torch.randn(tokens, 128).bfloat16()
        with torch.no_grad():
            assert relative_error(engine(x), wide(x.float())) < TOLERANCE
        launched.append({s for s, _ in engine.device.library.launches if s.startswith(("gate_up", "down"))})
        engine.device.library.launches.clear()
    assert len(launched[0]) == len(launched[1]) == 2 and not launched[0] & launched[1]

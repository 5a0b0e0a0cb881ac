"""What a bundle's results say of an engine's GEMMs: which pair of tiles, for which numbers of tokens, and why not."""

import dataclasses
from pathlib import Path

import pytest

from moec.compiler.codegen.cuda_archs import architecture
from moec.compiler.codegen.cuda_toolchain import Compiler
from moec.compiler.kernels.cuda.gemm_space import config_of, refusal
from moec.compiler.kernels.cuda.layer import LayerError, LayerShape, default_tile, layer_kernels
from moec.compiler.lowering.tuned import Tuned, clipped
from moec.compiler.tune import cuda_lookup
from moec.compiler.tune.cuda_keys import gemm_key, gemm_problem
from moec.compiler.tune.cuda_lookup import CudaTuning
from moec.compiler.tune.database import Database
from moec.compiler.tune.record import Record

pytestmark = pytest.mark.null

ARCH = architecture("sm_90a")
SIZES = {"E": 8, "F": 256, "H": 256, "K": 2, "S": 0}
SHAPE = LayerShape("", 256, 256, 8, 2, "")
TOOLS = Compiler("nvcc", Path("nvcc"), "nvcc 13.0, V13.0.88")
BASE = {"kernel": "gemm_mma", "columns": 64, "stages": 3, "warps_m": 1, "warps_n": 2, "splits": 1}
UP_16, UP_32 = BASE | {"rows": 16}, BASE | {"rows": 32}
DOWN_16 = BASE | {"rows": 16, "part_dtype": "float32"}


@pytest.fixture(autouse=True)
def tools(monkeypatch):
    monkeypatch.setattr(cuda_lookup, "cubin_compiler", lambda: TOOLS)


def default(mode, large=False):
    problem = gemm_problem(SIZES, mode, "bfloat16" if large else "float32")
    return config_of(default_tile(problem, ARCH, large), problem)


def database(path, results, device="NVIDIA H200", **changes):
    """results: (tokens, mode, config or None for the default, ratio) -> records with a bound of 1 % each way."""
    with Database(path) as opened:
        for tokens, mode, config, ratio in results:
            key = gemm_key(gemm_problem(SIZES, mode), SIZES, tokens, "zipf-0.4", device, TOOLS.version)
            key = dataclasses.replace(key, **changes)
            usual = config is None
            bounds = (1.0, 1.0, 1.0) if usual else (ratio, ratio * 0.99, ratio * 1.01)
            record = Record(key, config or default(mode), "ok", "", 100.0 * ratio, *bounds, 9, is_default=usual)
            opened.add(record)
    return path


DEFAULTS = [(16, "gate_up", None, 1.0), (16, "down", None, 1.0)]


def at(ranges, tokens):
    return next(r for r in ranges if r.max_tokens is None or tokens <= r.max_tokens)


def test_the_configurations_of_this_test_fit():
    assert refusal(UP_16, gemm_problem(SIZES, "gate_up"), ARCH) is None
    assert refusal(UP_32, gemm_problem(SIZES, "gate_up"), ARCH) is None
    assert refusal(DOWN_16, gemm_problem(SIZES, "down"), ARCH) is None


def test_the_best_pair_has_one_number_of_rows(tmp_path):
    """32 rows are fastest for gate_up alone, but no down with 32 rows was measured: 16 and 16 are taken."""
    results = [*DEFAULTS, (16, "gate_up", UP_32, 0.5), (16, "gate_up", UP_16, 0.7), (16, "down", DOWN_16, 0.9)]
    ranges = CudaTuning(database(tmp_path / "t.db", results), ARCH).ranges(SHAPE, "cuda-experts-small")
    one = at(ranges, 16)
    assert dict(one.config) == {"gate_up": UP_16, "down": DOWN_16} and one.source == "measured"
    assert one.ratio == pytest.approx(0.8) and one.measured_us == pytest.approx(160.0)
    assert "T=16 on NVIDIA H200" in one.why and "0.800 of the default's time, at most 0.808" in one.why


def test_a_measurement_speaks_for_its_neighbourhood(tmp_path):
    results = [(t, m, c, r) for t in (16, 256) for _, m, c, r in DEFAULTS]
    results += [(16, "gate_up", UP_16, 0.5), (256, "gate_up", UP_16, 0.6)]
    ranges = CudaTuning(database(tmp_path / "t.db", results), ARCH).ranges(SHAPE, "cuda-experts-small")
    assert [r.max_tokens for r in ranges] == [4, 64, 1024, None]
    assert [r.source for r in ranges] == ["default", "measured", "measured", "default"]
    assert ranges[1].ratio == pytest.approx(0.75) and ranges[2].ratio == pytest.approx(0.8)
    assert not ranges[0].config and "no measurement near" in ranges[0].why


@pytest.mark.parametrize("ratio", [0.995, 1.2])
def test_what_is_not_surely_faster_changes_nothing(tmp_path, ratio):
    path = database(tmp_path / "t.db", [*DEFAULTS, (16, "gate_up", UP_16, ratio), (16, "down", DOWN_16, 1.0)])
    one = at(CudaTuning(path, ARCH).ranges(SHAPE, "cuda-experts-small"), 16)
    assert one.source == "default" and "nothing was faster" in one.why


def test_the_other_way_needs_a_measurement_of_its_own_tiles(tmp_path):
    path = database(tmp_path / "t.db", [*DEFAULTS, (16, "gate_up", UP_16, 0.5)])
    one = at(CudaTuning(path, ARCH).ranges(SHAPE, "cuda-experts-large"), 16)
    assert one.source == "default" and "the tiles without tuning were not measured" in one.why


def test_why_a_database_says_nothing(tmp_path):
    def told(path, shape=SHAPE, arch=ARCH):
        return CudaTuning(path, arch).ranges(shape, "cuda-experts-small")

    path = database(tmp_path / "t.db", DEFAULTS)
    assert "has no measurement of grouped_gemm E=4," in told(path, dataclasses.replace(SHAPE, num_experts=4))
    assert "on sm_89" in told(path, arch=architecture("sm_89"))
    assert "int4-g64 with silu" in told(path, dataclasses.replace(SHAPE, dtype="int4-g64"))
    for name, value in {"toolchain": "nvcc 1.0", "kernel_sha256": "0" * 64}.items():
        other = database(tmp_path / f"{name}.db", DEFAULTS, **{name: value})
        assert f"measured this layer with {name} {value[:40]}" in told(other)
    mixed = database(tmp_path / "mixed.db", DEFAULTS, toolchain="nvcc 1.0")
    assert "no measurement that fits all of" in told(database(mixed, DEFAULTS, kernel_sha256="0" * 64))


def test_tiles_that_do_not_go_together_are_refused():
    with pytest.raises(LayerError, match="32 rows to a block, down 16"):
        layer_kernels(SHAPE, "sm_90a", "small", {"gate_up": UP_32, "down": DOWN_16})
    with pytest.raises(LayerError, match="no configuration of a CUDA grouped GEMM"):
        layer_kernels(SHAPE, "sm_90a", "small", {"gate_up": {"kernel": "gemm_mma"}, "down": DOWN_16})


def test_ranges_are_cut_to_the_range_of_their_kernel():
    ranges = [Tuned(4, {}, "default", "a"), Tuned(64, {}, "measured", "b"), Tuned(None, {}, "default", "c")]
    assert [(r.max_tokens, r.why) for r in clipped(ranges, 0, None)] == [(4, "a"), (64, "b"), (None, "c")]
    assert [(r.max_tokens, r.why) for r in clipped(ranges, 0, 16)] == [(4, "a"), (16, "b")]
    assert [(r.max_tokens, r.why) for r in clipped(ranges, 16, 64)] == [(64, "b")]
    assert [(r.max_tokens, r.why) for r in clipped(ranges, 64, None)] == [(None, "c")]

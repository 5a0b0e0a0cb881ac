"""The space of the CUDA grouped GEMMs: configurations spell tiles, and what does not fit is refused with the reason."""

import dataclasses

import pytest

from moec.compiler.codegen.cuda_archs import architecture
from moec.compiler.kernels.cuda import gemm_space
from moec.compiler.kernels.cuda.gemm_problem import GemmProblem, Tile
from moec.compiler.kernels.cuda.gemm_space import config_of, configs, refusal, tile_of, with_part
from moec.compiler.kernels.cuda.gemm_wgmma import WgmmaTile
from moec.compiler.kernels.cuda.layer import default_tile
from moec.compiler.kernels.cuda.shapes import SHAPES

pytestmark = pytest.mark.null
GATE_UP = GemmProblem("gate_up", 4096, 14336, 8, 2)
DOWN = GemmProblem("down", 14336, 4096, 8, 2)
HOPPER = architecture("sm_90a")


def test_a_configuration_spells_its_tile():
    for tile, problem in ((Tile(16, 128, 5, 1, 4, 4), DOWN), (Tile(), GATE_UP), (WgmmaTile(128, 4), GATE_UP)):
        assert tile_of(config_of(tile, problem)) == tile
    assert config_of(Tile(), DOWN)["part_dtype"] == "float32" and "part_dtype" not in config_of(Tile(), GATE_UP)
    assert with_part(DOWN, {"part_dtype": "bfloat16"}).part_dtype == "bfloat16" and with_part(DOWN, {}) == DOWN
    for bad in (
        {},
        {"kernel": "other"},
        {"kernel": "gemm_wgmma", "columns": 128},
        config_of(Tile(), DOWN) | {"rows": "16"},
    ):
        with pytest.raises(ValueError, match="is no configuration of a CUDA grouped GEMM"):
            tile_of(bad)


@pytest.mark.parametrize("problem", [GATE_UP, DOWN], ids=["gate_up", "down"])
def test_the_space_holds_every_point_once_and_enough_that_fit(problem):
    points = [tuple(sorted(c.items())) for c in configs(problem)]
    assert len(points) == len(set(points))
    fitting = [c for c in configs(problem) if refusal(c, problem, HOPPER) is None]
    assert len(fitting) > 100 and {c["kernel"] for c in fitting} == set(gemm_space.SPACE)
    assert all(
        c["kernel"] == "gemm_mma" for c in configs(problem) if refusal(c, problem, architecture("sm_89")) is None
    )


def test_what_does_not_fit_is_refused_with_the_reason():
    tile = config_of(Tile(16, 128, 4, 1, 4), DOWN)
    for change, message in (
        ({"stages": 5, "rows": 128, "columns": 256}, "bytes of shared memory"),
        ({"splits": 4, "part_dtype": "bfloat16"}, "rounded before they are whole"),
        ({"rows": 128, "columns": 256, "stages": 2}, "256 sums in each thread, at most 160"),
        ({"warps_n": 3}, "does not divide"),
    ):
        assert message in (refusal(tile | change, DOWN, HOPPER) or "fits"), change
    assert refusal(tile, DOWN, HOPPER) is None
    assert "split K" in (refusal(config_of(Tile(splits=2), GATE_UP), GATE_UP, HOPPER) or "")


@pytest.mark.parametrize("name", [n for n, s in SHAPES.items() if s.dtype == "bfloat16"])
def test_defaults_can_be_spelt_and_fit(name):
    for mode in ("gate_up", "down"):
        for large in (False, True):
            problem = SHAPES[name].gemm(mode, "bfloat16" if large else "float32")
            config = config_of(default_tile(problem, HOPPER, large), problem)
            assert refusal(config, problem, HOPPER) is None, config


def test_a_kernel_is_named_by_what_its_code_is_made_from(tmp_path, monkeypatch):
    before = gemm_space.kernel_sha256()
    assert len(before) == 64
    for name in gemm_space._SOURCES:
        (tmp_path / name).write_text(f"# {name}")
    monkeypatch.setattr(gemm_space, "__file__", str(tmp_path / "gemm_space.py"))
    first = gemm_space.kernel_sha256.__wrapped__()
    (tmp_path / "emit.py").write_text("# changed")
    assert len({before, first, gemm_space.kernel_sha256.__wrapped__()}) == 3


def test_the_kernel_has_the_tensor_instruction_of_its_type():
    fp8 = dataclasses.replace(GATE_UP, dtype="float8_e4m3fn")
    made = [gemm_space.gemm_kernel(p, t, "sm_90a").tensor for p in (GATE_UP, fp8) for t in (Tile(), WgmmaTile())]
    assert made == ["HMMA", "HGMMA", "QMMA", "QGMMA"]

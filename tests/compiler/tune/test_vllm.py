"""vLLM's tuned configurations, to suggestions for our grouped GEMM and back."""

import json

import pytest
from tuning import a_record

from moec.compiler.codegen.cuda_archs import architecture
from moec.compiler.kernels.cuda import gemm_space
from moec.compiler.tune.cuda_keys import arch_of_device, gemm_key, gemm_problem
from moec.compiler.tune.errors import ResultsError
from moec.compiler.tune.record import shape_sizes
from moec.compiler.tune.vllm import export_tables, is_table, read_table

pytestmark = pytest.mark.null
NAME = "E=8,N=14336,device_name=NVIDIA_H100_80GB_HBM3.json"
FIELDS = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1, "num_warps": 4}
FIELDS |= {"num_stages": 4}
SHAPE = "H=4096,K=2"


def table(tmp_path, rows, name=NAME):
    path = tmp_path / name
    path.write_text(json.dumps(rows))
    return path


def test_a_table_becomes_suggestions(tmp_path):
    rows = {"triton_version": "3.6.0", "1": FIELDS, "256": FIELDS | {"BLOCK_SIZE_M": 128, "num_warps": 8}}
    path = table(tmp_path, rows)
    assert is_table(path)
    one, many = read_table(path, SHAPE)
    assert one.key.device == "NVIDIA H100 80GB HBM3" and (one.key.tokens, many.key.tokens) == (1, 256)
    assert shape_sizes(one.key.shape) == {"E": 8, "F": 14336, "H": 4096, "K": 2, "S": 0, "mode": "gate_up"}
    assert one.config == {
        "kernel": "gemm_mma", "rows": 16, "columns": 128, "stages": 4, "warps_m": 1, "warps_n": 4, "splits": 1,
    }  # fmt: skip
    assert many.config["rows"] == 128 and many.config["warps_m"] * many.config["warps_n"] == 8
    assert not one.is_measured and one.reason == f"suggested by vLLM's {NAME}"
    problem = gemm_problem(shape_sizes(one.key.shape), "gate_up")
    assert gemm_space.refusal(many.config, problem, architecture("sm_90a")) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"BLOCK_SIZE_K": 128}, "1 tokens: BLOCK_SIZE_K is 128, a step of our kernel is 64 deep"),
        ({"GROUP_SIZE_M": 16}, "1 tokens: GROUP_SIZE_M and SPLIT_K other than 1 have no counterpart"),
        ({"SPLIT_K": 2}, "no counterpart"),
        ({"num_stages": 16}, "bytes of shared memory"),
        ({"num_warps": 3}, "1 tokens: 16 x 64 does not divide among 1 x 3 warps"),
        ({"BLOCK_SIZE_M": "16"}, "expected whole numbers for BLOCK_SIZE_M"),
    ],
)
def test_what_has_no_counterpart_is_refused_in_one_line(tmp_path, change, message):
    with pytest.raises(ResultsError, match=message) as caught:
        read_table(table(tmp_path, {"1": FIELDS | change}), SHAPE)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path):
    rows = {"1": FIELDS}
    for name, message in (
        ("E=8,N=64,device_name=NVIDIA_H100_80GB_HBM3,dtype=fp8_w8a8.json", "for fp8_w8a8 weights"),
        ("E=8,N=64,device_name=AMD_Instinct_MI300X.json", "AMD Instinct MI300X is no device"),
        ("E=8,N=64,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json", "bfloat16"),
    ):
        with pytest.raises(ResultsError, match=message):
            read_table(table(tmp_path, rows, name), SHAPE)
    with pytest.raises(ResultsError, match="give --shape H=4096,K=2"):
        read_table(table(tmp_path, rows), None)
    with pytest.raises(ResultsError, match="expected an object"):
        read_table(table(tmp_path, [1]), SHAPE)
    assert not is_table(tmp_path / "results.jsonl")
    with pytest.raises(ResultsError, match="expected a name such as"):
        read_table(tmp_path / "results.jsonl", SHAPE)
    with pytest.raises(ResultsError, match="cannot be read"):
        read_table(tmp_path / "no" / NAME, SHAPE)


def winner(tokens, config, mode="gate_up", **sizes):
    shapes = {"E": 8, "F": 14336, "H": 4096, "K": 2, "S": 0} | sizes
    key = gemm_key(gemm_problem(shapes, mode), shapes, tokens, "uniform", "NVIDIA H200", "nvcc 13.0")
    return a_record(0, key, config=config, is_winner=True)


def test_winners_become_a_table_that_reads_back(tmp_path):
    tile = {"kernel": "gemm_mma", "rows": 16, "columns": 128, "stages": 4, "warps_m": 1, "warps_n": 4, "splits": 1}
    wgmma = {"kernel": "gemm_wgmma", "columns": 128, "stages": 4}
    records = [
        winner(64, tile), winner(1, tile | {"stages": 5}), winner(4096, wgmma), winner(1, tile, mode="down"),
        winner(1, tile, S=2, E=64), a_record(1, is_winner=True),
    ]  # fmt: skip
    exported = export_tables(records, tmp_path / "configs")
    (file,) = exported.files
    assert file.name == "E=8,N=14336,device_name=NVIDIA_H200.json" and len(exported.left_out) == 4
    assert json.loads(file.read_text()) == {"1": FIELDS | {"num_stages": 5}, "64": FIELDS}
    assert list(json.loads(file.read_text())) == ["1", "64"]
    assert [r.config for r in read_table(file, SHAPE)] == [tile | {"stages": 5}, tile]
    with pytest.raises(ResultsError, match=r"no winner .* to export: grouped_gemm .*: gemm_wgmma has"):
        export_tables([winner(4096, wgmma)], tmp_path / "none")
    with pytest.raises(ResultsError, match="cannot be written"):
        export_tables([winner(1, tile)], file)


def test_devices_by_the_names_that_vllm_gives_them():
    names = {
        "NVIDIA_A100-SXM4-80GB": "sm_80", "NVIDIA_H100_80GB_HBM3": "sm_90a", "NVIDIA H200": "sm_90a",
        "NVIDIA_L40S": "sm_89", "NVIDIA_GeForce_RTX_4090": "sm_89", "NVIDIA_B200": "sm_100a",
        "NVIDIA_RTX_PRO_6000_Blackwell_Server_Edition": "sm_120a", "AMD_Instinct_MI300X": None, "NVIDIA_H1000": None,
    }  # fmt: skip
    assert {name: arch_of_device(name) for name in names} == names

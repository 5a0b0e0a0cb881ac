"""Bundles, their runner on a driver that plays the kernels on the CPU, and the way of its results into a database.

Kernels are lowered by TVM as always, so that parameters, their order and the launch are real; the cubins are texts that
tests/support/fake_cuda.c plays. `make tune-bundle` builds more than a hundred candidates with the real compiler.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moec.compiler.codegen.cubin import CubinFacts
from moec.compiler.codegen.cuda import BuiltCubin
from moec.compiler.codegen.cuda_toolchain import Compiler, cubin_compiler
from moec.compiler.codegen.llvm import ToolchainError, default_cache_dir
from moec.compiler.kernels.cuda.layer import LayerShape
from moec.compiler.kernels.cuda.shapes import SHAPES
from moec.compiler.tune import bundle
from moec.compiler.tune.bundle import BundleRequest, write_bundle
from moec.compiler.tune.bundle_results import import_results, read_any, read_results
from moec.compiler.tune.database import Database
from moec.compiler.tune.errors import ResultsError, TuneError
from moec.passes.ir.gate import GateSpec

pytestmark = pytest.mark.null
GATE = GateSpec(2, renormalise=True).encode()
SHAPE = LayerShape("tiny", 128, 64, 5, 2, GATE, num_shared=1)
FAKE = Path(__file__).parents[2] / "support" / "fake_cuda.c"


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory):
    """A folder with a libcuda.so.1 that needs no GPU."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler on PATH")
    folder = tmp_path_factory.mktemp("driver")
    command = [compiler, "-O2", "-shared", "-fPIC", str(FAKE), "-o", str(folder / "libcuda.so.1"), "-lm"]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A bundle of the tiny shape whose cubins are texts, and the calls of the compiler that it took."""
    folder, calls = tmp_path_factory.mktemp("bundle"), []
    with pytest.MonkeyPatch.context() as patch:
        _without_compiler(patch, calls)
        request = BundleRequest((SHAPE,), "sm_90a", (1, 40), candidates=5)
        write_bundle(request, folder / "made", folder / "cache")
        again = len(calls)
        write_bundle(request, folder / "again", folder / "cache")
    assert len(calls) == again > 8, "the second build was not answered from the cache"
    assert (folder / "made" / "manifest.json").read_bytes() == (folder / "again" / "manifest.json").read_bytes()
    return folder / "made"


def _without_compiler(patch, calls):
    """Cubins become texts for the fake driver; a kernel's name carries what its launch does not say."""
    steps = bundle._steps

    def named(gemm, config, arch):
        part = "bf16" if config.get("part_dtype") == "bfloat16" else "f32"
        facts = f"__rows={config.get('rows', 128)}__splits={config.get('splits', 1)}__{part}"
        facts = facts.replace("=", "_is_")
        return [
            (dataclasses.replace(k, name=k.name + facts), [what, facts], b) for k, what, b in steps(gemm, config, arch)
        ]

    def compile_text(sources, cache_dir, workers):
        (source,) = sources
        calls.append(source.name)
        role, *facts = source.name.replace("_is_", "=").split("__")
        text = " ".join(["moec-fake", role, *(p.name for p in source.parameters), *facts])
        cache_dir.mkdir(exist_ok=True)
        path = cache_dir / hashlib.sha256(text.encode()).hexdigest()
        path.write_text(text)
        return [BuiltCubin(source, path, path.name, reused=False)]

    patch.setattr(bundle, "_steps", named)
    patch.setattr(bundle, "build_cubins", compile_text)
    patch.setattr(bundle, "cubin_facts", lambda path: CubinFacts(40, 0))
    patch.setattr(
        bundle, "cubin_compiler", lambda: Compiler("nvcc", Path("nvcc"), "nvcc 13.0, V13.0.88\nBuild cuda_13.0\n")
    )


@pytest.fixture
def copy(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def finished(built, fake_driver, tmp_path_factory):
    """The bundle with the results of a whole run beside it."""
    folder = Path(shutil.copytree(built, tmp_path_factory.mktemp("run") / "bundle"))
    told = run(folder, fake_driver)
    assert told.returncode == 0, told.stderr
    return folder


@pytest.fixture
def ran(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "ran"))


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def plant(folder, candidate, words):
    """Lets the GEMM of a candidate behave otherwise."""
    manifest = manifest_of(folder)
    kernels = manifest["candidates"][candidate]["kernels"]
    (gemm,) = [k for k in kernels if "w" in k["binds"]]
    magic, role, rest = (folder / gemm["file"]).read_text().split(" ", 2)
    text = f"{magic} {role} {words} {rest}"
    name = f"{hashlib.sha256(f'{candidate} {words}'.encode()).hexdigest()[:32]}.cubin"
    (folder / name).write_text(text)
    manifest["files"][name] = manifest["files"][gemm["file"]] | {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    gemm["file"] = name
    (folder / "manifest.json").write_text(json.dumps(manifest))


def run(folder, driver, *arguments, **environment):
    """Runs a bundle as on another machine: no site packages, nothing of ours on the path."""
    facts = {"FAKE_DEPTH": 128, "FAKE_COLUMNS": 64, "FAKE_PER_TOKEN": 3, "FAKE_SHARED": 1} | environment
    environment = {"LD_LIBRARY_PATH": str(driver), "PATH": os.environ["PATH"]} | {k: str(v) for k, v in facts.items()}
    command = [sys.executable, "-S", "run.py", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def others(folder, problem):
    """Candidates of a problem by mma, which need no gather, without its default."""
    manifest = manifest_of(folder)
    entry, candidates = manifest["problems"][problem], manifest["candidates"]
    mma = [n for n in entry["candidates"] if candidates[n]["config"]["kernel"] == "gemm_mma"]
    return [name for name in mma if name != entry["default"]]


def test_every_candidate_is_right_and_timed(copy, fake_driver):
    """gate_up and down with their gather and combine, by mma and by wgmma, at both numbers of tokens: the runner's
    routing, bindings and reference agree with kernels that read the real launch's parameters."""
    faster, slower = others(copy, 1)[:2]
    plant(copy, faster, "us=30")
    plant(copy, slower, "us=90")
    told = run(copy, fake_driver, FAKE_CUDA_LOG=copy / "log")
    assert told.returncode == 0, told.stderr + told.stdout
    records = read_results(copy / "results.jsonl")
    manifest = manifest_of(copy)
    assert len(records) == sum(len(p["candidates"]) for p in manifest["problems"])
    assert {r.status for r in records} == {"ok"}, {r.reason for r in records}
    assert {r.config["kernel"] for r in records} == {"gemm_mma", "gemm_wgmma"}
    assert {(r.key.device, r.key.toolchain) for r in records} == {("NVIDIA Fake 9000", "nvcc 13.0, V13.0.88")}
    (by_config,) = {r.key for r in records if r.key.tokens == 40 and "gate_up" in r.key.shape}
    group = {json.dumps(r.config): r for r in records if r.key == by_config}
    quick, slow = (group[json.dumps(manifest["candidates"][n]["config"])] for n in (faster, slower))
    default = next(r for r in group.values() if r.is_default)
    assert quick.ratio == quick.ratio_high < 1 < slow.ratio_low and default.ratio == 1.0
    assert [r for r in group.values() if r.is_winner] == [quick]
    log = (copy / "log").read_text()
    assert log.count("flush") > len(records) and "gather" in log and "combine" in log and "map" in log


def test_faults_end_no_run_and_win_nothing(copy, fake_driver):
    manifest = manifest_of(copy)
    names = others(copy, 1)
    faults = {"wrong us=1": "wrong", "skip us=1": "wrong", "crash us=1": "crashed", "hang us=1": "timeout"}
    planted = dict(zip(names, faults, strict=False))
    assert len(planted) == len(faults), "too few candidates"
    for name, words in planted.items():
        plant(copy, name, words)
    told = run(copy, fake_driver, "--limit-s", "2")
    assert told.returncode == 0, told.stderr
    manifest = manifest_of(copy)
    by_config = {}
    for record in read_results(copy / "results.jsonl"):
        by_config.setdefault(json.dumps(record.config), []).append(record)
    for name, words in planted.items():
        for record in by_config[json.dumps(manifest["candidates"][name]["config"])]:
            if "gate_up" in record.key.shape:
                assert record.status == faults[words] and not record.is_winner, (words, record)
                assert record.reason


def test_a_failing_launch_is_told(copy, fake_driver):
    name = others(copy, 0)[0]
    plant(copy, name, "fail")
    told = run(copy, fake_driver)
    assert told.returncode == 0
    found = [r for r in read_results(copy / "results.jsonl") if r.status == "crashed"]
    assert {r.reason for r in found} == {"cuLaunchKernel: CUDA_ERROR_LAUNCH_FAILED (719)"} and len(found) == 2


def test_a_run_that_was_cut_off_goes_on(ran, fake_driver):
    path = ran / "results.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:-3]) + whole[-3][:50])
    told = run(ran, fake_driver)
    assert told.returncode == 0 and told.stdout.count("tokens,") == 3
    assert len(read_results(path)) == len(whole) - 1
    path.write_text(whole[0].replace('"manifest_sha256":"', '"manifest_sha256":"f'))
    assert "results of another bundle; choose another --out" in run(ran, fake_driver).stderr


def test_what_cannot_run_is_told_in_one_line(copy, fake_driver, tmp_path):
    told = run(copy, tmp_path)
    assert told.returncode == 1 and told.stderr.startswith("error: problem 0") and "no CUDA driver" in told.stderr
    told = run(copy, fake_driver, FAKE_CUDA_VERSION=12040)
    assert "the CUDA driver is for 12.4, the kernels need 13.0" in told.stderr
    told = run(copy, fake_driver, FAKE_CUDA_MEMORY=1000)
    lines = told.stderr.splitlines()
    assert told.returncode == 1 and len(lines) == len(
        manifest_of(copy)["problems"]
    )  # the others are tried all the same
    assert all(line.startswith("error: problem") and "CUDA_ERROR_OUT_OF_MEMORY" in line for line in lines)
    manifest = manifest_of(copy)
    plant(copy, manifest["problems"][0]["default"], "wrong")
    (copy / "results.jsonl").unlink()
    assert "the default itself is wrong" in run(copy, fake_driver).stderr
    file = copy / next(iter(manifest["files"]))
    file.write_text(file.read_text() + " ")
    assert "missing or changed since the bundle was made" in run(copy, fake_driver).stderr


def test_results_reach_the_database_once(ran, tmp_path):
    path = ran / "results.jsonl"
    with Database(tmp_path / "tuning.db") as database:
        count = len(path.read_text().splitlines()) - 1
        assert import_results(database, path).added == count and import_results(database, path).added == 0
        assert database.records() == sorted(read_any(path), key=lambda r: r.key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: line.replace('"samples":12', '"samples":99'), "line 2: its digest does not fit"),
        (lambda line: line[:-9], "line 2: is not JSON"),
        (lambda line: '{"problem":0}', "line 2: expected a record with its sha256"),
    ],
)
def test_damaged_results_are_refused(ran, change, message):
    path = ran / "results.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], change(lines[1]), *lines[2:]]))
    with pytest.raises(ResultsError, match=message):
        read_results(path)


def test_results_of_another_bundle_are_refused(ran):
    (ran / "manifest.json").write_text("{}")
    with pytest.raises(ResultsError, match="made with another bundle than the one in"):
        read_any(ran / "results.jsonl")


def test_what_no_bundle_does_is_refused(tmp_path):
    for change, message in (({"dtype": "float8_e4m3fn"}, "bundles do bfloat16"), ({"act": "gelu"}, "with gelu")):
        with pytest.raises(TuneError, match=message):
            write_bundle(
                BundleRequest((dataclasses.replace(SHAPE, **change),), "sm_89", (1,)), tmp_path / "b", tmp_path
            )
    with pytest.raises(TuneError, match="exists; choose another folder"):
        write_bundle(BundleRequest((SHAPE,), "sm_89", (1,)), tmp_path, tmp_path)
    with pytest.raises(TuneError, match="at least one shape"):
        write_bundle(BundleRequest((), "sm_89", (1,)), tmp_path / "b", tmp_path)


def _needs_compiler():
    try:
        cubin_compiler()
    except ToolchainError as error:
        pytest.skip(str(error))


def test_a_small_bundle_of_machine_code(tmp_path, fake_driver, monkeypatch):
    """Real cubins; on the fake driver they do nothing, and a default that does nothing is found wrong."""
    _needs_compiler()
    monkeypatch.setattr(bundle, "MODES", ("gate_up",))
    manifest = write_bundle(BundleRequest((SHAPE,), "sm_80", (1,), candidates=0), tmp_path / "made", tmp_path / "cache")
    assert len(manifest["files"]) == 2 and not manifest["rejected"]
    for name, file in manifest["files"].items():
        assert (tmp_path / "made" / name).read_bytes()[:4] == b"\x7fELF" and file["registers"] > 16
    manifest["arch"] = "sm_90a"  # what the fake device is
    (tmp_path / "made" / "manifest.json").write_text(json.dumps(manifest))
    told = run(tmp_path / "made", fake_driver)
    assert told.returncode == 1 and "the default itself is wrong: row 0" in told.stderr and "nan" in told.stderr


@pytest.mark.slow
def test_a_hundred_candidates(tmp_path):
    """Mixtral-8x7B for sm_90a. Minutes of two cores; kernels that were built before come from the cache."""
    _needs_compiler()
    request = BundleRequest((SHAPES["mixtral-8x7b"],), "sm_90a", (1, 16, 256, 4096))
    manifest = write_bundle(request, tmp_path / "made", default_cache_dir())
    assert len(manifest["candidates"]) >= 100
    assert len({c["config"]["kernel"] for c in manifest["candidates"].values()}) == 2
    assert all((tmp_path / "made" / name).stat().st_size > 1000 for name in manifest["files"])

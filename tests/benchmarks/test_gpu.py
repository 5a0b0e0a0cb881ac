"""The GPU benchmark without a GPU: whole layers from emulated kernels, its bundle, and its peers on the CPU."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from moec.compiler.codegen.cubin import CubinFacts
from moec.compiler.codegen.cuda_toolchain import Compiler, cubin_compiler
from moec.compiler.codegen.emulator.device import build_emulated
from moec.compiler.codegen.emulator.emulator import Emulated
from moec.compiler.codegen.llvm import ToolchainError
from moec.compiler.kernels.cuda.layer import LayerShape, layer_kernels
from moec.compiler.tune import bundle as tune_bundle
from moec.compiler.tune.bundle import BundleRequest, write_bundle
from moec.passes.ir.gate import GateSpec

pytestmark = pytest.mark.null
FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def load(monkeypatch):
    """A module of the benchmark by name."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def module(name):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        made = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, made)
        spec.loader.exec_module(made)
        return made

    return module


GATE = GateSpec(2, renormalise=True).encode()
SHAPE = LayerShape("tiny", 128, 128, 5, 2, GATE, num_shared=1)
CASES = [
    (SHAPE, "sm_80", "small", 1),
    (SHAPE, "sm_90a", "large", 20),
    (dataclasses.replace(SHAPE, dtype="float8_e4m3fn"), "sm_89", "small", 9),
    (dataclasses.replace(SHAPE, dtype="float8_e4m3fn"), "sm_90a", "small", 3),
    pytest.param(dataclasses.replace(SHAPE, dtype="int4-g32"), "sm_80", "small", 4, marks=pytest.mark.slow),
]


def emulated_kernels(made, folder, wave=1):
    def launcher(kernel):
        emulated = Emulated.build(kernel.source(), folder)

        def launch(**values):
            emulated.run(values, emulated.source.grid_of(values), lazy=True, seed=3, wave=wave)

        return launch

    return {name: launcher(kernel) for name, kernel in made.kernels.items()}


def entry_of(made):
    return {"shape": dataclasses.asdict(made.shape)} | {
        name: getattr(made, name) for name in ("tile_rows", "splits", "part_dtype", "gathers")
    }


@pytest.mark.parametrize(("shape", "arch", "size", "num_tokens"), CASES)
def test_a_whole_layer(load, tmp_path, shape, arch, size, num_tokens):
    """Gate to combine, each kernel on what the one before has left, against float64."""
    torch.manual_seed(0)
    gpu = load("layer")
    made = layer_kernels(shape, arch, size)
    entry = entry_of(made)
    layer = gpu.Layer(entry, emulated_kernels(made, tmp_path), gpu.make_weights(entry["shape"], "cpu"), num_tokens, 2)
    layer.x.normal_()
    layer.logits.normal_()
    layer.run()
    weights, experts = GateSpec.decode(GATE).apply(layer.logits)
    assert torch.equal(experts, layer.experts)
    assert torch.allclose(weights, layer.route_weights, rtol=1e-5)
    # bfloat16 rounds h and y (and rows); e4m3 keeps 3 bits of x, w and h. The benchmark uses the same limits.
    assert gpu.relative_error(layer.y, gpu.reference(layer)) < (0.08 if shape.dtype == gpu.FP8 else 0.008)


def test_a_layer_in_one_launch(load, tmp_path, monkeypatch):
    """The bundle's entry, and what run.py checks of it: logits, routing, barrier, result."""
    torch.manual_seed(0)
    gpu, measure, bundle = load("layer"), load("peers") and load("budget") and load("measure"), load("make_bundle")
    made = {}
    monkeypatch.setattr(bundle, "_write", lambda kernels, *rest: made.update(kernels) or {})
    entries, refused = [], []
    bundle._add_decode(SHAPE, "sm_80", tmp_path, tmp_path, entries, refused)
    assert not refused and entries[0]["max_tokens"] == 16
    kernels = emulated_kernels(types.SimpleNamespace(kernels=made), tmp_path, wave=0)
    layer = gpu.Layer(entries[0], kernels, gpu.make_weights(entries[0]["shape"], "cpu"), 3, 2)
    assert measure.check(measure.filled(layer, 0.0)) is None
    layer.weights["router"] = layer.weights["router"] * 2
    assert measure.router_fault(layer) == "its logits differ from the router's"


@pytest.mark.parametrize("peer", ["expert by expert", "torch._grouped_mm"])
def test_the_peers_mean_the_same(load, tmp_path, peer):
    torch.manual_seed(0)
    gpu, peers = load("layer"), load("peers")
    made = layer_kernels(SHAPE, "sm_80", "small")
    entry = entry_of(made)
    layer = gpu.Layer(entry, {}, gpu.make_weights(entry["shape"], "cpu"), 20, 2)
    layer.x.normal_()
    weights, experts = GateSpec.decode(GATE).apply(torch.randn(20, 5))
    layer.route_weights.copy_(weights), layer.experts.copy_(experts)
    step = peers.PEERS[peer](layer, lambda step: 0.0)
    assert gpu.relative_error(step(), gpu.reference(layer)) < 0.01
    layer.shape = layer.shape | {"num_experts": 3, "num_shared": 0}  # the others are held elsewhere: they add nothing
    layer.slots_per_token, layer.slots = 2, 40
    layer.weights = {name: w[:3] for name, w in layer.weights.items()}
    assert gpu.relative_error(peers.PEERS[peer](layer, lambda step: 0.0)(), gpu.reference(layer)) < 0.01


def test_the_bundle_has_what_a_launch_needs(load, tmp_path):
    try:
        cubin_compiler()
    except ToolchainError as error:
        pytest.skip(str(error))
    load("make_bundle").make_bundle([(SHAPE, 5)], "sm_89", tmp_path / "out", tmp_path / "cache")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [e["size"] for e in manifest["layers"]] == ["small", "large", "decode"] and not manifest["refused"]
    for kernel in (k for e in manifest["layers"] for k in e["kernels"].values()):
        assert (tmp_path / "out" / kernel["file"]).stat().st_size > 1000
        assert kernel["launch"].keys() >= {"symbol", "grid", "threads", "shared_bytes", "parameters"}


@pytest.mark.slow
def test_a_dry_run_goes_all_the_way(load, tmp_path):
    """Bundle, checks, times, peers, JSON and picture, emulated: the gate chooses among 8 experts, 5 are held."""
    bundle, shape = load("make_bundle"), dataclasses.replace(SHAPE, num_shared=0)
    bundle.make_bundle([(shape, 8)], "sm_80", tmp_path / "b", tmp_path / "cache", bundle.build_emulated, ("small",))
    out = tmp_path / "results.json"
    command = [sys.executable, str(FOLDER / "run.py"), str(tmp_path / "b"), "--dry-run", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(out.read_text())
    assert found["dry_run"] and "times mean nothing" in found["device"] and found["ceilings"].keys() == CEILINGS
    (layer,) = found["layers"]
    assert not layer["faults"] and [(r["tokens"], r["skew"]) for r in layer["rows"]] == [(1, 0), (1, 2), (5, 0), (5, 2)]
    for row in layer["rows"]:
        assert row["us"] > 0 and isinstance(row["peers"]["expert by expert"], float)
        assert isinstance(row["peers"]["torch._grouped_mm"], float)
        assert str(row["peers"]["triton"]).startswith("ModuleNotFoundError")
    picture = out.with_suffix(".svg").read_text()
    assert picture.count("<circle") == 3 and "times mean nothing" in picture


CEILINGS = {"copy_bytes_per_s", "matmul_flop_per_s"}


def test_the_roofline_is_drawn_to_scale(load):
    roofline = load("roofline")
    axes = roofline.Axes([1.0, 100.0], [1e9, 1e12])
    assert axes.place(1.0, 1e9) == (roofline.LEFT, roofline.HEIGHT - roofline.BOTTOM)
    assert axes.place(100.0, 1e12) == (roofline.WIDTH - roofline.RIGHT, roofline.TOP)
    left, middle, right = (axes.place(x, 1e9)[0] for x in (1.0, 10.0, 100.0))
    assert middle - left == pytest.approx(right - middle)


@pytest.fixture
def triton_moe(load, monkeypatch):
    """The Triton layer where there is no Triton: its kernels cannot run, all around them can."""
    language = types.ModuleType("triton.language")
    language.constexpr = None
    module = types.ModuleType("triton")
    module.jit, module.language = (lambda function: function), language
    errors = types.ModuleType("triton.runtime.errors")
    errors.OutOfResources = MemoryError
    parts = {
        "": module,
        ".language": language,
        ".runtime": types.ModuleType("triton.runtime"),
        ".runtime.errors": errors,
    }
    for name, part in parts.items():
        monkeypatch.setitem(sys.modules, f"triton{name}", part)
    load("layer")
    return load("triton_moe")


def test_the_tiles_of_the_triton_layer(triton_moe):
    expert, row = triton_moe.tile_map(torch.tensor([3, 0, 33, 16]), 16, 52)
    tiles = [(e, r) for e, r in zip(expert.tolist(), row.tolist(), strict=True) if e >= 0]
    assert tiles == [(0, 0), (2, 3), (2, 19), (2, 35), (3, 36)] and len(expert) == 52 // 16 + 4


def test_the_triton_layer_keeps_the_fastest_configuration(triton_moe, monkeypatch):
    shape = {"name": "t", "num_experts": 4, "num_shared": 0, "inner": 64, "hidden": 128}
    layer = types.SimpleNamespace(shape=shape, slots=8, num_tokens=4)
    monkeypatch.setattr(triton_moe, "step_of", lambda layer, config: config)
    chosen = triton_moe.tuned(layer, lambda config: config.stages)
    assert chosen == triton_moe.Config(16, 64, 64, 4, 5)  # the only one whose depth and columns divide 64
    layer = types.SimpleNamespace(shape=shape | {"inner": 8}, slots=8, num_tokens=5)
    with pytest.raises(RuntimeError, match="no configuration divides the layer"):
        triton_moe.tuned(layer, lambda config: 0.0)


@pytest.mark.slow
def test_tuned_tiles_are_measured_where_no_compiler_is(load, tmp_path, monkeypatch):
    """A tuning bundle, its results, and a dry run of the layer with the best candidates, by mma and by wgmma."""
    monkeypatch.setattr(tune_bundle, "build_cubins", lambda sources, cache, workers: build_emulated(sources, cache))
    monkeypatch.setattr(tune_bundle, "cubin_facts", lambda path: CubinFacts(40, 0))
    monkeypatch.setattr(tune_bundle, "cubin_compiler", lambda: Compiler("nvcc", Path("nvcc"), "emulated"))
    shape = dataclasses.replace(SHAPE, num_shared=0, hidden=256)
    request = BundleRequest((shape,), "sm_90a", (4, 400), candidates=2)
    manifest = write_bundle(request, tmp_path / "tune", tmp_path / "cache")
    maker = load("make_bundle")
    maker.make_bundle([(shape, 5)], "sm_90a", tmp_path / "b", tmp_path / "cache", build_emulated, ("small", "large"))
    write_results(tmp_path / "tune", manifest)
    out = tmp_path / "results.json"
    command = [sys.executable, str(FOLDER / "run.py"), str(tmp_path / "b"), "--dry-run", "--out", str(out)]
    result = subprocess.run([*command, "--tuned", str(tmp_path / "tune")], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, ""), result.stdout
    layers = json.loads(out.read_text())["layers"]
    assert [(layer["size"], bool(layer["tuned"])) for layer in layers] == [
        ("small", False), ("large", False), ("small", True), ("large", True),
    ]  # fmt: skip
    kernels = [layer["tuned"]["gate_up"]["kernel"] for layer in layers[2:]]
    assert kernels == ["gemm_mma", "gemm_wgmma"] and not [f for layer in layers for f in layer["faults"]]


def write_results(folder, manifest):
    """As if the runner had found mma the faster one for few tokens, wgmma for many."""
    lines = [{"format": "moec-bundle-results"}]
    for number, problem in enumerate(manifest["problems"]):
        for i, name in enumerate(problem["candidates"]):
            by_mma = manifest["candidates"][name]["config"]["kernel"] == "gemm_mma"
            slower = by_mma == (problem["tokens"] > 256)
            record = {"status": "ok", "median_us": 100.0 * (1 + slower) + i}
            lines.append({"problem": number, "candidate": name, "record": record})
    (folder / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))

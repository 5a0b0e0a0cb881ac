"""Whole engines on an emulated GPU: every launch meets the kernel's own code; logits next to the CPU engine's."""

import shutil

import pytest
import torch
from cuda_program import llama4, mixtral, relative_error

from moec.compiler import api
from moec.compiler.codegen.cuda_archs import ARCHITECTURES
from moec.compiler.codegen.emulator.device import EmulatedDevice, EmulatedLibrary, build_emulated
from moec.compiler.lowering.cuda import build
from moec.runtime.engine import load
from moec.runtime.errors import FormatError
from moec.runtime.format import PROGRAM, read_json
from moec.runtime.launch.driver import CudaError
from moec.runtime.recording import record_routing

pytestmark = pytest.mark.null

# of logits in bfloat16: both engines round the results of each layer, in their own order of sums
TOLERANCE = 0.01
E4M3_TOLERANCE = 0.1  # e4m3 keeps 3 bits of x, w and h; the reference rounds nothing
SLOW = pytest.mark.slow


def compiled(model, folder, target, monkeypatch, weights=None):
    """An engine's folder; of a GPU with emulated kernels."""
    monkeypatch.setattr(build, "build_cubins", build_emulated)
    api.compile_to(model, folder, target=target, weights=weights, verify="off")
    return folder


def check_against_the_cpu(folder, device, model, tmp_path, monkeypatch, tolerance):
    """Prefill by few and by many kernels, and decode by graphs, of sequences of different lengths."""
    engine = load(folder, device=device)
    cpu = load(compiled(model, tmp_path / "cpu", "cpu", monkeypatch))
    tokens = torch.randint(0, 256, (9,), generator=torch.Generator().manual_seed(1)).tolist()
    for prompts in ([tokens[:2]], [tokens[:3]], [tokens, tokens[:2]]):  # one launch; 3 tokens: few; 11: many
        for got, want in zip(engine(prompts), cpu(prompts), strict=True):
            assert relative_error(got.cpu(), want) < tolerance
    for fed in ([tokens[:4], tokens[4:6], tokens[6:]], [tokens[:3], tokens[3:7]]):
        caches = [e.new_cache(3, 40) for e in (engine, cpu)]
        slots, _ = ([c.allocate() for _ in fed] for c in caches)
        for _ in range(4):
            got, want = (e.step(c, slots, fed) for e, c in zip((engine, cpu), caches, strict=True))
            assert relative_error(got.cpu(), want) < tolerance
            fed = [[t] for t in want.argmax(-1).tolist()]
    check_recorded_routing(engine, cpu, [tokens[:2], tokens[2:]])
    return engine


def check_recorded_routing(engine, cpu, prompts):
    """Prefill of 9 tokens and decode of 2 are recorded, by whichever kernel they went through."""
    loads = []
    for e in (engine, cpu):
        with record_routing(e) as recorder:
            caches = e.new_cache(2, 40)
            slots = [caches.allocate() for _ in prompts]
            for fed in (prompts, [[7], [9]], [[8], [3]]):
                e.step(caches, slots, fed)
        (layer,) = recorder.routing("mixtral").layers
        loads.append(layer.counts.tolist())
    assert sum(loads[0]) == 2 * (9 + 2 * 2)
    # logits that all but tie may part by rounding: one choice of 26
    assert sum(abs(a - b) for a, b in zip(*loads, strict=True)) <= 2


CASES = [
    ("sm_90a", None, 64),
    pytest.param("sm_80", None, 64, marks=SLOW),
    pytest.param("sm_89", "fp8", 128, marks=SLOW),
    pytest.param("sm_90a", "fp8", 128, marks=SLOW),
]


@pytest.mark.parametrize(("arch", "weights", "inner"), CASES)
def test_an_engine_computes_what_the_cpu_engine_computes(arch, weights, inner, tmp_path, monkeypatch):
    model, tolerance = mixtral(inner), E4M3_TOLERANCE if weights else TOLERANCE
    folder = compiled(model, tmp_path / "gpu", f"cuda:{arch}", monkeypatch, weights)
    engine = check_against_the_cpu(folder, EmulatedDevice(arch), model, tmp_path, monkeypatch, tolerance)
    assert engine.device.captured == 2  # decode steps of 3 rows and of 2: each one as it is, then a graph
    launched = {symbol.rsplit("_", 2)[0] for symbol, _ in engine.device.library.launches}
    assert launched >= {"norm", "rope", "gate", "append", "decode", "merge", "place", "gate_up", "down", "combine"}
    assert "gate_linear" in launched and ("moe_decode" in launched) == (weights is None)
    profile = engine.profile([[1, 2, 3]])
    assert {p["kind"] for p in profile} >= {"kernel", "aten", "library"} and all(p["us"] > 0 for p in profile)
    table = read_json(folder / PROGRAM)["kernels"]
    assert {entry["file"] for entry in table.values()} == {p.name for p in folder.glob(f"kernels-{arch}-*.cubin")}
    refusals(folder, arch, tmp_path)


@SLOW
def test_a_model_whose_routing_weights_multiply_the_input(tmp_path, monkeypatch):
    model = llama4()
    folder = compiled(model, tmp_path / "gpu", "cuda:sm_80", monkeypatch)
    engine, cpu = (
        load(folder, device=EmulatedDevice("sm_80")),
        load(compiled(model, tmp_path / "cpu", "cpu", monkeypatch)),
    )
    tokens = torch.randint(0, 256, (9,), generator=torch.Generator().manual_seed(1)).tolist()
    for prompts in ([tokens[:3]], [tokens, tokens[:2]]):
        for got, want in zip(engine(prompts), cpu(prompts), strict=True):
            assert relative_error(got, want) < TOLERANCE
    assert "gather" in {symbol.rsplit("_", 2)[0] for symbol, _ in engine.device.library.launches}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_engine_on_the_gpu_of_this_machine(tmp_path, monkeypatch):
    major, minor = torch.cuda.get_device_capability()
    arch = next((a for a in ARCHITECTURES if a.removesuffix("a") == f"sm_{major}{minor}"), None)
    if arch is None:
        pytest.skip(f"no kernels for sm_{major}{minor}")
    model = mixtral()
    api.compile_to(model, tmp_path / "gpu", target=f"cuda:{arch}", verify="off")
    check_against_the_cpu(tmp_path / "gpu", None, model, tmp_path, monkeypatch, TOLERANCE)


def refusals(folder, arch, tmp_path):
    """What is wrong with a device or a file is one line, and another load goes on from there."""
    other = {"sm_90a": "sm_80"}.get(arch, "sm_90a")
    for device, reason in (
        (lambda: EmulatedDevice(other), f"the kernels are for {arch}, the device is sm_"),
        (lambda: EmulatedDevice(arch, EmulatedLibrary(12040)), "the CUDA driver is for 12.4, the kernels need 13.0"),
        (lambda: EmulatedDevice(arch, EmulatedLibrary(fails=["cuModuleLoadData"])), "cuModuleLoadData: CUDA_ERROR"),
    ):
        with pytest.raises(CudaError) as caught:
            load(folder, device=device())
        assert str(caught.value).startswith(reason) and "\n" not in str(caught.value)
    shutil.copytree(folder, tmp_path / "damaged")
    cubin = next((tmp_path / "damaged").glob("*.cubin"))
    cubin.write_bytes(cubin.read_bytes()[:-1] + b"?")
    with pytest.raises(FormatError, match="the file was changed"):
        load(tmp_path / "damaged", device=EmulatedDevice(arch))
    assert load(folder, device=EmulatedDevice(arch)).graph_refusal is None

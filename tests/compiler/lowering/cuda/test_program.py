"""Programs for GPUs: every launch against its kernel, the choices and refusals, and what is kept out."""

import re

import pytest
import torch
from cuda_program import lowered, mixtral, steps_of, without_building

from moec.compiler.codegen.cuda_archs import ARCHITECTURES, architecture
from moec.compiler.errors import CompileError
from moec.compiler.lowering.cuda.build import build_target, decided
from moec.compiler.lowering.targets import cuda_target
from moec.compiler.options import CompileOptions
from moec.runtime.batch import Batch
from moec.runtime.executor import Executor
from moec.runtime.expressions import evaluate
from moec.runtime.launch.driver import MAX_GRID
from moec.runtime.launch.graphs import graph_refusal
from moec.runtime.program import Step
from moec.runtime.source import Place

pytestmark = pytest.mark.null


def kernels_of(lowered_):
    """symbol -> CudaKernel of all candidates that were chosen."""
    return {s: k for c in lowered_.kernels.values() if c.functions for s, k in c.functions().items()}


def number(argument, sizes):
    """The value of an encoded number."""
    if isinstance(argument, dict) and "multiprocessors" in argument:
        return argument["multiprocessors"] * 132
    return evaluate(argument["size"], sizes) if isinstance(argument, dict) else argument


def check_launch(step, kernel, source, program, sizes):
    """A launch gives what the kernel takes: names, dtypes, memory that is large enough, a grid that a GPU takes."""
    assert step.kwargs.keys() == source.needed()
    integers = {p.name: number(step.kwargs[p.name], sizes) for p in source.parameters if p.kind == "int"}
    assert all(0 <= n < 2**31 for n in integers.values()), (step.node, integers)
    grid = source.grid_of(integers)
    assert all(1 <= n <= most for n, most in zip(grid, MAX_GRID, strict=True)), (step.node, grid)
    known = {name: number(a, sizes) for name, a in kernel.all_sizes.items()} | integers
    for name, shape, dtype in BUFFER.findall(kernel.signature):
        if name not in step.kwargs:
            continue
        given = program.buffers[step.kwargs[name]["buffer"]]
        assert given.dtype == dtype, (step.node, name)
        count = torch.Size(evaluate(d, sizes) for d in given.shape).numel()
        wanted = eval(shape.replace('"', ""), {}, known)
        if f"{name}_stride" not in step.kwargs:  # strided rows: their view is as large as it is
            assert count >= torch.Size(wanted).numel(), (step.node, name, count, wanted)


class Named:
    """A kernel's TIRx signature, and every size that its launch was lowered with, those without use in its code too."""

    def __init__(self, signature, sizes):
        self.signature, self.all_sizes = signature, sizes


BUFFER = re.compile(r'(\w+): T\.Buffer\((\(.*?\)), "(\w+)"')


@pytest.mark.parametrize("arch", ["sm_90a", pytest.param("sm_80", marks=pytest.mark.slow)])
def test_every_launch_fits_its_kernel(arch, tmp_path):
    before, options = lowered(mixtral(), f"cuda:{arch}")
    kernels = kernels_of(before)
    (after,), target = build_target([before], options.arch, tmp_path, without_building)
    given = {(s.name, s.node): s.kwargs for s in steps_of(before.program.steps) if s.kind == "kernel"}
    sources = {name: kernels[name].source() for name in {c.symbol for c in target.cubins}}
    signatures = {n: re.search(r"def kernel\(.*\):", kernels[n].build().script())[0] for n in sources}
    launches = [s for s in steps_of(after.program.steps) if s.kind == "kernel"]
    assert {s.name for s in launches} == set(sources)
    roles = {name.rsplit("_", 1)[0] for name in sources}
    assert roles >= {"norm", "rope", "gate", "append", "decode", "merge", "place", "gate_up", "down", "combine"}
    assert roles >= {"gate_linear", "moe_decode"}
    assert ("gather" in roles) == (arch == "sm_90a")
    for tokens in (1, 3, 4, 5, 600):
        sizes = {"T": tokens, "N": 3, "L": 40, "R": 1}
        for step in running(after.program.steps, tokens):
            if step.kind == "kernel":
                named = given[step.name, step.node].items()
                plain = {k: a for k, a in named if not isinstance(a, dict) or "buffer" not in a}
                check_launch(step, Named(signatures[step.name], plain), sources[step.name], after.program, sizes)


def running(steps, tokens):
    """The steps that run for so many tokens."""
    for step in steps:
        for limit, inner in step.variants:
            if limit is None or tokens <= limit:
                yield from running(inner, tokens)
                break
        else:
            yield step


def test_nothing_mixes_devices_or_waits(tmp_path):
    """The whole program on tensors of another device without data: nothing is made on the CPU, nothing is read."""
    before, options = lowered(mixtral(), "cuda:sm_89")
    (after,), target = build_target([before], options.arch, tmp_path, without_building)
    program = after.program
    assert graph_refusal(program) is None

    class Silent:
        def ordered(self, names):
            return lambda *values: [self.check(v) for v in values if isinstance(v, torch.Tensor)]

        def check(self, tensor):
            assert tensor.device == META

    weights = {
        b.name: torch.empty([int(d) for d in b.shape], dtype=getattr(torch, b.dtype), device="meta")
        for b in program.buffers
        if b.kind == "weight"
    }
    run = Executor(program, weights, {c.symbol: Silent() for c in target.cubins}, place=Place(META, "cuda", 132))
    caches = [program.buffers[i] for i in program.inputs[3:-1]]
    caches = [torch.empty(3, 40, *b.shape[2:], dtype=torch.bfloat16, device=META) for b in caches]
    for count, is_decode in ((2, True), (9, True), (9, False)):
        rows = [torch.zeros(count, dtype=torch.int64, device=META) for _ in range(3)]
        batch = Batch.of_decode(rows[1], 16) if is_decode else Batch.of_lengths([0, 1], [4, 5], [0, 0])
        (logits,) = run([*rows, *caches, torch.arange(count, device=META)], batch)
        assert logits.device == META and logits.shape == (count, 256)


META = torch.device("meta")


def test_choices_and_refusals_are_recorded():
    float32 = mixtral().float()
    records = {r["node"]: r for r in (c.record() for c in lowered(float32, "cuda:sm_90a")[0].choices)}
    experts = next(r for r in records.values() if r["kernel"].startswith("library-experts"))
    assert experts["rejected"][0] == {
        "kernel": "cuda-experts-small",
        "reason": "x in float32, only bfloat16 is built",
    }
    assert any(r["kernel"] == "linear+cuda-gate" for r in records.values())


def test_fp8_means_what_the_tensor_cores_take():
    for arch, name in (("sm_89", "fp8-w8a8"), ("sm_90a", "fp8-w8a8"), ("sm_80", "fp8")):
        formats = dict(CompileOptions.of(f"cuda:{arch}", "fp8", "off", None).weights.formats)
        assert formats["experts"].name == name
    found, _ = lowered(mixtral(inner=64), "cuda:sm_89", "fp8")  # 64 is half of what an e4m3 tile is deep
    (choice,) = (c for c in found.choices if "experts" in c.kernels[0].name)
    assert choice.kernels[0].name == "library-experts-fp8-w8a8"
    assert "a depth of 64, not a multiple of 128; pad" in choice.record()["rejected"][0]["reason"]
    found, _ = lowered(mixtral(inner=128), "cuda:sm_89", "fp8")
    (choice,) = (c for c in found.choices if "experts" in c.kernels[0].name)
    assert [c.name for c in choice.kernels] == ["cuda-experts-small", "cuda-experts-large"]
    assert {str(w.dtype) for n, w in found.weights.items() if n.endswith("_e4m3")} == {"torch.float8_e4m3fn"}


def test_targets_that_are_none():
    for text, reason in (
        ("cuda", "say which GPU: cuda:sm_80, "),
        ("cuda:sm_75", "GPU architecture 'sm_75' is not supported, expected one of sm_80, "),
        ("rocm", "known: cpu, cpu:avx2"),
    ):
        with pytest.raises(CompileError, match=reason):
            CompileOptions.of(text, None, "off", None)
    with pytest.raises(CompileError, match="bf16-packed is for CPUs; on sm_80 leave experts as they are"):
        CompileOptions.of("cuda:sm_80", "bf16-packed", "off", None)
    for target, combine, reason in (
        ("cuda:sm_80", "often", "combine='often'; known: ordered, fast"),
        ("cpu", "fast", "combine='fast' is for GPUs; a CPU sums in one order, leave it out"),
    ):
        with pytest.raises(CompileError, match=reason):
            CompileOptions.of(target, None, "off", None, combine=combine)
    assert set(ARCHITECTURES) == {"sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a"}


def test_choices_inside_choices_are_settled():
    def kernel(name):
        return Step("kernel", name, name)

    inner = Step("choose", "", "n", symbol="T", variants=((512, (kernel("a"),)), (None, (kernel("b"),))))
    for limit, few, many in ((128, ["a"], ["a", "b"]), (1024, ["a", "b"], ["b"]), (512, ["a"], ["b"])):
        outer = Step("choose", "", "n", symbol="T", variants=((limit, (inner,)), (None, (inner,))))
        (done,) = decided([outer])
        assert [[s.name for s in steps_of(v) if s.kind == "kernel"] for _, v in done.variants] == [few, many]


def test_what_no_step_does_is_named():
    target = cuda_target(architecture("sm_80"))
    assert "pool_windows" not in target.library
    assert target.lacks("moec") == "has no step for cuda:sm_80 yet; compile for the CPU"

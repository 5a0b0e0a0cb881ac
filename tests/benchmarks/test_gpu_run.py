"""How run.py spends its time and what it survives: no kernel runs here, clocks and processes are the tests' own."""

import importlib
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.null
FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
RUN = str(FOLDER / "run.py")
MODULES = ("budget", "layer", "machine", "peers", "measure", "supervise", "tuned", "roofline", "run")


@pytest.fixture
def gpu(monkeypatch):
    """The benchmark's modules by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return types.SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})


class Clock:
    """A clock that goes on when it is told to."""

    now = 100.0

    def __call__(self):
        return self.now


class Slow:
    """A machine whose every time takes `seconds` of the clock."""

    blocks, device = 1, "cpu"

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def time_us(self, step, graph, repeats=1):
        self.clock.now += self.seconds
        return 7.0

    def done(self):
        """Nothing is kept."""


@pytest.fixture
def empty_layers(gpu, monkeypatch):
    """Layers without buffers, right and of no work."""
    made = lambda entry, kernels, weights, n, blocks: types.SimpleNamespace(  # noqa: E731
        entry=entry, shape=entry["shape"], num_tokens=n, run=None
    )
    monkeypatch.setattr(gpu.measure, "Layer", made)
    monkeypatch.setattr(gpu.measure, "make_weights", lambda shape, device: {})
    for name, value in (("filled", lambda layer, skew, seed=0: layer), ("check", lambda layer: None), ("PEERS", {})):
        monkeypatch.setattr(gpu.measure, name, value)
    monkeypatch.setattr(gpu.measure, "work", lambda layer: (1, 1))


def entry(size="small", name="a"):
    return {"shape": {"name": name, "dtype": "bfloat16"}, "size": size, "kernels": {}}


@pytest.mark.parametrize(("layers", "row_s"), [(30, 1.0), (30, 0.1), (3, 40.0)])
def test_every_layer_has_its_part_of_the_time(gpu, empty_layers, layers, row_s):
    clock, plan = Clock(), gpu.measure.Plan((1,), gpu.run.TIMED)
    budget = gpu.budget.Budget(540, layers, clock)
    entries = {i: entry(("small", "large", "decode")[i % 3]) for i in range(layers)}
    events = list(gpu.measure.serve(Slow(clock, row_s), entries, plan, budget))
    assert clock.now - 100 <= 540 + 2 * row_s  # the last row of the last layer may go over
    assert [e["begin"] for e in events if "begin" in e] == list(range(layers))
    rows = [e["row"]["tokens"] for e in events if "row" in e]
    left = [e["left_out"] for e in events if "left_out" in e]
    assert len(rows) / 2 + len(left) == sum(len(plan.of(e)) for e in entries.values())
    assert bool(left) == (row_s > 0.1) and bool(set(left) & set(gpu.budget.FIRST)) == (row_s > 1)


def test_the_first_counts_span_the_range(gpu):
    plan = gpu.measure.Plan((1,), gpu.run.TIMED)
    assert plan.of(entry())[:4] == [1, 16, 128, 2] and plan.of(entry())[-1] == 256
    assert plan.of(entry("large"))[:4] == [128, 1024, 8192, 32]
    assert plan.of(entry("decode") | {"max_tokens": 16}) == [1, 16, 2, 4, 8]


def test_no_time_at_all_is_said(gpu, empty_layers):
    clock = Clock()
    budget = gpu.budget.Budget(5, 3, clock)
    events = list(gpu.measure.serve(Slow(clock, 9.0), {4: entry(), 5: entry()}, gpu.measure.Plan((1,), (1,)), budget))
    assert [e for e in events if "end" in e or "begin" in e] == [{"begin": 4}, {"end": 4}, {"end": 5}]
    result = {"layers": [], "left_out": []}
    entries = [entry(name=str(i)) for i in range(6)]
    assert list(gpu.run.gather(iter(events), result, entries)) == [4]
    assert result["left_out"] == ["5 small"] and [r["us"] for r in result["layers"][0]["rows"]] == [7.0, 7.0]


PLAYED = """
import json, os, sys, time
def tell(**event): print(json.dumps(event), flush=True)
tell(facts={"device": "played"})
for layer in map(int, sys.argv[1:]):
    tell(begin=layer)
    if layer == 2: os.abort()
    if layer == 3: time.sleep(600)
    if layer == 4: tell(fault="CudaError: 719"); sys.exit(1)
    tell(row={"tokens": 1, "skew": 0.0})
    tell(end=layer)
"""


def test_a_layer_that_crashes_or_hangs_costs_itself_alone(gpu):
    def command(left):
        started.append(left[:])
        return [sys.executable, "-c", PLAYED, *map(str, left)]

    started, result = [], {"layers": [], "left_out": []}
    entries = [entry(name=str(i)) for i in range(6)]
    done = list(gpu.run.gather(gpu.supervise.supervise(command, range(1, 6), 6.0), result, entries))
    assert done == [1, 2, 3, 4, 5] and started == [[1, 2, 3, 4, 5], [3, 4, 5], [4, 5], [5]]
    assert [layer["faults"] for layer in result["layers"]] == [
        [], ["its process ended with code -6"], ["it hangs: nothing was heard for 6 s"],
        ["CudaError: 719", "its process ended with code 1"], [],
    ]  # fmt: skip
    assert "failed" not in result and result["device"] == "played"


def test_a_process_that_never_begins_is_not_started_again(gpu):
    def command(left):
        started.append(left)
        return [sys.executable, "-c", "raise SystemExit(3)"]

    started = []
    assert list(gpu.supervise.supervise(command, [0, 1], 20.0)) == [{"failed": "its process ended with code 3"}]
    assert len(started) == 1


def bundle(folder, **more):
    manifest = {"arch": "sm_90a", "compiler": "none", "layers": [entry()], "refused": [], **more}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    out = tmp_path / "r.json"
    command = [sys.executable, RUN, str(bundle(tmp_path)), "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and not out.exists()
    assert result.stderr.startswith("error: the engine is for a GPU, and torch ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "arguments", "reason"),
    [
        ({}, ["--shapes", "b"], "has none of the layers asked for; left out: "),
        ({}, ["--tuned", "absent"], "absent: no tuning bundle with results ("),
        ({"layers": 3}, [], "is no bundle of make_bundle.py ("),
    ],
)
def test_what_cannot_be_measured_is_one_line(gpu, tmp_path, capsys, monkeypatch, more, arguments, reason):
    monkeypatch.setattr(sys, "argv", ["run.py", str(bundle(tmp_path, **more)), *arguments])
    assert gpu.run.main() == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ") and reason in told and told.count("\n") == 1


def test_a_dry_run_tells_what_a_gpu_tells(gpu, monkeypatch):
    """The same names, whoever measures: a reader of results needs to know one form."""
    real, dry = object.__new__(gpu.machine.Gpu), object.__new__(gpu.machine.Dry)
    real.gpu, real.blocks, dry.blocks = (
        types.SimpleNamespace(name="H", driver=types.SimpleNamespace(version=13010)),
        132,
        3,
    )
    told = "580.1, 345 MHz, 1980 MHz, 3201 MHz\n"
    monkeypatch.setattr(gpu.machine.subprocess, "run", lambda *a, **k: types.SimpleNamespace(stdout=told))
    facts = real.facts()
    assert facts.keys() == dry.facts().keys() and (facts["dry_run"], dry.facts()["dry_run"]) == (False, True)
    assert (facts["driver_cuda"], facts["driver"], facts["clock_memory"]) == ("13.1", "580.1", "3201 MHz")
    monkeypatch.setattr(gpu.machine.subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError()))
    assert real.facts()["driver"] is None and real.facts().keys() == facts.keys()


def test_times_are_of_graphs_on_flushed_caches(gpu, monkeypatch):
    """Gpu.time_us against a torch.cuda that only counts: warm-up, a capture, flushes, the median."""
    log, times = [], iter([3.0, 1.0, 2.0])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("mark")

        def synchronize(self):
            """The replay is done."""

        def elapsed_time(self, end):
            return next(times)

    machine = object.__new__(gpu.machine.Gpu)
    machine.flush = types.SimpleNamespace(zero_=lambda: log.append("flush"))
    machine.gpu = types.SimpleNamespace(capture=lambda step: (lambda: log.append("replay"), step()))
    monkeypatch.setattr(gpu.machine.torch.cuda, "Event", Event)
    monkeypatch.setattr(gpu.machine.torch.cuda, "synchronize", lambda: log.append("wait"))
    assert machine.time_us(lambda: log.append("step"), graph=True, repeats=3) == 2000.0
    assert log == ["step", "step", "wait", "step", *["flush", "mark", "replay", "mark"] * 3]


def tuning(folder, times):
    """A tuning bundle with results: times of (mode, kernel, rows of a tile, tokens); None: it was wrong."""
    names = list(dict.fromkeys(f"{mode}-{kernel}-{rows}" for mode, kernel, rows, _ in times))
    modes, tokens = ("gate_up", "down"), sorted({key[3] for key in times})
    sizes = {"E": 4, "F": 64, "H": 128, "K": 2, "S": 0}
    problems = [
        {"mode": m, "tokens": t, "sizes": sizes, "candidates": [n for n in names if n.startswith(m)]}
        for m in modes for t in tokens
    ]  # fmt: skip
    candidates = {}
    for name in names:
        mode, kernel, rows = name.split("-")
        before = [{"file": "g.cubin", "binds": {"y": "x_sorted"}}] if (mode, kernel) == ("gate_up", "wgmma") else []
        after = [{"file": "c.cubin", "binds": {"part": "part"}}] if mode == "down" else []
        steps = [*before, {"file": f"{name}.cubin", "binds": {"w": "w"}}, *after]
        config = {"kernel": kernel, "rows": int(rows), "splits": 2, "part_dtype": "float32"}
        candidates[name] = {"config": config, "tile_rows": int(rows), "kernels": steps}
    files = {k["file"]: {"launch": {"symbol": k["file"]}} for c in candidates.values() for k in c["kernels"]}
    manifest = {"problems": problems, "candidates": candidates, "files": files}
    lines = [{"format": "moec-bundle-results"}]
    for (mode, kernel, rows, count), us in times.items():
        number = modes.index(mode) * len(tokens) + tokens.index(count)
        record = {"status": "wrong" if us is None else "ok", "median_us": us}
        lines.append({"problem": number, "candidate": f"{mode}-{kernel}-{rows}", "record": record})
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))


UP, DOWN = "gate_up", "down"
TIMES = {
    (UP, "mma", 16, 8): 10.0, (UP, "mma", 64, 8): 4.0, (DOWN, "mma", 16, 8): 10.0, (DOWN, "mma", 32, 8): 1.0,
    (UP, "mma", 32, 8): None, (UP, "wgmma", 128, 8): 30.0, (DOWN, "wgmma", 128, 8): 30.0,
    (UP, "mma", 16, 900): 90.0, (UP, "mma", 64, 900): 70.0, (DOWN, "mma", 16, 900): 90.0, (DOWN, "mma", 32, 900): 50.0,
    (UP, "mma", 32, 900): 60.0, (UP, "wgmma", 128, 900): 20.0, (DOWN, "wgmma", 128, 900): 20.0,
}  # fmt: skip


def test_the_best_pair_of_tiles_with_one_number_of_rows(gpu, tmp_path):
    """32 rows would be the fastest for few tokens, were they right; 64 have no down; both fall to 16."""
    tuning(tmp_path / "tune", TIMES)
    shape = {"name": "a", "num_experts": 4, "inner": 64, "hidden": 128, "top_k": 2, "num_shared": 0}
    layers = [
        {"shape": shape, "size": size, "kernels": {"gate": "gate", "gate_up": "old"}} for size in ("small", "large")
    ]
    rows = {"a": {str(r): {"place": f"place of {r}"} for r in (16, 32, 64, 128)}}
    few, many = gpu.tuned.tuned_entries(layers, rows, tmp_path / "tune")
    assert few["tuned"]["gate_up"]["rows"] == few["tile_rows"] == 16 and few["tuned"]["tuner_us"] == pytest.approx(20)
    assert (few["gathers"], few["splits"], few["part_dtype"]) == (False, 2, "float32")
    assert few["kernels"].keys() == {"gate", "place", "gate_up", "down", "combine"}
    assert (many["tile_rows"], many["gathers"], many["tuned"]["tuner_us"]) == (128, True, pytest.approx(40))
    assert many["kernels"]["place"] == "place of 128" and many["kernels"]["gate"] == "gate"
    assert many["kernels"]["gate_up"] == {
        "file": str(tmp_path / "tune" / "gate_up-wgmma-128.cubin"), "launch": {"symbol": "gate_up-wgmma-128.cubin"},
    }  # fmt: skip
    with pytest.raises(gpu.tuned.TunedError, match="no results of the layers of this bundle; run its"):
        gpu.tuned.tuned_entries([layers[0] | {"shape": shape | {"inner": 32}}], rows, tmp_path / "tune")

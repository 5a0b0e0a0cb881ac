"""A visit to a GPU machine without one: limits, what comes back, and that every command of it can be asked for."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.null
FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
DEVICE_SECONDS, FILES = 600, 8  # of one call on a lent machine, and that come back from it


@pytest.fixture
def gpu(monkeypatch):
    """A module of the benchmark by name."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def module(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return module


def step(visit, name, code, seconds=60.0, bring=None):
    return visit.Step(name, ("{python}", "-c", code), seconds, bring)


def test_a_step_that_hangs_or_fails_is_not_the_last(gpu, tmp_path, capsys):
    visit = gpu("visit")
    carried = tmp_path / "carried"
    carried.mkdir()
    grandchild = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    steps = (
        step(
            visit,
            "right",
            "open('{carried}/made', 'w').write('kept'); print('first'); print('last')",
            60,
            ("made", "m"),
        ),
        step(visit, "fails", "import sys; sys.exit('no such thing')"),
        step(visit, "hangs", grandchild, 1.0),
        visit.Step("absent", ("no-such-program",), 5.0),
    )
    told = visit.visit(steps, carried, tmp_path / "out", 60.0)
    assert [(t["step"], t["code"]) for t in told] == [("right", 0), ("fails", 1), ("hangs", None), ("absent", 127)]
    assert [t["last"] for t in told] == [
        "last", "no such thing", "nothing was printed", "no-such-program: No such file or directory",
    ]  # fmt: skip
    assert (tmp_path / "out" / "m").read_text() == "kept" and json.loads(
        (tmp_path / "out" / "visit.json").read_text()
    ) == told
    assert "first" in (tmp_path / "out" / "log.txt").read_text() and "hangs: no time" in capsys.readouterr().out


def test_the_time_of_a_call_is_kept(gpu, tmp_path, monkeypatch):
    visit, times, now = gpu("visit"), [], [0.0]

    def watched(command, seconds, log):
        times.append(seconds)
        now[0] += min(max(seconds, 0.0), 250.0)
        return 0, "done"

    monkeypatch.setattr(visit, "_watched", watched)
    (tmp_path / "carried").mkdir()
    steps = tuple(step(visit, str(i), "", 300.0) for i in range(4))
    visit.visit(steps, tmp_path / "carried", tmp_path / "out", 570.0, lambda: now[0])
    assert times == [300.0, 300.0, 70.0, 0.0]
    assert visit._watched is watched  # below: what no time is left for is not begun
    monkeypatch.undo()
    assert visit._watched(["no-such-program"], 0.0, tmp_path / "log.txt") == (None, "left out")


@pytest.mark.parametrize("call", ["measure", "check", "full"])
def test_every_call_fits_a_lease(gpu, call):
    visit = gpu("visit")
    steps = visit.CALLS[call]
    assert sum(s.seconds for s in steps) < DEVICE_SECONDS
    words = " ".join(word for s in steps for word in s.words) + " " + " ".join(s.bring[1] for s in steps if s.bring)
    outs = {word for word in words.split() if word.startswith("{out}/")}
    drawn = [w for w in outs if w.endswith(".json") and call in ("measure", "full")]
    brought = [s for s in steps if s.bring]
    assert len(outs) + len(drawn) + len(brought) + len(("log.txt", "visit.json")) <= FILES


def commands(visit):
    """(script, arguments) of every step that is a script of ours."""
    for steps in visit.CALLS.values():
        for one in steps:
            names = [i for i, word in enumerate(one.words) if word.endswith(".py") and "{" not in word]
            if names:
                yield Path(one.words[names[0]]).name, list(one.words[names[0] + 1 :])


def test_every_command_can_be_asked_for(gpu, capsys, monkeypatch):
    visit, run = gpu("visit"), gpu("run")
    asked = list(commands(visit))
    assert {name for name, _ in asked} == {"run.py", "carry.py", "engine.py", "attention.py"}
    for name, arguments in asked:
        if name == "run.py":
            options = run.options_of(arguments)
            assert options.bundle.parts[0] == "{carried}" and options.seconds <= 540
    for name, arguments in asked:
        with pytest.raises(SystemExit) as ended:
            monkeypatch.setattr(sys, "argv", [name, *([] if name == "run.py" else arguments[:1]), "--help"])
            gpu(Path(name).stem).main()
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        assert all(option in shown for option in arguments if option.startswith("--")), (name, arguments)


def test_every_claim_has_a_command_that_exists(gpu):
    """docs/gpu.md, what only a GPU can show: scripts and options that are named are there."""
    text = (FOLDER.parents[1] / "docs" / "gpu.md").read_text().split("## What only a GPU can show")[1]
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 30 and all(len(row) == 2 for row in rows)
    sources = {path.name: path.read_text() for path in FOLDER.glob("*.py")}
    results = {"before.json", "tuned.json", "full.json", "repeats.json", "engine.json", "peer.json"}
    written = sources["visit.py"]
    for claim, command in rows:
        for name in re.findall(r"([a-z_]+)\.py\b", command):
            assert f"{name}.py" in sources or "compiler/" in command, (claim, command)
        for call in re.findall(r"`([a-z_]+\.py) ([^`]*)`", command):
            for option in re.findall(r"--[a-z-]+", call[1]):
                assert option in sources[call[0]], (claim, option)
        for file in re.findall(r"[a-z]+\.json", command):
            assert file in results and f"{{out}}/{file}" in written, (claim, file)

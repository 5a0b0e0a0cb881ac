"""`moec tune ls|show|diff|merge|export|import`, and that `moec tune MODEL` is still the tuning run."""

import json

import pytest
import typer
from tuning import a_key, a_record, a_tuning_run
from typer.testing import CliRunner

from moec import cli
from moec.compiler.errors import CompileError
from moec.compiler.tune.database import Database
from moec.compiler.tune.group import RUN, DefaultRun

pytestmark = pytest.mark.null


@pytest.fixture
def db(tmp_path):
    path = tmp_path / "tuning.db"
    with Database(path) as database:
        database.add_all(a_tuning_run())
    return path


def invoke(*arguments):
    """The text that a command prints; its error is raised."""
    told = CliRunner().invoke(cli.app, ["tune", *map(str, arguments)], catch_exceptions=True, env={"COLUMNS": "220"})
    if told.exception is not None and not isinstance(told.exception, SystemExit):
        raise told.exception
    assert told.exit_code == 0, told.output
    return told.stdout


def test_ls(db):
    rows = json.loads(invoke("ls", "--db", db, "--json"))
    assert len(rows) == 18 and {r["key"]["op"] for r in rows} == {"experts"}
    best = max(rows, key=lambda r: r["speedup"])
    assert best["speedup"] > 1 and best["winner"]["ratio"] == pytest.approx(1 / best["speedup"])
    assert len(json.loads(invoke("ls", "--db", db, "--tokens", "16", "--json"))) == 3
    assert json.loads(invoke("ls", "--db", db, "--device", "other", "--json")) == []
    text = invoke("ls", "--db", db)
    assert f"{best['speedup']:.2f}x" in text and "default" in text


def test_show(db, tmp_path):
    rows = json.loads(invoke("show", "--db", db, "--tokens", "16", "--json"))
    assert len(rows) == 3 and all(len(r["records"]) == r["trials"] == 31 for r in rows)
    text = invoke("show", "--db", db, "--tokens", "16")
    assert "winner" in text and "default" in text
    assert "page" in invoke("show", "--db", db, "--html", tmp_path / "page.html")
    assert "<h2>Speed-up</h2>" in (tmp_path / "page.html").read_text()


def test_diff(db, tmp_path):
    other = tmp_path / "other.db"
    with Database(other) as database:
        database.add_all(a_tuning_run(seed=3))
    told = json.loads(invoke("diff", db, other, "--json"))
    assert told["agree"] + len(told["differences"]) == 18 and told["differences"]
    assert {d["kind"] for d in told["differences"]} == {"config"}
    assert "problems have the same winner" in invoke("diff", db, other)
    assert json.loads(invoke("diff", db, db, "--json")) == {"agree": 18, "differences": []}


def test_export_import_and_merge(db, tmp_path):
    file, copy, third = tmp_path / "results.jsonl", tmp_path / "copy.db", tmp_path / "third.db"
    assert str(file) in invoke("export", "--db", db, "-o", file)
    (told,) = json.loads(invoke("import", file, "--db", copy, "--json"))
    assert told["added"] == 18 * 31 and told["conflicts"] == 0
    assert invoke("ls", "--db", copy, "--json") == invoke("ls", "--db", db, "--json")
    rows = json.loads(invoke("merge", third, db, copy, "--json"))
    assert [r["added"] for r in rows] == [18 * 31, 0]
    assert "0 new records" in invoke("merge", third, db)


def test_tables_of_vllm(db, tmp_path):
    name = "E=8,N=1792,device_name=NVIDIA_H200.json"
    fields = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1, "num_warps": 2}
    (tmp_path / name).write_text(json.dumps({"16": fields | {"num_stages": 4}}))
    (told,) = json.loads(invoke("import", tmp_path / name, "--db", db, "--shape", "H=4096,K=2", "--json"))
    assert told["added"] == 1
    with pytest.raises(CompileError, match="no winner of a CUDA grouped GEMM to export"):
        invoke("export", "--db", db, "-o", tmp_path / "configs", "--format", "vllm")
    with pytest.raises(CompileError, match="--format 'xml'; known: jsonl, vllm"):
        invoke("export", "--db", db, "-o", tmp_path / "configs", "--format", "xml")


def test_errors_are_one_line(tmp_path):
    for arguments in (("ls", "--db", tmp_path / "no.db"), ("diff", tmp_path / "a", tmp_path / "b")):
        with pytest.raises(CompileError, match="there is no tuning database") as caught:
            invoke(*arguments)
        assert "\n" not in str(caught.value)
    with Database(tmp_path / "empty.db"):
        pass
    with pytest.raises(CompileError, match="the database has no record of that kind"):
        invoke("show", "--db", tmp_path / "empty.db", "--html", tmp_path / "page.html")


def test_the_default_command_takes_whatever_is_no_other_command():
    app, called = typer.Typer(), []
    group = typer.Typer(cls=DefaultRun)
    group.command(name=RUN)(lambda model, db="x.db": called.append((RUN, model)))
    group.command(name="ls")(lambda: called.append(("ls",)))
    app.command(name="other")(lambda: None)
    app.add_typer(group, name="tune")
    for arguments in (["tune", "zoo:mixtral"], ["tune", "ls"], ["tune", "run", "ls"], ["tune", "--db", "y", "m"]):
        assert CliRunner().invoke(app, arguments).exit_code == 0, arguments
    assert called == [(RUN, "zoo:mixtral"), ("ls",), (RUN, "ls"), (RUN, "m")]
    told = CliRunner().invoke(app, ["tune", "--help"])
    assert told.exit_code == 0 and "ls" in told.stdout and "run" in told.stdout


def test_records_of_a_key_that_nobody_won(tmp_path):
    with Database(tmp_path / "one.db") as database:
        database.add(a_record(3, a_key(op="odd", shape="nothing")))
    assert "odd" in invoke("ls", "--db", tmp_path / "one.db")
    assert "nothing" in invoke("show", "--db", tmp_path / "one.db")

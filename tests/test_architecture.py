"""Who may import whom, and how a pass is named. Imports inside functions count."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("compiler", "passes", "runtime")
MAY_IMPORT = {"compiler": {"compiler", "passes", "runtime"}, "passes": {"passes"}, "runtime": {"runtime"}}
FORBIDDEN = {"runtime": {"tvm", "transformers"}, "passes": {"tvm", "transformers", "safetensors"}}
# they import a module that someone names: the user on the command line; a tuning run, in its measuring process
IMPORT_BY_NAME = {"compiler/capture/entry.py", "compiler/tune/subject.py"}
NOT_PASSES = {"__init__", "pipeline"}


def sources(package: str) -> list[Path]:
    return sorted(p for p in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute module names that a file imports, wherever in it, with their lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((a.name, node.lineno) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write `from moec.x import y`, not a relative import"
            yield node.module or "", node.lineno
            yield from ((f"{node.module}.{a.name}", node.lineno) for a in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            arg = node.args[0]
            known = isinstance(arg, ast.Constant) or path.relative_to(ROOT).as_posix() in IMPORT_BY_NAME
            assert known, f"{path}:{node.lineno}: an import that cannot be checked"
            if isinstance(arg, ast.Constant):
                yield arg.value, node.lineno


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


@pytest.mark.null
@pytest.mark.parametrize("package", PACKAGES)
def test_import_arrows(package: str) -> None:
    wrong = []
    for path in sources(package):
        for name, line in imports(path):
            top, *rest = name.split(".")
            where = f"{path.relative_to(ROOT)}:{line}: {name}"
            if top in PACKAGES:
                wrong.append(f"{where} (write moec.{name})")
            if top == "moec" and rest and rest[0] in PACKAGES and rest[0] not in MAY_IMPORT[package]:
                wrong.append(where)
            if top in FORBIDDEN.get(package, set()):
                wrong.append(where)
            if top == "moec" and package != "compiler" and (not rest or rest[0] not in PACKAGES):
                wrong.append(f"{where} (the public face imports the packages, not the other way)")
    assert not wrong, "\n".join(wrong)


@pytest.mark.null
def test_the_ir_imports_nothing_of_ours_but_itself() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources("passes/ir")
        for name, line in imports(path)
        if name.startswith("moec.") and not name.startswith("moec.passes.ir")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.null
def test_passes_do_not_import_each_other() -> None:
    """A pass is one file; what two passes share lies in ir, infra or lifting."""
    names = {p.stem for p in pass_files()}
    wrong = []
    for path in pass_files():
        for name, line in imports(path):
            parts = name.split(".")
            if parts[:2] == ["moec", "passes"] and len(parts) > 2 and parts[2] in names - {path.stem}:
                wrong.append(f"{path.name}:{line}: {name}")
    assert not wrong, "\n".join(wrong)


def pass_files() -> list[Path]:
    return sorted(p for p in (ROOT / "passes").glob("*.py") if p.stem not in NOT_PASSES)


@pytest.mark.null
@pytest.mark.parametrize("path", pass_files(), ids=lambda p: p.stem)
def test_a_pass_has_one_name_in_five_places(path: Path) -> None:
    class_name = "".join(word.capitalize() for word in path.stem.split("_"))
    module = importlib.import_module(f"moec.passes.{path.stem}")
    one = getattr(module, class_name)()
    assert one.name == path.stem.replace("_", "-")
    tree = ast.parse(path.read_text())
    runs = [c.name for c in tree.body if isinstance(c, ast.ClassDef) and any(_is_run(f) for f in c.body)]
    assert runs == [class_name], "one file holds one pass"
    assert (ROOT / "tests" / "passes" / f"test_{path.stem}.py").is_file()
    for part in ("Before", "After:", "Leaves alone:", "Needs:", "Gives:", "Source:"):
        assert part in (ast.get_docstring(tree) or ""), f"the module docstring lacks {part!r}"
    verb = path.stem.split("_")[0]
    assert verb not in ("optimize", "optimise", "handle", "process", "misc", "utils")


def _is_run(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name == "run"


@pytest.mark.null
def test_every_pass_is_in_the_pipeline() -> None:
    from moec.passes.pipeline import PIPELINE

    names = {p.name for p in PIPELINE}
    assert names == {p.stem.replace("_", "-") for p in pass_files()}
    text = (ROOT / "passes" / "pipeline.py").read_text()
    assert "lambda" not in text, "the pipeline is a literal list"


MACHINE_PATHS = re.compile(r"(?<![\w.])/(?:home|root|work|tmp|mnt|Users|opt|data)/[A-Za-z_]")


@pytest.mark.null
@pytest.mark.parametrize("folder", [*PACKAGES, "src", "tests", "examples", "benchmarks", "docs"])
def test_no_path_of_one_machine(folder: str) -> None:
    """A path that exists on the author's machine only breaks everywhere else."""
    wrong = []
    for path in (ROOT / folder).rglob("*"):
        if not path.is_file() or path.is_symlink() or path.suffix not in (".py", ".md", ".toml", ".c", ".json", ".sh"):
            continue
        if path.resolve() == Path(__file__).resolve():
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if MACHINE_PATHS.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:90]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.null
def test_environment_variables_are_read_in_the_options_only() -> None:
    allowed = {"compiler/options.py", "runtime/options.py"}
    wrong = []
    for package in PACKAGES:
        for path in sources(package):
            where = str(path.relative_to(ROOT))
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and where not in allowed:
                    wrong.append(f"{where}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.null
def test_the_three_links() -> None:
    for package in PACKAGES:
        link = ROOT / "src" / "moec" / package
        assert link.is_symlink() and link.resolve() == (ROOT / package).resolve()
        assert not link.readlink().is_absolute()

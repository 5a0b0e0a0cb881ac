"""File, class, command-line name, test and golden folder of every pass derive from one another (style rule 4)."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from moec.passes.pipeline import PIPELINE

PASSES = Path(__file__).parents[2] / "passes"
HERE = Path(__file__).parent
FILES = sorted(p.stem for p in PASSES.glob("*.py") if "_" in p.stem and p.stem != "__init__")
BAD_VERBS = ("optimize", "utils", "misc", "handle")


def _class_name(stem: str) -> str:
    return "".join(part.capitalize() for part in stem.split("_"))


@pytest.mark.null
@pytest.mark.parametrize("stem", FILES)
def test_names_derive_from_the_file(stem: str) -> None:
    module = importlib.import_module(f"moec.passes.{stem}")
    passes = [
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if c.__module__ == module.__name__ and hasattr(c, "run")
    ]
    assert [c.__name__ for c in passes] == [_class_name(stem)]
    assert passes[0]().name == stem.replace("_", "-")
    assert not stem.startswith(BAD_VERBS)
    assert (HERE / f"test_{stem}.py").is_file()


@pytest.mark.null
@pytest.mark.parametrize("stem", FILES)
def test_docstring_is_the_specification(stem: str) -> None:
    text = importlib.import_module(f"moec.passes.{stem}").__doc__ or ""
    for part in ("Before:", "After:", "Leaves alone:", "Needs:", "Gives:", "Source:"):
        assert part in text, f"passes/{stem}.py: its docstring has no {part}"


@pytest.mark.null
def test_golden_folders_belong_to_passes() -> None:
    folders = {p.name for p in (HERE / "golden").iterdir()}
    assert folders <= {p.stem.removeprefix("test_") for p in HERE.glob("test_*.py")}


@pytest.mark.null
def test_every_pass_of_the_pipeline_has_its_file() -> None:
    assert {p.name.replace("-", "_") for p in PIPELINE} <= set(FILES)

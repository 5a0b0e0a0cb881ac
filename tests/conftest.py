"""Options and fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files; review the diff")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """golden(name, text): the text equals tests/<..>/golden/<pass>/<name>.txt, <pass> from the test file's name."""
    update = request.config.getoption("--update-golden")
    folder = Path(request.path).parent / "golden" / Path(request.path).stem.removeprefix("test_")

    def check(name: str, text: str) -> None:
        path = folder / f"{name}.txt"
        if update:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        assert path.is_file(), f"{path.relative_to(folder.parent.parent)} is missing; make it with --update-golden"
        assert text == path.read_text()

    return check

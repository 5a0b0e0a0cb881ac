"""Every example of README.md and docs/*.md runs, or says why it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from doc_examples import Block, blocks, run, stray_examples

ROOT = Path(__file__).parents[2]
PAGES = {p.relative_to(ROOT).as_posix(): p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
RUN = ("python", "sh")
pytestmark = pytest.mark.cpu


def examples(name: str) -> list[Block]:
    return [b for b in blocks(PAGES[name], name) if b.language in RUN and b.when != "not run"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder that looks like the repository's to examples that read its model."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    torch.compiler.reset()


@pytest.mark.parametrize("name", [n for n in PAGES if any(not b.when for b in examples(n))])
def test_examples_run(name, folder, monkeypatch, capsys):
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in examples(name):
        if not block.when:
            run(block, namespace, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in PAGES if any(b.when == "slow" for b in examples(n))])
def test_slow_examples_run(name, folder, monkeypatch, capsys):
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in examples(name):
        run(block, namespace, monkeypatch)


@pytest.mark.null
@pytest.mark.parametrize("name", PAGES)
def test_no_example_is_out_of_sight(name):
    lines = stray_examples(PAGES[name])
    assert not lines, f"{name}, lines {lines}: put examples into ```python or ```sh blocks, grammar into ```text"


@pytest.mark.null
def test_a_failing_example_fails(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx = 1\n```\n\n<!-- slow: why -->\n```sh\nmoec verify nowhere.engine  # a comment\n```\n"
    )
    first, second = blocks(page, "page.md")
    assert (second.when, second.reason, second.line) == ("slow", "why", 6)
    assert second.commands == [["moec", "verify", "nowhere.engine"]]
    run(first, {}, monkeypatch)
    with pytest.raises(AssertionError, match=r"page\.md:6: moec verify nowhere\.engine ends with 1"):
        run(second, {}, monkeypatch)
    assert stray_examples(page) == []
    page.write_text("    moec verify x\n")
    assert stray_examples(page) == [1]

"""The code blocks of a documentation page, and how the tests run them.

    ```python            run in order, in one namespace for the page
    ```sh                each line that begins with `moec` is run by the command line in this process
    ```text              never run: grammar, output, other machines

A comment on the line before a block says why it is not run, or not in every test run:

    <!-- not run: it needs a network -->
    <!-- slow: eight ranks -->
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from moec import cli

FENCE = re.compile(r"^```(\w*)\s*$")
COMMENT = re.compile(r"^<!-- (not run|slow): (.+) -->$")
INDENTED = re.compile(r"^    (moec|python|make|pip|torchrun|srun|import|from|engine|captured) ?\S")


@dataclasses.dataclass(frozen=True)
class Block:
    """line: of the fence, from 1.  when: "" (always), "slow" or "not run", and why."""

    page: str
    line: int
    language: str
    text: str
    when: str = ""
    reason: str = ""

    @property
    def commands(self) -> list[list[str]]:
        """The lines of a shell block as words, comments left out; a line that ends in a backslash goes on."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def blocks(page: Path, name: str) -> list[Block]:
    """The fenced blocks of a page. Raises: ValueError: a fence has no language, or does not end."""
    lines, found, at = page.read_text(encoding="utf-8").splitlines(), [], 0
    while at < len(lines):
        fence = FENCE.match(lines[at].strip()) if lines[at].startswith("```") else None
        if fence is None:
            at += 1
            continue
        end = next((i for i in range(at + 1, len(lines)) if lines[i].strip() == "```"), None)
        if end is None or not fence[1]:
            raise ValueError(f"{name}:{at + 1}: a block without {'an end' if end is None else 'a language'}")
        comment = COMMENT.match(lines[at - 1]) if at else None
        when, reason = (comment[1], comment[2]) if comment else ("", "")
        found.append(Block(name, at + 1, fence[1], "\n".join(lines[at + 1 : end]) + "\n", when, reason))
        at = end + 1
    return found


def stray_examples(page: Path) -> list[int]:
    """Lines that show code outside of a fence, where no test would see it."""
    inside, found = False, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        inside ^= line.startswith("```")
        if not inside and INDENTED.match(line):
            found.append(number)
    return found


def run(block: Block, namespace: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs one block in the current directory. Raises: AssertionError: a command failed, or is not ours."""
    where = f"{block.page}:{block.line}"
    if block.language == "python":
        exec(compile("\n" * block.line + block.text, where, "exec"), namespace)
        return
    for words in block.commands:
        assert words[0] == "moec", f"{where}: {words[0]} is run by no test; mark the block <!-- not run: why -->"
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, f"{where}: {' '.join(words)} ends with {stop.value.code}"

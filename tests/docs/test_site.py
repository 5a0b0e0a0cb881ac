"""The pages build without a warning, and the list of pages knows all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).parents[2]


@pytest.mark.null
def test_the_site_builds_without_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    monkeypatch.chdir(ROOT)
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True)
    build(config)  # raises Abort on a warning: a broken link, a name without a docstring
    pages = {p.stem for p in (ROOT / "docs").glob("*.md")}
    assert pages <= {p.stem for p in tmp_path.glob("*.html")}
    reference = (tmp_path / "reference.html").read_text()
    assert "trust_pt2" in reference and "doc-heading" in reference
    assert "fonts.googleapis" not in reference and "googletagmanager" not in reference


@pytest.mark.null
def test_every_page_of_the_list_exists():
    def names(entry):
        if isinstance(entry, str):
            return [entry]
        return [n for inner in (entry.values() if isinstance(entry, dict) else entry) for n in names(inner)]

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert len(names(nav)) == len(set(names(nav)))
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name in names(nav), f"{page.name} is not in mkdocs.yml's nav"

"""The notebook of the passes runs from its first cell to its last, in a process of its own."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "passes.ipynb"


@pytest.mark.cpu
def test_the_notebook_of_the_passes():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=None, kernel_name="python3").execute()  # raises where a cell does
    printed = [
        "".join(o.get("text", "") for o in c.get("outputs", ())) for c in notebook.cells if c.cell_type == "code"
    ]
    shown = {
        c.source: text for c, text in zip((c for c in notebook.cells if c.cell_type == "code"), printed, strict=True)
    }
    for name, made in (
        ("lift-experts", "moec.experts("),
        ("lift-gate", "moec.gate("),
        ("lift-norm", "moec.rms_norm("),
        ("fuse-gate", "moec.gate_linear("),
        ("fuse-gate-up", "moec.gated_mlp("),
        ("group-expert-gemms", "moec.combine_gemm("),
    ):
        added = [line for line in shown[f'show("{name}")'].splitlines() if line.startswith("+")]
        assert any(made in line for line in added), name
    assert "changed nothing" not in "".join(printed)
    assert printed[-1].startswith("equal")

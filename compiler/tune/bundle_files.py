"""The folder of a bundle: its cubins, its manifest, and a runner with the files of moec that it needs."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moec.compiler.tune.errors import TuneError

_PACKAGE = Path(__file__).parents[2]  # the folder that holds compiler/ and runtime/
CARRIED = (
    "runtime/errors.py", "runtime/expressions.py", "runtime/launch/driver.py", "compiler/tune/statistics.py",
    "compiler/tune/runner/main.py", "compiler/tune/runner/child.py", "compiler/tune/runner/task.py",
    "compiler/tune/runner/device.py", "compiler/tune/runner/data.py",
)  # fmt: skip
"""What the runner is made of; a test runs it where nothing else can be imported."""
_RUN = '''"""Measures this bundle on the GPU of this machine; --help says how. Python 3.11 and the driver are enough."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from moec.compiler.tune.runner.main import main

if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent, sys.argv[1:]))
'''


def write_folder(out: Path, manifest: Mapping[str, Any], cubins: Mapping[str, Path]) -> None:
    """Writes a bundle, whole or not at all. Raises: TuneError: the disk refuses."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as made:
            folder = Path(made) / "bundle"
            folder.mkdir()
            for name in manifest["files"]:
                shutil.copyfile(cubins[name], folder / name)
            (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
            _write_runner(folder)
            folder.rename(out)
    except OSError as error:
        raise TuneError(f"{out}: the bundle cannot be written ({error.strerror})") from error


def _write_runner(folder: Path) -> None:
    (folder / "run.py").write_text(_RUN)
    for name in CARRIED:
        target = folder / "moec" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_PACKAGE / name, target)
    for package in {p for name in CARRIED for p in (folder / "moec" / name).parents if folder in p.parents}:
        (package / "__init__.py").write_text("")

"""Where a benchmark leaves what it measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any


def write_json(file: Path | None, data: Any) -> None:
    """`data` as JSON, dataclasses as their fields, in a folder that is made if need be. file: None: not asked for."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(data, indent=1, default=dataclasses.asdict) + "\n", encoding="utf-8")

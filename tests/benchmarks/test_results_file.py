"""Results are kept also where their folder is not there yet."""

import dataclasses
import json

from results_file import write_json


@dataclasses.dataclass
class Cell:
    name: str
    times_ms: list[float]


def test_a_missing_folder_is_made(tmp_path):
    file = tmp_path / "machine" / "cells.json"
    write_json(file, {"threads": 2, "cells": [Cell("bf16", [1.5])]})
    assert json.loads(file.read_text()) == {"threads": 2, "cells": [{"name": "bf16", "times_ms": [1.5]}]}
    write_json(None, object())

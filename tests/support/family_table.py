"""The tiny configurations of benchmarks/families.json as models: `from family_table import family_config`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TABLE = json.loads((Path(__file__).parents[2] / "benchmarks" / "families.json").read_text())


def family_config(model_type: str, **over: Any) -> Any:
    """The configuration of a family of one part; `over` replaces single values, which go to a composite one's text."""
    return CONFIG_MAPPING[model_type](**_whole(TABLE["families"][model_type], over))


def _whole(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    if "text_config" in values:
        return {**values, "text_config": _whole(values["text_config"], over)}
    absent = {k for k, v in values.items() if v is None}
    return {k: v for k, v in {**TABLE["common"], **values, **over}.items() if k not in absent}

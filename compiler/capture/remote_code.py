"""Models whose code lies in their directory (auto_map in config.json): imported only where the user trusts it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moec.compiler.errors import UnsupportedModel
from moec.passes.infra.errors import in_one_line

log = logging.getLogger(__name__)
MODEL, CONFIG = "AutoModelForCausalLM", "AutoConfig"


def remote_references(raw: dict[str, Any], origin: str) -> dict[str, str]:
    """auto_map of a config.json, empty where it has none.

    Raises: UnsupportedModel: it is malformed, or names code that does not lie in the directory.
    """
    found = raw.get("auto_map") or {}
    if not isinstance(found, dict):
        raise UnsupportedModel(f"{origin}: auto_map: expected an object, got a {type(found).__name__}")
    references = {k: v for k, v in found.items() if k in (CONFIG, MODEL)}
    for key, reference in references.items():
        module, _, name = reference.partition(".") if isinstance(reference, str) else ("", "", "")
        if not (module.isidentifier() and name.isidentifier()):
            raise UnsupportedModel(
                f"{origin}: auto_map.{key}: expected FILE.CLASS of a file in this directory, got {reference!r}; "
                "download the code beside config.json"
            )
    return references


def ignore_remote_code(raw: dict[str, Any], origin: str) -> None:
    """Says that a directory's code is not used."""
    if raw.get("auto_map"):
        log.warning(
            "%s: auto_map: the directory's own code is ignored, since moec knows %r itself", origin, raw["model_type"]
        )


def remote_config_class(directory: Path, raw: dict[str, Any], references: dict[str, str], origin: str) -> Any:
    """The configuration class, from the directory's code where it has one. Raises: UnsupportedModel: it has none."""
    if CONFIG in references:
        return imported(directory, references[CONFIG], origin)
    if raw.get("model_type") in CONFIG_MAPPING:
        return CONFIG_MAPPING[str(raw["model_type"])]
    raise UnsupportedModel(
        f"{origin}: auto_map: expected {CONFIG}, since transformers has no {raw.get('model_type')!r}"
    )


def imported(directory: Path, reference: str, origin: str) -> Any:
    """The class that a reference names; runs the file. Raises: UnsupportedModel: the file cannot be imported."""
    try:
        return get_class_from_dynamic_module(reference, str(directory), local_files_only=True)
    except Exception as error:  # whatever the code does
        raise UnsupportedModel(f"{origin}: auto_map: {reference} cannot be imported: {in_one_line(error)}") from error


def load_remote_model(directory: Path, config: Any, dtype: Any) -> Any:
    """The model with its weights in memory, for code that cannot be traced without them."""
    try:
        return AutoModelForCausalLM.from_pretrained(
            directory, config=config, dtype=dtype, trust_remote_code=True, local_files_only=True
        ).eval()
    except Exception as error:  # the library's checks and the directory's own code
        raise UnsupportedModel(f"{directory}: its own code cannot load the checkpoint: {in_one_line(error)}") from error

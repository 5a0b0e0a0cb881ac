"""Reads config.json into a transformers configuration; remote code runs only where it is trusted, depth can be cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moec.compiler.capture.checkpoint import read_json
from moec.compiler.capture.quantisation import QUANTISATION_KEYS, quantisation_of
from moec.compiler.capture.remote_code import ignore_remote_code, remote_config_class, remote_references
from moec.compiler.capture.settings import check_raw_settings
from moec.compiler.errors import CheckpointError, CompileError, UnsupportedModel
from moec.compiler.families.catalogue import family_of


def load_config(directory: Path, layers: int | None = None, trust_remote_code: bool = False) -> Any:
    """The configuration of a model directory, of `layers` decoder layers if given.

    trust_remote_code: where config.json names code of the directory (auto_map), import and use it.

    Raises: CheckpointError: no directory, no config.json, or a damaged one.  UnsupportedModel, CompileError: see
        parse_config.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; expected a folder with config.json")
    file = directory / "config.json"
    if not file.exists():
        raise CheckpointError(f"{directory}: no config.json; expected a Hugging Face model directory")
    raw, origin = PreTrainedConfig._decode_special_floats(read_json(file)), str(file)
    references = remote_references(raw, origin) if trust_remote_code else {}
    if not references:
        config = parse_config(raw, origin, layers)
        ignore_remote_code(raw, origin)
        return config
    config = parse_config(raw, origin, layers, remote_config_class(directory, raw, references, origin))
    config.name_or_path = str(directory)  # where the library looks for the code of the model
    return config


def parse_config(raw: dict[str, Any], origin: str, layers: int | None = None, config_class: Any = None) -> Any:
    """The configuration that a config.json's content describes; origin is named in errors.

    config_class: None for the library's or the family's own.

    Raises: UnsupportedModel: an unknown architecture, remote code, or an unknown quantisation.  CheckpointError: values
        that the family does not take.  CompileError: more layers than the model has.
    """
    config_class = config_class or _config_class(raw, origin)
    quantisation_of(raw, origin)
    check_raw_settings(raw, config_class, origin)
    raw = {k: v for k, v in raw.items() if k not in QUANTISATION_KEYS}  # the library would build a quantised model
    try:
        config = config_class.from_dict(dict(raw))
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{origin}: {error}") from error
    except Exception as error:  # the library checks values in many places, with many exception types
        raise CheckpointError(f"{origin}: {' '.join(str(error).split()) or type(error).__name__}") from error
    return config if layers is None else cut_layers(raw, config, layers)


def _config_class(raw: dict[str, Any], origin: str) -> Any:
    model_type = raw.get("model_type")
    if model_type is not None and not isinstance(model_type, str):
        raise CheckpointError(f"{origin}: model_type: expected a string, got {model_type!r}")
    family = family_of(model_type)
    if family is not None:
        return family.config
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return CONFIG_MAPPING[str(model_type)]
    if raw.get("auto_map"):
        raise UnsupportedModel(
            f"{origin}: model_type {model_type!r} comes with its own code (auto_map), which is executed only with "
            "--trust-remote-code (trust_remote_code=True); read the code first"
        )
    if not model_type:
        raise UnsupportedModel(f"{origin}: no model_type; expected that of a causal language model in transformers")
    raise UnsupportedModel(
        f"{origin}: unknown architecture {model_type!r}: transformers has no causal language model of that type"
    )


def cut_layers(raw: dict[str, Any], config: Any, layers: int) -> Any:
    """The same configuration with fewer decoder layers; per-layer lists are cut with it."""
    depth = config.num_hidden_layers
    if not 1 <= layers <= depth:
        raise CompileError(f"layers: expected 1 to {depth} (the model's own), got {layers}")
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    cut = {k: (v[:layers] if isinstance(v, list) and len(v) == depth else v) for k, v in raw.items()}
    cut.pop("num_hidden_layers", None)
    cut[name] = layers
    return type(config).from_dict(cut)

"""What config.json says about a quantised checkpoint; what would change the numbers unseen is refused by key."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from moec.compiler.errors import UnsupportedModel

QUANTISATION_KEYS = ("quantization_config", "compression_config")


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """How the weights of a checkpoint are stored.

    method: quant_method of config.json.  bits: of packed integers, 0 where there are none.
    block: rows and columns that share a scale, None where the shape of the scales tells it.
    zero_offset: what is added to a stored zero point, modulo 2 ** bits.
    """

    method: str
    bits: int = 0
    block: tuple[int, int] | None = None
    zero_offset: int = 0


def quantisation_of(raw: dict[str, Any], origin: str) -> Quantisation | None:
    """The quantisation that a config.json describes, None where it names none.

    Raises: UnsupportedModel: an unknown method, or a setting of a known one without a meaning here; names the key.
    """
    inner = raw.get("text_config") if isinstance(raw.get("text_config"), dict) else {}
    found = [(key, holder[key]) for holder in (raw, inner or {}) for key in QUANTISATION_KEYS if holder.get(key)]
    if not found:
        return None
    key, settings = found[0]
    if not isinstance(settings, dict):
        raise UnsupportedModel(f"{origin}: {key}: expected an object, got a {type(settings).__name__}")
    method = settings.get("quant_method", "compressed-tensors" if key == "compression_config" else "an unnamed method")
    if method not in _METHODS:
        known = ", ".join(_METHODS)
        raise UnsupportedModel(
            f"{origin}: {key}.quant_method: {method!r} checkpoints cannot be read (known: {known}); use the model's "
            "unquantised checkpoint"
        )
    return _METHODS[method](_Settings(f"{origin}: {key}", settings))


class _Settings:
    """The settings of one method, and their name in errors."""

    def __init__(self, origin: str, values: dict[str, Any]) -> None:
        self.origin, self.values = origin, values

    def only(self, key: str, *known: Any) -> Any:
        """The value, which must be one of the known ones. None among them: the key may be absent."""
        value = self.values.get(key)
        if value not in known:
            raise self.refusal(key, f"{value!r} is not known here; expected {', '.join(map(repr, known))}")
        return value

    def nothing(self, *keys: str) -> None:
        """These keys must be absent or empty."""
        for key in keys:
            if self.values.get(key):
                raise self.refusal(key, "has no meaning here")

    def refusal(self, key: str, text: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self.origin}.{key}: {text}; use the model's unquantised checkpoint")


def _fp8(s: _Settings) -> Quantisation:
    s.only("fmt", None, "e4m3", "float8_e4m3fn")
    size = s.values.get("weight_block_size")
    return Quantisation("fp8", block=None if size is None else _pair(s, "weight_block_size", size))


def _mxfp4(s: _Settings) -> Quantisation:
    return Quantisation("mxfp4", bits=4, block=(1, 32))


def _gptq(s: _Settings) -> Quantisation:
    rules = s.values.get("dynamic") or {}
    if any(not str(rule).startswith("-:") for rule in rules):  # the others leave modules unquantised
        raise s.refusal("dynamic", "has rules that quantise some modules in another way")
    key = "checkpoint_format" if s.values.get("checkpoint_format") else "format"
    version = s.only(key, None, "gptq", "gptq_v2")
    return Quantisation("gptq", bits=s.only("bits", 4, 8), zero_offset=0 if version == "gptq_v2" else 1)


def _awq(s: _Settings) -> Quantisation:
    s.only("zero_point", None, True)
    for key in ("version", "format"):
        s.only(key, None, "gemm", "GEMM")
    return Quantisation("awq", bits=s.only("bits", 4, *([None] if s.values.get("w_bit") == 4 else [])) or 4)


def _compressed_tensors(s: _Settings) -> Quantisation:
    s.only("quantization_status", None, "compressed")
    s.nothing("kv_cache_scheme", "transform_config")
    if (s.values.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise s.refusal("sparsity_config", "sparse weights are not known here")
    groups = s.values.get("config_groups") or {}
    formats = {s.values.get("format")} | {g.get("format") for g in groups.values()}
    unknown = formats - {None, "float-quantized", "int-quantized", "naive-quantized", "pack-quantized"}
    if unknown:
        raise s.refusal("format", f"{min(map(str, unknown))!r} is not known here")
    bits: set[int] = set()
    blocks: set[tuple[int, int]] = set()
    for group in groups.values():
        weights = group.get("weights") or {}
        strategy = weights.get("strategy")
        if strategy not in (None, "tensor", "channel", "group", "block"):
            raise s.refusal("config_groups", f"the strategy {strategy!r} is not known here")
        if weights.get("type") == "int":
            bits.add(weights.get("num_bits"))
        if strategy == "block":
            blocks.add(_pair(s, "config_groups", weights.get("block_structure")))
    if len(blocks) > 1 or len(bits) > 1 or not bits <= {4, 8}:
        raise s.refusal("config_groups", "integers of several widths, other than 4 and 8 bits, or several block sizes")
    return Quantisation("compressed-tensors", min(bits, default=0), min(blocks, default=None))


def _pair(s: _Settings, key: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(n, int) and n > 0 for n in value):
        raise s.refusal(key, f"expected two block sizes, got {value!r}")
    return value[0], value[1]


_METHODS: dict[str, Callable[[_Settings], Quantisation]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
}

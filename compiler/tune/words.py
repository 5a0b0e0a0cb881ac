"""Problems and configurations in a few words, for tables and pages."""

from __future__ import annotations

from moec.compiler.tune.record import Key, Record, shape_sizes

_SIZES = ("H", "F", "E", "K", "S")


def short_shape(key: Key) -> str:
    """The sizes of a problem without what most have in common: "H2048 F1408 E64 K6 S2", "H64 F32 E8 K2 gate_up"."""
    sizes = shape_sizes(key.shape)
    parts = [f"{name}{sizes[name]}" for name in _SIZES if sizes.get(name, 0) != 0]
    return " ".join([*parts, str(sizes["mode"])] if "mode" in sizes else parts) or key.shape


def short_name(key: Key) -> str:
    """As short_shape, with the tokens: "H2048 F1408 E64 K6 S2, T=16"."""
    return f"{short_shape(key)}, T={key.tokens}"


def changes(used: Record, default: Record | None) -> str:
    """What a configuration sets otherwise than the default's, "splits=2 stages=3"; without a default all of it."""
    old = {} if default is None else default.config
    return " ".join(f"{name}={value}" for name, value in used.config.items() if old.get(name) != value)

"""Why a tuning database says nothing of a layer, in the same words for every kind of device."""

from __future__ import annotations

from collections.abc import Sequence

from moec.compiler.tune.record import Key

_FIELDS = ("weight_format", "kernel_sha256", "toolchain", "device")
_SHOWN = 40
"""Characters of a value: enough to tell digests and versions apart."""


def why_nothing_fits(database: str, wanted: Key, of_layer: Sequence[Key], layer: str, remedy: str) -> str:
    """One line: what there would have to be, or which field of all the keys of the layer is another than wanted.

    Args:
        database: its file name.  wanted: what no key equals in all fields.
        of_layer: keys of the same layer; layer: as the message names it.
        remedy: what to do where the layer was not measured at all, "`moec tune` makes them".
    """
    if not of_layer:
        return f"{database} has no measurement of {layer}; {remedy}"
    for name in _FIELDS:
        values, own = {getattr(key, name) for key in of_layer}, getattr(wanted, name)
        if own not in values:
            have = ", ".join(sorted(value[:_SHOWN] for value in values))
            return f"{database} measured this layer with {name} {have}, this is {own[:_SHOWN]}"
    return f"{database} has no measurement that fits all of the layer, the device and the tools"

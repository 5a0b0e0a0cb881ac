"""What `--weights` says: the dtype of the model, formats by kind of weight, or a size to choose formats for.

bf16 | f32                          the whole model in that dtype
int4                                the experts in that format, everything else as it is
experts=int4-g64,attention=int8     formats by kind: passes/quantise_weights.py has the kinds
model=f32,experts=int8              the dtype of everything else, and formats
auto:8GB   auto:3.0bits             formats for the experts, chosen so that all weights take at most 8 GB (10^9
                                    bytes; GiB is known too), or those of the experts 3.0 bits a value
"""

from __future__ import annotations

import dataclasses
import re

import torch

from moec.compiler.errors import CompileError
from moec.passes.ir.formats import FormatError, WeightFormat, parse_format
from moec.passes.quantise_weights import ROLES

MODEL_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
_BUDGET = re.compile(r"(\d+(?:\.\d+)?)(KB|MB|GB|TB|KiB|MiB|GiB|TiB|bits)")
_UNITS = {unit: factor for i, u in enumerate("KMGT", 1) for unit, factor in ((f"{u}B", 1e3**i), (f"{u}iB", 1024.0**i))}


@dataclasses.dataclass(frozen=True)
class WeightsOption:
    """dtype: of the model, None: the checkpoint's.  formats: (kind of weight, format), each kind once.

    budget_bytes: of all weights; budget_bits: of a value of the experts. At most one of them.
    by_layer: with a budget: one format for each layer.
    """

    dtype: torch.dtype | None = None
    formats: tuple[tuple[str, WeightFormat], ...] = ()
    budget_bytes: float | None = None
    budget_bits: float | None = None
    by_layer: bool = False

    @property
    def packed(self) -> str | None:
        """The name of the format that only kernels for one CPU read, where experts are to be stored in it."""
        return next((format.name for _, format in self.formats if format.is_packed), None)

    @property
    def is_auto(self) -> bool:
        """Whether formats are to be chosen, for a size that is given."""
        return self.budget_bytes is not None or self.budget_bits is not None


def parse_weights(text: str | None) -> WeightsOption:
    """Raises: CompileError: a value without a meaning."""
    if text is None:
        return WeightsOption()
    if text in MODEL_DTYPES:
        return WeightsOption(MODEL_DTYPES[text])
    option = WeightsOption()
    for piece in text.split(",") if "=" in text else [f"experts={text}"]:
        key, _, value = piece.strip().partition("=")
        option = _with(option, key, value, text)
    return option


def _with(option: WeightsOption, key: str, value: str, text: str) -> WeightsOption:
    """The option and one piece more."""
    if key == "model":
        if value not in MODEL_DTYPES:
            raise CompileError(f"weights={text!r}: model={value!r}; known: {', '.join(MODEL_DTYPES)}")
        return dataclasses.replace(option, dtype=MODEL_DTYPES[value])
    if key not in ROLES:
        raise CompileError(f"weights={text!r}: no weights are called {key!r}; known: model, {', '.join(ROLES)}")
    if key in dict(option.formats) or (key == "experts" and option.is_auto):
        raise CompileError(f"weights={text!r}: says twice what {key} are stored as; say it once")
    if value.startswith("auto"):
        return _budget(option, key, value, text)
    try:
        format = parse_format(value)
    except FormatError as error:
        raise CompileError(f"weights={text!r}: {error}; the dtypes of a whole model are f32 and bf16") from None
    if format.is_packed and key != "experts":
        raise CompileError(f"weights={text!r}: {value} is for experts; choose bf16, fp8 or int8 for {key}")
    return dataclasses.replace(option, formats=(*option.formats, (key, format)))


def _budget(option: WeightsOption, key: str, value: str, text: str) -> WeightsOption:
    kind, _, size = value.partition(":")
    found = _BUDGET.fullmatch(size)
    if key != "experts" or kind not in ("auto", "auto-layers") or found is None or not float(found[1]):
        raise CompileError(
            f"weights={text!r}: formats are chosen for experts by a size above 0: auto:8GB or auto:3.0bits"
        )
    option = dataclasses.replace(option, by_layer=kind == "auto-layers")
    if found[2] == "bits":
        return dataclasses.replace(option, budget_bits=float(found[1]))
    return dataclasses.replace(option, budget_bytes=float(found[1]) * _UNITS[found[2]])

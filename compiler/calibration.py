"""From the weights option to a plan; inputs on which formats are compared: a little text, or tokens drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moec.compiler.capture.captured import Captured
from moec.compiler.errors import CompileError
from moec.compiler.weights_option import WeightsOption
from moec.passes.quantise_weights import WeightPlan
from moec.passes.quantising.plan import SizeBudget
from moec.runtime.format import TOKENIZER

SEQUENCES, LENGTH = 4, 128

TEXT = """\
The harbour lies between two low hills. In the morning the boats come back with mackerel and herring, and the buyers
stand on the quay, counting boxes. "Nine crates," said the older man, "and not one more before Friday." By noon the
market is swept, and only the gulls are left.
Photosynthesis turns light, water and carbon dioxide into sugar and oxygen. The rate depends on temperature, on the
wavelength of the light, and on how much carbon dioxide reaches the leaf; above about 35 degrees most plants slow down.
def merge(left, right):
    result = []
    while left and right:
        result.append(left.pop(0) if left[0] <= right[0] else right.pop(0))
    return result + left + right
for (int i = 0; i < n; ++i) { sum += values[i] * weights[i]; }
SELECT name, COUNT(*) FROM orders WHERE total > 100.50 GROUP BY name ORDER BY 2 DESC;
Let f(x) = x^2 - 3x + 2. Then f(x) = (x - 1)(x - 2), so f(x) = 0 for x = 1 and x = 2, and f is least at x = 3/2.
1. Preheat the oven to 200 C. 2. Mix 250 g of flour, 2 eggs and 150 ml of milk. 3. Bake for 25 minutes.
The committee shall meet at least twice a year. Any member may propose an amendment in writing; it is adopted when two
thirds of the members present vote for it, and takes effect on the first day of the following month.
Der Zug nach Hamburg fährt um 14:05 Uhr von Gleis 7 ab. El tiempo mañana será soleado, con viento del norte.
Q: Why is the sky blue? A: Air scatters short wavelengths more than long ones, so blue light reaches us from all sides.
{"id": 4821, "user": {"name": "Mara", "tags": ["new", "trial"]}, "active": true, "score": 0.875}
Prices rose by 2.4 % in March, after 1.9 % in February. Analysts had expected 2.1 %. The central bank left its rate at
3.25 % and said that it would wait for the figures of the second quarter before it decides.
Once a fox found a mirror in the grass. He bowed, and the other fox bowed; he growled, and so did the other. At last he
turned it over, saw only wood, and went home wiser than he came.
"""


def weight_plan(option: WeightsOption, captured: Captured, example_inputs: Sequence[Any] | None = None) -> WeightPlan:
    """What the pass quantise-weights is asked for. Raises: CompileError: a module to measure without example inputs."""
    if not option.is_auto:
        return WeightPlan(dict(option.formats))
    inputs = calibration_inputs(captured, example_inputs)
    budget = SizeBudget(inputs, option.budget_bytes, option.budget_bits, option.by_layer)
    return WeightPlan(dict(option.formats), budget=budget)


def calibration_inputs(captured: Captured, example_inputs: Sequence[Any] | None) -> tuple[Any, ...]:
    """Inputs in placeholder order: four sequences of a language model in empty caches; of a module its example inputs.

    Raises: CompileError: a module without example inputs.
    """
    if captured.kind != "language_model":
        if example_inputs is None:
            raise CompileError("formats are chosen by running the module; give example_inputs to weights='auto:..'")
        return tuple(example_inputs)
    info = captured.info
    length = min(LENGTH, info.max_positions or LENGTH)
    ids = (
        _text_ids(captured)
        or torch.randint(info.vocab_size, (SEQUENCES * length,), generator=torch.Generator().manual_seed(0)).tolist()
    )
    ids = (ids * -(-SEQUENCES * length // len(ids)))[: SEQUENCES * length]
    positions = torch.arange(length).repeat(SEQUENCES)
    slots = torch.arange(SEQUENCES).repeat_interleave(length)
    caches = [torch.zeros(c.input_shape(SEQUENCES, length), dtype=c.dtype) for c in info.caches]
    return torch.tensor(ids), positions, slots, *caches


def _text_ids(captured: Captured) -> list[int]:
    """The text in the model's own tokens; empty where the model has no tokenizer, or nothing here reads it."""
    file = captured.info.directory and captured.info.directory / TOKENIZER
    if not file or not file.is_file():
        return []
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return []
    ids = Tokenizer.from_file(str(file)).encode(TEXT).ids
    return [i for i in ids if i < captured.info.vocab_size]

"""--weights: what each spelling means, and what has no meaning."""

from __future__ import annotations

import pytest
import torch

from moec.compiler.errors import CompileError
from moec.compiler.weights_option import parse_weights

pytestmark = pytest.mark.null


def formats(text: str) -> dict[str, str]:
    return {role: format.name for role, format in parse_weights(text).formats}


def test_spellings() -> None:
    assert parse_weights(None).dtype is None and not parse_weights(None).formats
    assert parse_weights("f32").dtype == torch.float32 and not formats("f32")
    assert formats("int4") == {"experts": "int4"}
    assert formats("experts=int4-g64, attention=int8") == {"experts": "int4-g64", "attention": "int8"}
    both = parse_weights("model=f32,experts=nf4")
    assert both.dtype == torch.float32 and dict(both.formats)["experts"].name == "nf4"


def test_budgets() -> None:
    assert parse_weights("auto:8GB").budget_bytes == 8e9
    assert parse_weights("auto:1.5GiB").budget_bytes == 1.5 * 2**30
    assert parse_weights("auto:3.0bits").budget_bits == 3.0
    assert parse_weights("model=f32,experts=auto:2bits,attention=int8").is_auto


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int5", "weight format 'int5' is unknown; known: f32, bf16"),
        ("router=int9", "weight format 'int9' is unknown"),
        ("heads=int8", "no weights are called 'heads'; known: model, experts"),
        ("experts=int8,experts=int4", "says twice what experts are stored as"),
        ("model=int8", "model='int8'; known: f32, bf16"),
        ("auto:0GB", "by a size above 0: auto:8GB or auto:3.0bits"),
        ("auto:many", "by a size above 0"),
        ("attention=bf16-packed", "bf16-packed is for experts; choose bf16, fp8 or int8 for attention"),
        ("attention=auto:3bits", "formats are chosen for experts"),
    ],
)
def test_what_has_no_meaning(text: str, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        parse_weights(text)

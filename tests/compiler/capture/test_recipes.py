"""Conversion operations as expressions, against the library's own code on the same tensors."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import core_model_loading as loading

from moec.compiler.capture import recipes
from moec.compiler.errors import CheckpointError, UnsupportedModel
from moec.passes.ir.weights import source

pytestmark = pytest.mark.null


def model_with(**tensors: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(
        state_dict=lambda: tensors, base_model_prefix="model", config=None, get_parameter=lambda name: tensors[name]
    )


def made_by(monkeypatch, converters, model, stored):
    """(ours, the library's) for every target."""
    monkeypatch.setattr(recipes, "get_model_conversion_mapping", lambda _: converters)
    listed = {n: source(n, tuple(t.shape), t.dtype) for n, t in stored.items()}
    ours = recipes.transformers_recipes(model, listed)
    theirs = {}
    for target, group in recipes._groups(model, listed, model.state_dict()).items():
        converter = copy.deepcopy(group.converter)
        for pattern, names in group.names.items():
            for name in names:
                converter.add_tensor(target, name, pattern, lambda n=name: stored[n])
        theirs |= converter.convert(target, model=model, config=None)
    return ours, {k: (v[0] if isinstance(v, list) else v) for k, v in theirs.items()}


CASES = {
    "merge and concatenate": (
        ["experts.*.w1", "experts.*.w3"],
        ["experts.gate_up"],
        [loading.MergeModulelist(dim=0), loading.Concatenate(dim=1)],
        {f"l.experts.{e}.w{w}": (4, 6) for e in range(3) for w in (1, 3)},
        {"l.experts.gate_up": (3, 8, 6)},
    ),
    "merge along 1": (
        ["experts.*.w1"],
        ["experts.up"],
        [loading.MergeModulelist(dim=1)],
        {f"l.experts.{e}.w1": (4, 6) for e in range(3)},
        {"l.experts.up": (4, 3, 6)},
    ),
    "transpose": (["a.w"], ["a.v"], [loading.Transpose(0, 1)], {"l.a.w": (4, 6)}, {"l.a.v": (6, 4)}),
    "transpose if needed": (
        ["a.w"],
        ["a.v"],
        [loading.Transpose(0, 1, check_dims=True)],
        {"l.a.w": (4, 6)},
        {"l.a.v": (4, 6)},
    ),
    "chunk": (
        ["a.qkv"],
        ["a.q", "a.k"],
        [loading.Chunk(dim=0)],
        {"l.a.qkv": (8, 6)},
        {"l.a.q": (4, 6), "l.a.k": (4, 6)},
    ),
    "split": (
        ["a.qkv"],
        ["a.q", "a.k"],
        [loading.Split(dim=0)],
        {"l.a.qkv": (8, 6)},
        {"l.a.q": (5, 6), "l.a.k": (3, 6)},
    ),
    "interleave": (["a.w"], ["a.v"], [loading.Interleave(dim=0)], {"l.a.w": (8, 6)}, {"l.a.v": (8, 6)}),
    "interleave back": (
        ["a.w"],
        ["a.v"],
        [loading.Interleave(dim=1, inverse=True)],
        {"l.a.w": (2, 8, 3)},
        {"l.a.v": (2, 8, 3)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_as_the_library_does(name, monkeypatch):
    sources, targets, operations, stored, wanted = CASES[name]
    tensors = {n: torch.randn(s) for n, s in stored.items()}
    model = model_with(**{n: torch.empty(s) for n, s in wanted.items()})
    ours, theirs = made_by(monkeypatch, [loading.WeightConverter(sources, targets, operations)], model, tensors)
    assert ours.keys() == theirs.keys() == wanted.keys()
    for target, weight in ours.items():
        assert weight.shape == wanted[target]
        assert torch.equal(weight.materialise(tensors.__getitem__), theirs[target])


def test_an_unknown_operation_is_refused_by_name(monkeypatch):
    class Rotate(loading.Transpose):
        pass

    converter = loading.WeightConverter(["a.w"], ["a.v"], [Rotate(0, 1)])
    with pytest.raises(UnsupportedModel, match="Rotate"):
        made_by(monkeypatch, [converter], model_with(**{"l.a.v": torch.empty(6, 4)}), {"l.a.w": torch.randn(4, 6)})


def test_a_gap_among_the_experts_is_named(monkeypatch):
    sources, targets, operations, stored, wanted = CASES["merge and concatenate"]
    tensors = {n: torch.randn(s) for n, s in stored.items() if n != "l.experts.1.w3"}
    model = model_with(**{n: torch.empty(s) for n, s in wanted.items()})
    with pytest.raises(CheckpointError, match=r"l\.experts\.1\.w3 is missing"):
        made_by(monkeypatch, [loading.WeightConverter(sources, targets, operations)], model, tensors)

"""Methods that are ours during a trace: put in, taken out, and every class that they are for exists."""

import pytest
from family_table import family_config
from torch import nn
from zoo import build

from moec.compiler.capture.activations import ACTIVATION
from moec.compiler.capture.own_methods import CLASSES, own_methods
from moec.compiler.errors import UnsupportedModel


@pytest.mark.null
def test_the_model_is_left_as_it_was():
    model = build(family_config("jetmoe"))
    before = [sorted(m.__dict__) for m in model.modules()]
    with own_methods(model):
        assert [sorted(m.__dict__) for m in model.modules()] != before
    assert [sorted(m.__dict__) for m in model.modules()] == before


@pytest.mark.null
def test_every_class_exists():
    """A class that the library renames would silently go to lifting instead."""
    for name in CLASSES:
        module, _, kind = name.rpartition(".")
        found = __import__(f"transformers.models.{module}", fromlist=[kind])
        methods = vars(getattr(found, kind))
        assert all(m in methods for m in CLASSES[name].methods), name


@pytest.mark.null
def test_an_unknown_activation_is_refused():
    model = build(family_config("dbrx"))
    model.transformer.blocks[1].ffn.experts.mlp.activation_fn = nn.Softplus()
    with pytest.raises(UnsupportedModel, match="Softplus"), own_methods(model):
        pass
    assert not any(ACTIVATION in m.__dict__ for m in model.modules())

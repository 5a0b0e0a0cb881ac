"""Routing classes: K different experts for every token, use as the class says, names that tell classes apart."""

import numpy as np
import pytest
import torch

from moec.compiler.tune.errors import TuneError
from moec.compiler.tune.routing import UNIFORM, Routing, preferred, read_trace, recorded, zipf
from moec.runtime.routing import LayerRouting, write_routing
from moec.runtime.routing import Routing as Recorded


@pytest.mark.parametrize("routing", [UNIFORM, zipf(1.0), recorded([[5, 0, 0, 9, 1, 2, 3, 4]], "trace-x")])
def test_every_token_takes_k_different_experts(routing):
    experts = routing.sample(200, 8, 3, seed=1)
    assert experts.shape == (200, 3) and experts.dtype == torch.int32
    assert all(len(set(row)) == 3 and min(row) >= 0 and max(row) < 8 for row in experts.tolist())
    assert torch.equal(experts, routing.sample(200, 8, 3, seed=1))
    assert not torch.equal(experts, routing.sample(200, 8, 3, seed=2))


def _shares(routing, seed=0):
    """Shares of the experts, largest first."""
    counts = torch.bincount(routing.sample(20000, 8, 1, seed).flatten().long(), minlength=8).double()
    return (counts / counts.sum()).sort(descending=True).values


def test_use_is_as_the_class_says():
    """Shares of 20,000 draws lie within 0.015 of the class's: four standard deviations of a share of a half."""
    ranks = torch.arange(1, 9).double()
    assert (_shares(UNIFORM) - 1 / 8).abs().max() < 0.015
    assert (_shares(zipf(1.0)) - (1 / ranks) / (1 / ranks).sum()).abs().max() < 0.015
    counts = torch.tensor([800, 400, 200, 100, 50, 25, 13, 12])
    assert (_shares(recorded([counts.tolist()], "t")) - counts / counts.sum()).abs().max() < 0.015


def test_a_draw_takes_one_of_the_trace_s_layers():
    one_sided, even = [1000, 0, 0, 0], [250, 250, 250, 250]
    routing = recorded([one_sided, even], "t")
    busiest = [torch.bincount(routing.sample(400, 4, 1, s).flatten().long(), minlength=4).max() for s in (0, 1)]
    assert busiest[0] > 390 and busiest[1] < 150


def test_names_and_what_cannot_be(tmp_path):
    assert (zipf(0).name, zipf(0.4).name, zipf(1).name) == ("uniform", "zipf-0.4", "zipf-1")
    assert Routing.from_json(recorded([[1, 2]], "trace-y").to_json()) == recorded([[1, 2]], "trace-y")
    with pytest.raises(TuneError, match="exponent is 0 or more"):
        zipf(-1)
    for counts in ([], [[0, 0]], [[1, -1]]):
        with pytest.raises(TuneError, match="no layer, or one without a token"):
            recorded(counts, "trace-z")
    with pytest.raises(TuneError, match="2 experts in a layer, the model 3"):
        recorded([[1, 2]], "t").sample(4, 3, 1, 0)


def test_a_recorded_file_is_read_under_its_name(tmp_path):
    layer = LayerRouting(0, 1, np.array([3, 5]), np.diag([3, 5]), ())
    run = Recorded("tiny", 8, (layer,))
    write_routing(run, tmp_path / "r.json")
    assert read_trace(tmp_path / "r.json") == Routing(run.name, counts=((3, 5),))


def test_a_trace_is_preferred_to_what_was_made_up():
    assert preferred(["uniform", "trace-1", "zipf-0.4", "trace-2"]) == "trace-2"
    assert preferred(["uniform", "zipf-0.4"]) == "zipf-0.4"
    assert preferred([]) is None

"""The Triton baseline in Triton's interpreter, where Triton is installed (`make gpu-machine`): no GPU is needed."""

import importlib
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.null
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it is imported
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
interpreted = pytest.mark.skipif(not INTERPRETS, reason="needs Triton, and TRITON_INTERPRET=1 from the start")
FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
BUILD = Path(__file__).parents[1] / "support" / "triton_build.py"


@pytest.fixture
def triton_moe(monkeypatch):
    """Its kernels run on the CPU."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("layer", "triton_moe"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("triton_moe")


def some_layer(make, tokens, held=5, shared=1):
    """What step_of reads of a Layer, in float32: the interpreter multiplies no bfloat16. held: of 5 routed experts."""
    shape = {"name": "t", "hidden": 128, "inner": 128, "num_experts": held, "num_shared": shared}
    shape |= {"top_k": 2, "dtype": "float32"}
    generator = torch.Generator().manual_seed(tokens)
    layer = types.SimpleNamespace(shape=shape, num_tokens=tokens, slots_per_token=2 + shared)
    layer.slots = tokens * layer.slots_per_token
    layer.x = torch.randn(tokens, 128, generator=generator)
    layer.experts = torch.rand(tokens, 5, generator=generator).argsort(1)[:, :2].int()
    layer.route_weights = torch.rand(tokens, 2, generator=generator)
    layer.weights = {
        "gate_up": torch.randn(held + shared, 256, 128, generator=generator) * 128**-0.5,
        "down": torch.randn(held + shared, 128, 128, generator=generator) * 128**-0.5,
    }
    for name in ("slot_experts_and_weights", "slots_of_experts"):
        setattr(layer, name, types.MethodType(getattr(make, name), layer))
    return layer


# float32 sums of up to 128 products; Triton's CPU dot has no tf32
TOLERANCE = 1e-5


@needs_triton
@interpreted
@pytest.mark.parametrize(("tokens", "held"), [(1, 5), (20, 5), (7, 3)])
def test_every_tile_gives_the_layer(triton_moe, tokens, held):
    import layer as module

    layer = some_layer(module.Layer, tokens, held)
    want = module.reference(layer)
    some = [*triton_moe.FEW, *triton_moe.MANY]
    tiles = [c for c in some if c.depth <= 128]
    assert len(tiles) == len(some) - 1
    for tile in tiles:
        assert module.relative_error(triton_moe.step_of(layer, tile)(), want) < TOLERANCE, tile
    layer.weights["down"] = layer.weights["down"].roll(1, 0)
    assert module.relative_error(triton_moe.step_of(layer, tiles[0])(), want) > 0.1


@needs_triton
@interpreted
def test_a_tile_that_does_not_fit_loses(triton_moe):
    import layer as module

    layer = some_layer(module.Layer, 4)

    def time_us(step):
        times.append(len(times))
        if len(times) == 1:
            raise triton_moe.OutOfResources(300_000, 232_448, "shared memory")
        return 5.0

    times = []
    step = triton_moe.tuned(layer, time_us)
    assert len(times) == 3 and module.relative_error(step(), module.reference(layer)) < TOLERANCE


@needs_triton
def test_every_tile_is_built_for_a_gpu():
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, str(BUILD)], capture_output=True, text=True, env=plain)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 16 and not [line for line in lines if not line.endswith("right")]

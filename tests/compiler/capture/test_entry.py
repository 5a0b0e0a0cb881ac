import pytest
from zoo import TINY

from moec.compiler.capture import capture
from moec.compiler.errors import CheckpointError, CompileError

pytestmark = pytest.mark.null


def test_a_factory():
    captured = capture("zoo_factory:mixtral")
    assert captured.info.model_type == "mixtral"
    assert captured.info.model_type in TINY


@pytest.mark.parametrize("name", ["no_such_package.here:factory", "zoo_factory:nothing", "torch:"])
def test_a_factory_that_is_not_there(name):
    with pytest.raises(CompileError, match=r"package\.module:factory"):
        capture(name)


def test_a_name_that_is_no_directory():
    with pytest.raises(CheckpointError, match="no such directory"):
        capture("mistralai/Mixtral-8x7B-v0.1")

"""One small engine for all runtime tests: tiny Mixtral, made once per test process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import moec
from moec.runtime.engine import Engine


@pytest.fixture(scope="session")
def model() -> torch.nn.Module:
    from zoo import build, tiny  # transformers, which only these fixtures need: `make gpu-machine` has none

    return build(tiny("mixtral"))


@pytest.fixture(scope="session")
def engine_path(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine directory that tests read and never change."""
    path = tmp_path_factory.mktemp("engines") / "mixtral.engine"
    moec.compile(model, verify="off", output=path)
    return path


@pytest.fixture(scope="session")
def engine(engine_path: Path) -> Engine:
    return moec.load(engine_path)


@pytest.fixture
def copied(engine_path: Path, tmp_path: Path) -> Path:
    """A copy of the engine directory that a test may damage."""
    return Path(shutil.copytree(engine_path, tmp_path / "copy.engine"))

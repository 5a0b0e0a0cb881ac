"""Kernel libraries built once per session."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

from moec.compiler.codegen.llvm import build_library
from moec.runtime.launch.cpu import load_library
from moec.runtime.launch.cpu_features import LEVELS, missing_features

# the narrow vectors, and the widest that this machine has: the levels between differ in no code path of their own
_PRESENT = [level for level in LEVELS if not missing_features(level) and level != "amx_bf16"]


@pytest.fixture(params=sorted({_PRESENT[0], _PRESENT[-1]}) if _PRESENT else ["none"])
def level(request: pytest.FixtureRequest) -> str:
    """An instruction-set level that the processor has."""
    if request.param == "none":
        pytest.skip("the processor has none of the levels that kernels are built for")
    return str(request.param)


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mapping[str, Any], str], Any]:
    """(functions, level) -> loaded library; equal requests are answered from the session's cache."""
    cache_dir = tmp_path_factory.mktemp("kernels")

    def make(functions: Mapping[str, Any], level: str) -> Any:
        built = build_library(functions, level, cache_dir)
        return load_library(built.path, built.level)

    return make


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread unless a test asks for more: on a busy machine threads wait for each other by spinning."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

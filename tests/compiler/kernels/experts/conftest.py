"""Built experts kernels, shared by the tests of this folder."""

import functools

import pytest
from experts_layer import Layer, random_weights

from moec.compiler.codegen.llvm import build_library
from moec.compiler.kernels.experts import call
from moec.compiler.kernels.spec import ExpertsProblem
from moec.runtime.launch.cpu import load_library


@pytest.fixture(scope="session")
def make_layer(tmp_path_factory):
    """(kernel, problem) -> Layer, built once per session; skips where the processor cannot run the kernel."""
    cache_dir = tmp_path_factory.mktemp("experts")

    @functools.cache
    def make(kernel, problem: ExpertsProblem) -> Layer:
        if reason := kernel.spec().refusal(problem):
            pytest.skip(reason)
        built = build_library(kernel.build(problem), kernel.level, cache_dir)
        tensors = random_weights(problem)
        library = load_library(built.path, built.level)
        return Layer(kernel.level, problem, kernel, library, tensors, call.pack(problem, **tensors))

    return make

"""moec: a compiler for Mixture-of-Experts models.

    engine = moec.compile(model)         a model to an engine            (needs the compiler extra)
    moec.compile_to(model, "x.engine")   the same, written and not loaded
    engine = moec.load("x.engine")       an engine from its directory    (torch and tvm-ffi alone)
    moec.compile_ranks(model, "x.engine", moec.RankOptions(devices=8))   an engine for several ranks
    captured = moec.capture(model)       a model as one graph            (needs the compiler extra)
    plan = moec.plan(model, mesh=..)     how to spread it over devices   (needs the placement extra)
    moec.rebalance(engine)               new token shares for the copied experts of a placed engine that runs
    moec.tune(model, db="tuning.db")     the kernels' configurations     (needs the compiler extra)
    moec.export_onnx(model, "x.onnx")    an ONNX file                    (needs the onnx extra)

Names are imported at first use, so that loading and running an engine never imports the compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moec.compiler.api import compile_model as compile
    from moec.compiler.api import compile_to
    from moec.compiler.capture import capture
    from moec.compiler.export.onnx.api import export_onnx
    from moec.compiler.plan.api import plan
    from moec.compiler.plan.rebalance import rebalance
    from moec.compiler.ranks import RankOptions, compile_ranks
    from moec.compiler.tune.api import tune
    from moec.runtime.engine import Engine, load

_HOMES = {
    "Engine": ("moec.runtime.engine", "Engine"),
    "capture": ("moec.compiler.capture", "capture"),
    "compile": ("moec.compiler.api", "compile_model"),
    "compile_to": ("moec.compiler.api", "compile_to"),
    "compile_ranks": ("moec.compiler.ranks", "compile_ranks"),
    "RankOptions": ("moec.compiler.ranks", "RankOptions"),
    "export_onnx": ("moec.compiler.export.onnx.api", "export_onnx"),
    "plan": ("moec.compiler.plan.api", "plan"),
    "rebalance": ("moec.compiler.plan.rebalance", "rebalance"),
    "load": ("moec.runtime.engine", "load"),
    "tune": ("moec.compiler.tune.api", "tune"),
}

__all__ = [
    "Engine",
    "RankOptions",
    "capture",
    "compile",
    "compile_ranks",
    "compile_to",
    "export_onnx",
    "load",
    "plan",
    "rebalance",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moec' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)

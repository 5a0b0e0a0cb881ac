"""torch.compile(model, backend="moec"): Dynamo's graphs through the pipeline, run in this process. See backend.py."""

from moec.compiler.dynamo.backend import Record, backend

__all__ = ["Record", "backend"]

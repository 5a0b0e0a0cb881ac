"""Writes a model file and its external data: weights are made one at a time; all files appear, or none.

FILE            the graph           FILE.data     the weights, each at an offset that can be mapped
FILE.json       what was checked: coverage of the experts, comparison with the captured graph
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moec.compiler.export.onnx.codes import CodedPart
from moec.compiler.export.onnx.errors import ExportError
from moec.compiler.export.weights_file import making
from moec.compiler.lowering.packing import make
from moec.passes.ir.weights import Read, Weight
from moec.runtime.format import rename_new

Progress = Callable[[str, int, int], None]
INLINE_BYTES = 1024
"""Tensors below this size stand in the model file: shape inference reads them there."""
PAGE_BYTES, ALIGNED_BYTES = 4096, 1 << 16
"""Tensors above the second lie at multiples of the first, so that they can be mapped."""


def data_name(output: Path) -> str:
    """The file of a model's external data, beside it."""
    return f"{output.name}.data"


def record_name(output: Path) -> str:
    """The file that says what was checked, beside the model."""
    return f"{output.name}.json"


def check_output(output: Path) -> Path:
    """The canonical path of a file to write.

    Raises: ExportError: it, its data or its record exist (as links, too), or its folder does not.
    """
    folder = Path(os.path.realpath(output.parent))
    if not folder.is_dir():
        raise ExportError(f"{output}: the folder {output.parent} does not exist; make it first")
    target = folder / output.name
    for path in (target, target.with_name(data_name(target)), target.with_name(record_name(target))):
        if os.path.lexists(path):
            raise ExportError(f"{path}: exists and is kept as it is; remove it or choose another output file")
    return target


@contextmanager
def publishing(output: Path) -> Iterator[Path]:
    """A private folder in which files are written under their final names; on success all are moved to `output`'s.

    The model file goes last: where it stands, its data stands. Whatever fails, nothing is left.
    Raises: ExportError: a file appeared meanwhile, is no plain file of its own, or the disk is full or read-only.
    """
    output = check_output(output)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise ExportError(f"{output}: {error.strerror}; choose a folder that can be written") from error
    moved: list[Path] = []
    try:
        yield folder
        for path in sorted(folder.iterdir(), key=lambda p: p.name == output.name):
            _flush(path)
            target = output.with_name(path.name)
            rename_new(path, target)
            moved.append(target)
    except BaseException as error:
        for path in moved:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ExportError(f"{output}: {error.strerror or error}; nothing was written there") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _flush(path: Path) -> None:
    """To the disk. Raises: ExportError: it is a link, or has a second name."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        if os.fstat(handle).st_nlink != 1:
            raise ExportError(f"{path}: has another name (a hard link); its content would not be this model's own")
        os.fsync(handle)
    finally:
        os.close(handle)


def write_model(
    model: Any, path: Path, recipes: Mapping[str, Weight | CodedPart], read: Read, progress: Progress
) -> None:
    """Gives every initialiser its lazy values and writes `path` and its external data.

    Raises: CheckpointError: a weight cannot be made.
    """
    import onnx_ir as ir

    done = 0
    for name, value in model.graph.initializers.items():
        if name in recipes:
            value.const_value = _lazy(name, recipes[name], read)
    total = sum(v.const_value.nbytes for v in model.graph.initializers.values())

    def written(tensor: Any, _: Any) -> None:
        nonlocal done
        done += tensor.nbytes
        progress("weights", done, total)

    ir.save(
        model,
        path,
        external_data=data_name(path),
        size_threshold_bytes=INLINE_BYTES,
        callback=written,
        alignment=PAGE_BYTES,
        align_threshold=ALIGNED_BYTES,
    )


def _lazy(name: str, weight: Weight | CodedPart, read: Read) -> Any:
    """A tensor that is made when it is written, and not kept."""
    import onnx_ir as ir

    dtype = ir.DataType.from_numpy(as_numpy(torch.empty(0, dtype=weight.dtype)).dtype)

    def made() -> Any:
        with making(name, weight):
            tensor = weight.make(read) if isinstance(weight, CodedPart) else make(weight, read)
        return ir.Tensor(as_numpy(tensor.detach().contiguous()), dtype=dtype, name=name)

    return ir.LazyTensor(made, dtype=dtype, shape=ir.Shape(weight.shape), name=name, cache=False)


def as_numpy(tensor: Tensor) -> np.ndarray:
    """Without a copy, bfloat16 as ml_dtypes has it."""
    if tensor.dtype is torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()

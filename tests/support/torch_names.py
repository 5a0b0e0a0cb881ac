"""The public names of this Python's torch, one a line: two versions' lists say what the newer one has more.

python3.12 tests/support/torch_names.py > older; python tests/support/torch_names.py > newer; comm -13 older newer
"""

import warnings

import torch
import torch.distributed

HOMES = (
    "torch", "torch.Tensor", "torch.nn.functional", "torch.cuda", "torch.cuda.CUDAGraph", "torch.cuda.Event",
    "torch.cuda.Stream", "torch.distributed", "torch.distributed.ProcessGroup", "torch.UntypedStorage", "torch.dtype",
    "torch.Generator", "torch.device", "torch.Size", "torch.backends", "torch.library", "torch.version", "torch.linalg",
)  # fmt: skip


def names():
    """Dotted names without those that begin with an underscore."""
    for home in HOMES:
        where = torch
        for part in home.split(".")[1:]:
            where = getattr(where, part)
        yield from (f"{home}.{name}" for name in dir(where) if not name.startswith("_"))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print("\n".join(sorted(names())))

"""What a program is lowered for: where tensors live, which sites have kernels, which library functions run there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import fx

from moec.compiler.codegen.cuda_archs import Architecture
from moec.compiler.lowering.candidates import Site
from moec.compiler.lowering.select import site_of
from moec.runtime.launch.library import LIBRARY, ON_DEVICE


@dataclasses.dataclass(frozen=True)
class Target:
    """device: of the program's tensors, "cpu" or "cuda".  name: for messages.  site_of: node -> its site, if it is one.

    library: the functions of the runtime's library that run on the device.
    """

    device: str
    name: str
    site_of: Callable[[fx.Node], Site | None]
    library: frozenset[str]

    def lacks(self, namespace: str) -> str:
        """What to say of an operator that no step does. namespace: "moec", "aten" or another."""
        if namespace == "moec" and self.device != "cpu":
            return f"has no step for {self.name} yet; compile for the CPU"
        return "is not on the runtime's list of operators (runtime/launch/aten.py)"


def cpu_target(level: str | None) -> Target:
    """The processor, with kernels up to an instruction-set level; None: library functions alone."""
    return Target("cpu", "cpu", lambda node: site_of(node, level), frozenset(LIBRARY))


def cuda_target(arch: Architecture, fast_combine: bool = False) -> Target:
    """A GPU of an architecture; its bindings import TVM, those of the CPU need not.

    fast_combine: experts may be summed by atomics, whose last bits differ from run to run.
    """
    from moec.compiler.lowering.cuda.select import site_of as cuda_site_of

    return Target("cuda", f"cuda:{arch.name}", lambda node: cuda_site_of(node, arch, fast_combine), ON_DEVICE)

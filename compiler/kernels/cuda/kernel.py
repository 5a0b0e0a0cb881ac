"""A CUDA kernel as the catalogue lists it: how to make it, and what its machine code must be like."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from moec.compiler.codegen.cubin import cubin_facts, find_disassembler, instructions
from moec.compiler.codegen.cuda import BuiltCubin, CudaSource, TensorBox, lower
from moec.compiler.codegen.cuda_archs import architecture


@dataclasses.dataclass(frozen=True)
class CudaKernel:
    """name: of the device function.  build: -> TIRx function.  boxes: its tensor maps.

    tensor: the tensor core instruction that must be in it, None for kernels without.  blocks_per_sm: how many blocks
    must fit on a multiprocessor; what the choice of tile relies on.  cooperative: blocks wait for each other: at most
    blocks_per_sm times the multiprocessors may be launched, and as a cooperative launch.
    """

    name: str
    arch: str
    build: Callable[[], Any]
    boxes: Mapping[str, TensorBox] = dataclasses.field(default_factory=dict)
    tensor: str | None = None
    blocks_per_sm: int = 1
    cooperative: bool = False

    def source(self) -> CudaSource:
        """The kernel in CUDA C++. Raises: SharedMemoryError."""
        source = lower(self.name, self.build(), self.arch, self.boxes)
        return dataclasses.replace(source, cooperative=self.cooperative, blocks_per_sm=self.blocks_per_sm)

    def faults(self, built: BuiltCubin) -> list[str]:
        """What is wrong with the machine code, in words: spills, occupancy below the stated one, the wrong instruction.

        Instructions are looked at only where there is an nvdisasm.
        """
        facts, source = cubin_facts(built.path), built.source
        what, found = f"{self.name} for {self.arch}", []
        if facts.stack_bytes:
            found.append(f"{what}: {facts.stack_bytes} bytes of each thread's registers lie in local memory")
        arch = architecture(self.arch)
        fit = arch.blocks_per_sm(source.threads, facts.registers, source.shared_bytes)
        if fit < self.blocks_per_sm:
            found.append(
                f"{what}: {fit} blocks fit on a multiprocessor, expected {self.blocks_per_sm} "
                f"({facts.registers} registers, {source.shared_bytes} bytes of shared memory, {source.threads} threads)"
            )
        if find_disassembler() is None:
            return found
        counts = instructions(built.path)
        if self.tensor and not counts[self.tensor]:
            found.append(f"{what}: no {self.tensor} in its machine code")
        if local := counts["LDL"] + counts["STL"]:
            found.append(f"{what}: {local} accesses to local memory")
        return found

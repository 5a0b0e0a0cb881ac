"""The GPU architectures that kernels are built for, and what one multiprocessor of each holds.

Source: CUDA C++ Programming Guide 13.0, "Technical Specifications per Compute Capability".
"""

from __future__ import annotations

import dataclasses

from moec.compiler.errors import CompileError


class ArchitectureError(CompileError):
    """A GPU architecture that moec does not build for."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """name: as nvcc takes it. block_shared_bytes: what one block may ask for. sm_*: of one multiprocessor.

    tensor: the tensor instruction of the large kernels, "mma" (mma.sync) or "wgmma".  fp8_mma: mma.sync takes e4m3
    natively (sm_90a and sm_100a emulate it in 256 HMMA, so it is not used there).
    """

    name: str
    block_shared_bytes: int
    sm_shared_bytes: int
    sm_threads: int
    tensor: str
    fp8_mma: bool
    sm_registers: int = 65536

    @property
    def multiplies_e4m3(self) -> bool:
        """Whether a tensor instruction that kernels use takes e4m3 on both sides."""
        return self.fp8_mma or self.tensor == "wgmma"

    @property
    def converts_e4m3(self) -> bool:
        """Whether it has an instruction that rounds to e4m3."""
        return int(self.name.removeprefix("sm_").rstrip("a")) >= 89

    def blocks_per_sm(self, threads: int, registers: int, shared_bytes: int) -> int:
        """How many blocks fit on one multiprocessor: registers go out to warps by 256, shared memory by 128 + 1 KiB."""
        warps = -(-threads // 32)
        by_registers = self.sm_registers // (warps * (-(-registers * 32 // 256) * 256))
        by_shared = self.sm_shared_bytes // (-(-shared_bytes // 128) * 128 + 1024)
        return min(by_registers, by_shared, self.sm_threads // threads, 32)


ARCHITECTURES: dict[str, Architecture] = {
    a.name: a
    for a in (
        Architecture("sm_80", 166912, 167936, 2048, "mma", fp8_mma=False),
        Architecture("sm_89", 101376, 102400, 1536, "mma", fp8_mma=True),
        Architecture("sm_90a", 232448, 233472, 2048, "wgmma", fp8_mma=False),
        Architecture("sm_100a", 232448, 233472, 2048, "mma", fp8_mma=False),
        Architecture("sm_120a", 101376, 102400, 1536, "mma", fp8_mma=True),
    )
}


def architecture(name: str) -> Architecture:
    """The architecture of a name such as "sm_90a". Raises: ArchitectureError: not one of ARCHITECTURES."""
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ArchitectureError(f"GPU architecture {name!r} is not supported, expected one of {known}")
    return ARCHITECTURES[name]

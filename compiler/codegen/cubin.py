"""Reads cubins: registers, stack and machine code, to check kernels that no GPU has run yet."""

from __future__ import annotations

import collections
import dataclasses
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from moec.compiler.codegen.cuda_toolchain import package_folder
from moec.compiler.codegen.llvm import ToolchainError

_REGISTERS, _FRAME = 0x2F, 0x11  # EIATTR_REGCOUNT, EIATTR_FRAME_SIZE: (symbol, value)
_WITH_PAYLOAD = 4  # the format of an attribute that is followed by its bytes


@dataclasses.dataclass(frozen=True)
class CubinFacts:
    """Of one kernel: registers of a thread, bytes of its stack in local memory."""

    registers: int
    stack_bytes: int


def cubin_facts(path: Path) -> CubinFacts:
    """What the assembler decided. Raises: ToolchainError: not a cubin of one kernel."""
    registers, frames = [0], [0]
    for attribute, payload in _attributes(_section(path, ".nv.info")):
        if attribute in (_REGISTERS, _FRAME):
            (registers if attribute == _REGISTERS else frames).append(struct.unpack("<II", payload)[1])
    if max(registers) == 0:
        raise ToolchainError(f"{path.name}: a cubin that names no registers; it holds no kernel")
    return CubinFacts(max(registers), max(frames))


def _section(path: Path, name: str) -> bytes:
    """The bytes of a section of a 64-bit ELF file; empty where there is none."""
    data = path.read_bytes()
    if data[:5] != b"\x7fELF\x02":
        raise ToolchainError(f"{path.name}: not a cubin (no 64-bit ELF file)")
    (table,) = struct.unpack_from("<Q", data, 0x28)
    width, count, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * width) for i in range(count)]
    strings = headers[names][4]
    for name_at, _, _, _, offset, size in headers:
        end = data.index(b"\0", strings + name_at)
        if data[strings + name_at : end] == name.encode():
            return data[offset : offset + size]
    return b""


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        kind, attribute, size = struct.unpack_from("<BBH", data, at)
        at += 4
        if kind == _WITH_PAYLOAD:
            yield attribute, data[at : at + size]
            at += size


def find_disassembler() -> Path | None:
    """nvdisasm, of the package index or on PATH."""
    folder = package_folder()
    packaged = folder / "bin" / "nvdisasm" if folder else None
    found = shutil.which("nvdisasm")
    return packaged if packaged and packaged.is_file() else Path(found) if found else None


def instructions(path: Path) -> collections.Counter[str]:
    """How often each machine instruction occurs, by the first part of its name ("HMMA", "LDG").

    Raises: ToolchainError: no nvdisasm, or it failed.
    """
    program = find_disassembler()
    if program is None:
        raise ToolchainError('no nvdisasm found: `pip install "moec[cuda]"`, or put the CUDA toolkit on PATH')
    result = subprocess.run([str(program), "-c", str(path)], capture_output=True, text=True)
    if result.returncode:
        raise ToolchainError(f"nvdisasm refused {path.name}: {(result.stderr.strip() or 'no message').splitlines()[0]}")
    # "        /*0040*/              @!P0 HMMA.16816.F32 R4, R8, ..;"
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)", result.stdout)
    return collections.Counter(found)

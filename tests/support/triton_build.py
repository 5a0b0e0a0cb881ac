"""Builds every tile of benchmarks/gpu/triton_moe.py for sm_90 in bf16, by Triton's own assembler; no GPU is needed.

PYTHONPATH=src python tests/support/triton_build.py        # a line for each: shared memory, what is wrong with it
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "gpu"))
import triton
import triton_moe
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BF16, F32, I32, CONST = "*bf16", "*fp32", "*i32", "constexpr"
MAPS = dict.fromkeys(("order", "tile_expert", "tile_row", "ends"), I32)
SIZES = dict.fromkeys(("slots_per_token", "width", "depth"), "i32")
TILE = dict.fromkeys(("GATE_UP", "ROWS", "COLUMNS", "DEPTH"), CONST)
SIGNATURE = dict.fromkeys("xwy", BF16) | MAPS | {"weights": F32} | SIZES | TILE
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_BYTES = 232448  # that a block may have on sm_90


def built(gate_up, tile):
    """The kernel with a tile. Pointers and widths divide 16, as those of run.py do."""
    sizes = {"GATE_UP": gate_up, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    even = [i for i, (n, kind) in enumerate(SIGNATURE.items()) if kind[0] == "*" or n in ("width", "depth")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in even}
    source = ASTSource(triton_moe._gemm, SIGNATURE, constexprs=sizes, attrs=attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def stack_bytes(cubin):
    """Local memory of each thread, as the disassembler of Triton's own package says."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return max(int(n) for n in re.findall(r"STACK:(\d+)", told))


def fault(made, few):
    """What is wrong with a built kernel, or "right"."""
    wanted = "mma.sync" if few else "wgmma.mma_async"
    if made.metadata.shared > SHARED_BYTES:
        return "too much shared memory"
    if stack := stack_bytes(made.asm["cubin"]):
        return f"{stack} bytes of registers in local memory"
    return "right" if wanted in made.asm["ptx"] else f"no {wanted}"


if __name__ == "__main__":
    for few, tiles in triton_moe.CONFIGS.items():
        for tile in tiles:
            for gate_up in (True, False):
                made, name = built(gate_up, tile), "gate_up" if gate_up else "down"
                print(f"{name} {tile}: {made.metadata.shared} bytes shared, {fault(made, few)}")

"""The layer shapes that the CUDA kernels are checked and measured for, one rank's share of eight among them."""

from moec.compiler.kernels.cuda.layer import LayerShape
from moec.passes.ir.gate import GateSpec

MIXTRAL = GateSpec(2, renormalise=True).encode()
SHAPES = {
    s.name: s
    for s in (
        LayerShape("mixtral-8x7b", 4096, 14336, 8, 2, MIXTRAL),
        LayerShape("mixtral-8x7b/8", 4096, 1792, 8, 2, MIXTRAL),
        LayerShape("deepseek-moe-16b", 2048, 1408, 64, 6, GateSpec(6).encode(), 2),
        LayerShape("qwen3-30b-a3b", 2048, 768, 128, 8, GateSpec(8, renormalise=True).encode()),
        LayerShape("skywork-moe", 4608, 12288, 16, 2, GateSpec(2, transform="std", renormalise=True).encode()),
        LayerShape("mixtral-8x7b-fp8", 4096, 14336, 8, 2, MIXTRAL, dtype="float8_e4m3fn"),
        LayerShape("mixtral-8x7b-int4", 4096, 14336, 8, 2, MIXTRAL, dtype="int4-g128"),
        LayerShape("deepseek-moe-16b-int8", 2048, 1408, 64, 6, GateSpec(6).encode(), 2, dtype="int8"),
    )
}

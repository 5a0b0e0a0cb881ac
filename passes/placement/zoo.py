"""The nine zoo models at full size, from their released configurations or papers.

Sources: Skywork-MoE-Base config.json and technical report table 2; XVERSE-MoE config.json; DeepSeekMoE paper sections
5.1.2 and 7 (145B: widths that the paper implies, its configuration was not released); APUS-xDAN-4.0 config.json (not
the press text, which describes Mixtral's shape); Mixtral config.json; xai-org/grok-1 run.py.
"""

from __future__ import annotations

from moec.passes.placement.model_shape import Attention, DenseFfn, LayerClass, ModelShape, MoeFfn


def _uniform(
    name: str, layers: int, hidden: int, vocab: int, attention: Attention, moe: MoeFfn, positions: int
) -> ModelShape:
    return ModelShape(name, hidden, vocab, (LayerClass(layers, attention, moe=moe),), max_positions=positions)


def _first_dense(name: str, layers: int, hidden: int, attention: Attention, dense: int, moe: MoeFfn) -> ModelShape:
    classes = (LayerClass(1, attention, dense=DenseFfn(dense)), LayerClass(layers - 1, attention, moe=moe))
    return ModelShape(name, hidden, 102400, classes, max_positions=4096)


ZOO: tuple[ModelShape, ...] = (
    _uniform("skywork-moe", 52, 4608, 65532, Attention(36, 36, 128), MoeFfn(16, 2, 12288), 8192),
    _uniform("apus-xdan-4.0", 60, 7168, 64000, Attention(56, 8, 128), MoeFfn(4, 2, 20480), 32768),
    _first_dense("deepseek-moe-16b", 28, 2048, Attention(16, 16, 128), 10944, MoeFfn(64, 6, 1408, 2 * 1408)),
    _first_dense("deepseek-moe-145b", 62, 4096, Attention(32, 32, 128), 4 * 5632, MoeFfn(128, 12, 1408, 4 * 1408)),
    _uniform("xverse-moe-a4.2b", 28, 2560, 100534, Attention(32, 32, 80), MoeFfn(64, 6, 1728, 2 * 1728), 8192),
    _uniform("xverse-moe-a36b", 50, 6144, 100534, Attention(48, 16, 128), MoeFfn(64, 6, 4096, 2 * 4096), 8192),
    _uniform("mixtral-8x7b", 32, 4096, 32000, Attention(32, 8, 128), MoeFfn(8, 2, 14336), 32768),
    _uniform("mixtral-8x22b", 56, 6144, 32768, Attention(48, 8, 128), MoeFfn(8, 2, 16384), 65536),
    ModelShape(
        "grok-1",
        6144,
        131072,
        (LayerClass(64, Attention(48, 8, 128), moe=MoeFfn(8, 2, 32768), num_norms=4),),
        tied_embeddings=True,
        max_positions=8192,
    ),
)


def zoo_shape(name: str) -> ModelShape | None:
    """The zoo model called `name`, or None."""
    return next((shape for shape in ZOO if shape.name == name), None)

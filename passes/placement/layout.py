"""A layout: every share of one replica as integers, and the memory that follows from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from moec.passes.hardware.mesh import Mesh
from moec.passes.placement.model_shape import ModelShape
from moec.passes.placement.strategy import Strategy
from moec.passes.placement.units import Units, attention_units, ffn_units, replicated_bytes, vocab_row_bytes
from moec.passes.placement.weight_format import WeightFormat

CONTEXT_BYTES = int(1.0e9)
"""Driver context, NCCL buffers and allocator slack of one device (1.0 GB: the figure that the Skywork memory study
used)."""
MEMORY_UTILISATION = 0.95
"""The part of a device's memory that an engine may use: gpu_memory_utilization of Skywork's published command."""


@dataclass(frozen=True)
class Problem:
    """What is to be placed: one replica of a model in one weight format on a mesh of equal role.

    Args:
        kv_bytes: bytes of one cached value.
        activation_tokens: tokens of the largest step, which sizes the activation reserve.
    """

    shape: ModelShape
    mesh: Mesh
    weights: WeightFormat
    kv_bytes: float = 2.0
    activation_tokens: int = 8192

    @cached_property
    def layer_class_index(self) -> np.ndarray:
        """i64[L]: which layer class each layer belongs to."""
        return np.repeat(np.arange(len(self.shape.layers)), [c.count for c in self.shape.layers])

    def attention(self, class_idx: int, num_ranks: int) -> Units:
        """How the attention of a layer class is cut for so many ranks."""
        return attention_units(self.shape, self.shape.layers[class_idx].attention, self.weights, num_ranks)

    def dense(self, class_idx: int) -> Units | None:
        """The dense FFN or the shared experts of a class; None where it has neither."""
        c = self.shape.layers[class_idx]
        if c.dense is not None:
            return ffn_units(self.shape, c.dense.width, c.dense.matrices, self.weights)
        if c.moe is not None and c.moe.shared_width:
            return ffn_units(self.shape, c.moe.shared_width, c.moe.matrices, self.weights)
        return None

    def expert(self, class_idx: int) -> Units | None:
        """One routed expert of a class; None for a dense class."""
        m = self.shape.layers[class_idx].moe
        return ffn_units(self.shape, m.width, m.matrices, self.weights, m.expert_bias_params) if m else None

    def usable_bytes(self) -> np.ndarray:
        """f64[R]: bytes of each device left for weights and cache after context and activations."""
        return np.array([d.memory_bytes * MEMORY_UTILISATION - self.reserved_bytes() for d in self.mesh.devices])

    def reserved_bytes(self) -> int:
        """Bytes kept free on every device: context, and six bf16 activations of the largest step."""
        return CONTEXT_BYTES + 6 * 2 * self.shape.hidden * self.activation_tokens


@dataclass(frozen=True)
class Layout:
    """The shares of one replica; L layers, R ranks, M MoE layers, E experts, G expert groups of a stage.

    Args:
        cuts: stage boundaries in layers.
        attention, dense: i64[L, R] units; every lane of a stage holds a whole copy.
        expert_blocks: i64[L, R] blocks of each resident expert.
        resident: bool[L, E, G]; all False in dense layers.
        token_share: f64[L, E, G], the part of an expert's tokens that a group serves; sums to 1 over G.
        embedding, head: i64[R] vocabulary rows.
    """

    problem: Problem
    strategy: Strategy
    cuts: tuple[int, ...]
    attention: np.ndarray
    dense: np.ndarray
    expert_blocks: np.ndarray
    resident: np.ndarray
    token_share: np.ndarray
    embedding: np.ndarray
    head: np.ndarray
    note: str = field(default="")

    @cached_property
    def stage_of_layer(self) -> np.ndarray:
        """i64[L]: the pipeline stage of each layer."""
        return np.repeat(np.arange(self.strategy.stages), np.diff(self.cuts))

    def in_stage(self) -> np.ndarray:
        """bool[L, R]: whether a rank belongs to the layer's stage."""
        rank_stage = np.arange(self.attention.shape[1]) // self.strategy.stage_ranks
        return self.stage_of_layer[:, None] == rank_stage[None, :]

    def group_of_rank(self) -> np.ndarray:
        """i64[R]: the expert group of each rank within its stage."""
        return np.arange(self.attention.shape[1]) % self.strategy.stage_ranks // self.strategy.expert_tp

    def weight_bytes(self) -> np.ndarray:
        """f64[R]: stored weight bytes of each rank."""
        p, total = self.problem, np.zeros(self.attention.shape[1])
        group = self.group_of_rank()
        for layer, class_idx in enumerate(p.layer_class_index):
            total += _part_bytes(self.attention[layer], p.attention(class_idx, self.strategy.attention_tp))
            total += self.in_stage()[layer] * replicated_bytes(p.shape, layer)
            dense, expert = p.dense(class_idx), p.expert(class_idx)
            if dense is not None:
                total += _part_bytes(self.dense[layer], dense)
            if expert is not None:
                total += self.resident[layer].sum(axis=0)[group] * _part_bytes(self.expert_blocks[layer], expert)
        tied = p.shape.tied_embeddings and self.strategy.stages == 1
        rows = self.embedding + (0 if tied else self.head)
        return total + rows * vocab_row_bytes(p.shape)

    def kv_bytes_per_token(self) -> np.ndarray:
        """f64[R]: cache bytes that one token of a rank's lane costs it."""
        p, total = self.problem, np.zeros(self.attention.shape[1])
        for layer, class_idx in enumerate(p.layer_class_index):
            units = p.attention(class_idx, self.strategy.attention_tp)
            held = self.attention[layer]
            total += (held * units.kv_per_unit + (held > 0) * units.kv_fixed) * p.kv_bytes
        return total

    def kv_tokens(self) -> int:
        """Tokens that fit in the caches of all lanes of the replica; negative where the weights do not fit."""
        free = self.problem.usable_bytes() - self.weight_bytes()
        if np.any(free < 0):
            return -1
        return int(self.strategy.lanes * np.floor(np.min(free / np.maximum(self.kv_bytes_per_token(), 1e-9))))


def _part_bytes(held: np.ndarray, units: Units) -> np.ndarray:
    return held * units.bytes_per_unit + (held > 0) * units.fixed_bytes

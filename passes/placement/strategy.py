"""A strategy says how each layer class is spread; its shares come later (shares.py)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moec.passes.hardware.errors import PlacementError
from moec.passes.hardware.mesh import Mesh
from moec.passes.placement.model_shape import ModelShape


@dataclass(frozen=True)
class Strategy:
    """One point of the strategy space.

    Args:
        replicas: independent copies of the model, each on an equal slice of the mesh.
        stages: pipeline stages in one replica (PP).
        attention_tp: ranks that share one attention block; the rest of the stage is attention data parallelism.
        expert_groups: groups that the experts are dealt to (EP); 1 is pure tensor parallelism.
        expert_tp: ranks that share one expert. expert_groups * expert_tp is the stage's number of ranks.
        spare_slots: expert slots per group beyond the fewest that hold every expert; they hold copies of hot experts.
        rotate: whether uneven shares move between ranks from layer to layer.
    """

    replicas: int = 1
    stages: int = 1
    attention_tp: int = 1
    expert_groups: int = 1
    expert_tp: int = 1
    spare_slots: int = 0
    rotate: bool = True

    @property
    def stage_ranks(self) -> int:
        """Ranks of one stage of one replica."""
        return self.expert_groups * self.expert_tp

    @property
    def lanes(self) -> int:
        """Attention data parallelism: groups of ranks that attend to different sequences."""
        return self.stage_ranks // self.attention_tp

    @property
    def num_ranks(self) -> int:
        """Of all stages of all replicas."""
        return self.replicas * self.stages * self.stage_ranks

    @property
    def name(self) -> str:
        """As parse_strategy reads it back: "TP8", "DP8-EP8+1", "TP2xPP2xR4"."""
        g, a, e = self.stage_ranks, self.attention_tp, self.expert_groups
        experts = f"TP{g}" if e == 1 else f"EP{e}" + (f"TP{self.expert_tp}" if self.expert_tp > 1 else "")
        if a < g:
            experts = f"DP{self.lanes}" + (f"TP{a}" if a > 1 else "") + "-" + experts
        parts = experts + (f"+{self.spare_slots}" if self.spare_slots else "")
        parts += f"xPP{self.stages}" if self.stages > 1 else ""
        parts += f"xR{self.replicas}" if self.replicas > 1 else ""
        return parts + ("" if self.rotate else "-fixed")


_PATTERN = re.compile(
    r"(?:DP(?P<lanes>\d+)(?:TP(?P<atp>\d+))?-)?"
    r"(?:TP(?P<tp>\d+)|EP(?P<ep>\d+)(?:TP(?P<etp>\d+))?)?(?:\+(?P<spare>\d+))?"
    r"(?:x?PP(?P<pp>\d+))?(?:xR(?P<rep>\d+))?(?P<fixed>-fixed)?"
)


def parse_strategy(text: str) -> Strategy:
    """The strategy that `text` names: TP8, TP4xPP2, EP8 (attention TP, experts EP on the same ranks), EP4TP2, DP8-EP8
    (attention data parallel), EP8+1 (one spare expert slot a group), TP2xR4 (four replicas), TP8-fixed (no rotation).

    Raises:
        PlacementError: the text is no strategy, or its parts disagree.
    """
    found = _PATTERN.fullmatch(text)
    if found is None or not text:
        raise PlacementError(
            f"strategy '{text}': expected a name such as TP8, TP4xPP2, EP8, EP4TP2, DP8-EP8, EP8+1 or TP2xR4"
        )
    n = {k: int(v) for k, v in found.groupdict().items() if v and k != "fixed"}
    if any(v < 1 for k, v in n.items() if k != "spare"):
        raise PlacementError(f"strategy '{text}': every count must be at least 1")
    groups, per_expert = n.get("ep", 1), n.get("etp", 1) if "ep" in n else n.get("tp", 1)
    ranks = groups * per_expert
    attention = ranks
    if "lanes" in n:
        attention = n.get("atp", ranks // n["lanes"])
        if attention * n["lanes"] != ranks:
            raise PlacementError(
                f"strategy '{text}': attention takes {attention * n['lanes']} ranks, the experts {ranks}; they must "
                "agree"
            )
    return Strategy(
        n.get("rep", 1), n.get("pp", 1), attention, groups, per_expert, n.get("spare", 0), found["fixed"] is None
    )


def enumerate_strategies(shape: ModelShape, mesh: Mesh, spare_slots: tuple[int, ...] = (0, 1)) -> list[Strategy]:
    """Every strategy for the mesh: all divisor splits into replicas, stages, attention TP x DP and EP x TP."""
    moe_experts = max((c.moe.num_experts for c in shape.layers if c.moe), default=1)
    found = []
    for replicas in _divisors(mesh.num_devices):
        for stages in _divisors(mesh.num_devices // replicas):
            group = mesh.num_devices // replicas // stages
            if stages > shape.num_layers:
                continue
            for attention in _divisors(group):
                for experts in _divisors(group):
                    if experts > moe_experts:
                        continue
                    for spare in spare_slots if experts > 1 else (0,):
                        found.append(Strategy(replicas, stages, attention, experts, group // experts, spare))
    return found


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]

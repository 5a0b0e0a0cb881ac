"""The lifted block as a module that torch.export can trace: routing, experts, shared part, in its own dtype."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import moec.passes.ir.expert_graphs
import moec.passes.ir.ops  # noqa: F401  (registers torch.ops.moec)
from moec.compiler.capture.lifting.batching import batched, body_of
from moec.compiler.capture.lifting.calls import Call, Key, rebuilt
from moec.compiler.capture.lifting.exits import Exit
from moec.compiler.capture.lifting.expert_graphs import GraphExperts
from moec.compiler.capture.lifting.experts import KnownExperts
from moec.compiler.capture.lifting.gates import LinearLogits, Router, WeightGraph
from moec.compiler.capture.lifting.layouts import apply_expert, tensors_of
from moec.compiler.capture.lifting.partition import Partition
from moec.compiler.capture.lifting.program import NotGeneral, Program
from moec.compiler.capture.lifting.rest import MaskRule, Outputs
from moec.compiler.capture.lifting.study import Found
from moec.compiler.capture.lifting.trace import ALIAS, HOST, ROWS
from moec.passes.ir.gate import GateSpec
from moec.passes.ir.weights import Weight, reshape, source, transpose


@dataclasses.dataclass(frozen=True)
class Parts:
    """All that was found about a block; names refer to its tensors (held.tensors).

    rule: index of the router's rule that is used, None: its graph.  dtypes: router product, scores, rounded weights.
    """

    call: Call
    partition: Partition
    experts: KnownExperts | GraphExperts
    router: Router
    exit: Exit | None
    shared: Found | Tensor | None
    outputs: Outputs
    masks: dict[Key, MaskRule]
    rule: int | None
    dtypes: tuple[str, str, str] = ("float32", "float32", "float32")

    @property
    def spec(self) -> GateSpec | None:
        """The gate as the compiled graph has it."""
        if self.rule is None:
            return None
        _, compute, rounded = self.dtypes
        return dataclasses.replace(self.router.rules[self.rule].spec, compute_dtype=compute, weights_dtype=rounded)


class Replacement(nn.Module):
    """Does what the block does. Takes its arguments in the way that the sample call gave them.

    Args: tensors: the block's tensors by name; float64 ones make a replacement for checking.
    recipes: buffers that are made from the block's tensors, as Weights; they are meta tensors until materialise().
    plain: buffers that are one of the block's tensors, as its source.
    """

    def __init__(self, parts: Parts, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.parts, self.dtype = parts, dtype
        self.recipes: dict[str, Weight] = {}
        self.plain: dict[str, Weight] = {}
        self._attributes: dict[str, str] = {}
        self._constants: dict[int, str] = {}
        self._batched: dict[str, GraphModule] = {}
        self._body: str | None = None
        self._tensors = dict(tensors)
        self._hold_experts(tensors)
        self._hold_router(tensors)
        if parts.exit is not None:
            weight = tensors[parts.exit.weight]
            self._hold("exit", source(parts.exit.weight, tuple(weight.shape), weight.dtype))
        if isinstance(parts.shared, Tensor):
            self._constant("shared", parts.shared)
        for program in self._programs():
            self._hold_leaves(program, tensors)
        del self._tensors
        self._batch()

    def _hold(self, attribute: str, weight: Weight | None) -> None:
        """A plain tensor of the block as itself, a recipe as a meta buffer."""
        if weight is None:
            tensor = None
        elif weight.op == "source":
            tensor = self._tensors[weight.args[0]].detach()
            self.plain[attribute] = weight
        else:
            self.recipes[attribute] = weight
            tensor = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        self.register_buffer(attribute, tensor, persistent=False)

    def _constant(self, attribute: str, value: Tensor) -> None:
        self.register_buffer(attribute, value.to(self.dtype) if value.is_floating_point() else value, persistent=False)

    def _hold_experts(self, tensors: Mapping[str, Tensor]) -> None:
        experts, groups = self.parts.experts, self.parts.partition.groups
        if isinstance(experts, KnownExperts):
            stacks = experts.stacks([g.stacked(tensors) for g in groups])
            for name in ("w_in", "w_out", "b_in", "b_out"):
                self._hold(name, getattr(stacks, name))

    def _hold_router(self, tensors: Mapping[str, Tensor]) -> None:
        router = self.parts.router

        def plain(name: str) -> Weight:
            return source(name, tuple(tensors[name].shape), tensors[name].dtype)

        if router.factor is not None:
            factor = router.factor.stacked(tensors)
            self._hold("factor", reshape(factor, (factor.shape[0],)) if factor.op != "source" else factor)
        if self.parts.rule is None:
            return
        rule = router.rules[self.parts.rule]
        self._hold("selection_bias", None if rule.bias is None else plain(rule.bias))
        if isinstance(router.logits, LinearLogits):
            weight = plain(router.logits.weight)
            self._hold("router_weight", transpose(weight, 0, 1) if router.logits.transposed else weight)
            self._hold("router_bias", None if router.logits.bias is None else plain(router.logits.bias))

    def _found(self) -> list[Found]:
        """The programs that this replacement runs, expert graphs apart."""
        parts = self.parts
        found: list[Any] = [parts.shared, parts.router.row_factor, *(o.found for o in parts.outputs.parts)]
        if isinstance(parts.experts, KnownExperts):
            found.append(parts.experts.entry)
        if parts.rule is not None:
            found.append(parts.router.logits)
        elif parts.router.graph is not None:
            found += [parts.router.graph.weights, parts.router.graph.indices]
        return [f for f in found if isinstance(f, Found)]

    def _programs(self) -> list[Program]:
        programs = [f.program for f in self._found()]
        if isinstance(self.parts.experts, GraphExperts):
            programs += [self.parts.experts.of(e) for e in range(self.parts.partition.num_experts)]
        return programs

    def _hold_leaves(self, program: Program, tensors: Mapping[str, Tensor]) -> None:
        for name, traced in zip(program.leaf_names, program.leaf_tensors, strict=True):
            if name in (HOST, ALIAS):
                if name == ALIAS:
                    raise NotGeneral("a program reads a parameter through .data")
                if id(traced) not in self._constants:
                    self._constants[id(traced)] = f"constant_{len(self._constants)}"
                    self._constant(self._constants[id(traced)], traced)
            elif name in tensors and name not in self._attributes:
                self._attributes[name] = f"leaf_{len(self._attributes)}"
                self._hold(self._attributes[name], source(name, tuple(tensors[name].shape), tensors[name].dtype))

    @torch.no_grad()
    def materialise(self, tensors: Mapping[str, Tensor]) -> Replacement:
        """Makes the buffers of all recipes from the block's tensors, so that it can run; gives itself."""
        for name, weight in self.recipes.items():
            setattr(self, name, weight.materialise(lambda n: tensors[n].detach()))
        return self

    def _replay(self, found: Found, rows: Tensor) -> Tensor:
        if found.rowwise:
            return self._rowwise(found.program, f"program {id(found.program)}", rows)
        inputs, count = rows.reshape(*self.parts.call.shape_of(rows.shape[0]), rows.shape[-1]), rows.shape[0]
        shaped = found.form(found.program.run(lambda n, t: self._leaf(n, t, inputs), count, self.dtype), count)
        if shaped is None:
            raise NotGeneral("a part of the block has another shape for other numbers of rows")
        return shaped

    def _leaf(self, name: str, traced: Tensor, inputs: Tensor) -> Tensor:
        if name == ROWS:
            return inputs.clone()
        if name == HOST:
            return getattr(self, self._constants[id(traced)])
        if name in self._attributes:
            return getattr(self, self._attributes[name])
        extra = next(e for k, e in self.parts.call.extras.items() if name == f"in:{k}")
        shape = inputs.shape[-2:-1] if extra.flat else inputs.shape[:-1]
        return torch.ones(*shape, *extra.tail, dtype=extra.dtype)  # masks are applied to the result

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows [T, H] -> weights [T, K], experts [T, K]; exact in float64."""
        parts = self.parts
        weights, experts = self._route(rows)
        if parts.router.row_factor is not None:
            weights = weights * self._replay(parts.router.row_factor, rows)
        return weights, experts

    def _route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        parts = self.parts
        if parts.rule is None:
            assert parts.router.graph is not None
            return self._route_by_graph(parts.router.graph, rows)
        exact, spec = self.dtype == torch.float64, parts.spec
        assert spec is not None
        linear = isinstance(parts.router.logits, LinearLogits)
        if linear and not exact:
            bias, selection = self.router_bias, self.selection_bias
            args = (rows, self.router_weight, bias, selection, spec.encode(), parts.dtypes[0])
            weights, experts = torch.ops.moec.gate_linear(*args)
        else:
            logits = (
                F.linear(rows, self.router_weight, self.router_bias)
                if linear
                else self._replay(parts.router.logits, rows)
            )  # type: ignore[arg-type]
            if exact:
                weights, experts = spec.route(logits, self.selection_bias)  # type: ignore[arg-type]
            else:
                weights, experts = torch.ops.moec.gate(logits, self.selection_bias, spec.encode())
        if parts.router.factor is not None:
            weights = weights * self.factor[experts.long()]  # type: ignore[index]
        return weights, experts

    def _route_by_graph(self, graph: WeightGraph, rows: Tensor) -> tuple[Tensor, Tensor]:
        weights = self._replay(graph.weights, rows)
        if graph.scale != 1.0:
            weights = weights * graph.scale
        if graph.indices is not None:
            return weights, self._replay(graph.indices, rows)
        experts = weights.abs().topk(self.parts.partition.top_k, -1).indices
        return weights.gather(1, experts), experts

    def mix(self, rows: Tensor, weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor | None]:
        """Routed part and shared part of rows [T, H]."""
        known = self.parts.experts
        if isinstance(known, KnownExperts):
            x = rows if known.entry is None else self._replay(known.entry, rows)
            stacks = (self.w_in, self.w_out, self.b_in, self.b_out)
            y = torch.ops.moec.experts(x, weights, experts, *stacks, None, known.act, weight_on_input=known.on_input)
        else:
            y = self._mix_graphs(known, rows, weights, experts)
        return self._out(y), self._shared(rows)

    def _out(self, y: Tensor) -> Tensor:
        return y if self.parts.exit is None else self.parts.exit(y, self.exit)  # type: ignore[arg-type]

    def _shared(self, rows: Tensor) -> Tensor | None:
        shared = self.parts.shared
        if isinstance(shared, Found):
            return self._replay(shared, rows)
        return None if shared is None else self.shared.expand(rows.shape)  # type: ignore[operator]

    def alone(self, expert: int, rows: Tensor, weight: Tensor, held: Mapping[str, Tensor]) -> Tensor:
        """The main output of rows [T, H] if this expert were the only one, with weight [T]; needs no materialise().

        held: the block's tensors; of the experts' only this one's are read.
        """
        known, groups = self.parts.experts, self.parts.partition.groups
        if isinstance(known, KnownExperts):
            x = rows if known.entry is None else self._replay(known.entry, rows)
            weights = tensors_of(known.stacks([g.stacked(held, (expert,)) for g in groups]), held)
            if known.on_input:
                y = apply_expert(x * weight[:, None], weights, known.act) * (weight != 0)[:, None]
            else:
                y = apply_expert(x, weights, known.act) * weight[:, None]
        else:
            key = f"expert {expert if known.by_expert else 0}"
            y = weight[:, None] * self._rowwise(known.of(expert), key, rows)
        y = self._out(y)
        shared = self._shared(rows)
        return y if shared is None else y + shared

    def _mix_graphs(self, known: GraphExperts, rows: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Each expert on its own rows; where its graph is none that the op can hold, on every row, most times zero."""
        if self._body is not None:
            tensors = [getattr(self, a) for a in self._body_tensors]
            return torch.ops.moec.expert_graphs(rows, weights, experts, tensors, self._body)
        width = max(self.parts.partition.num_experts, self.parts.router.num_logits)
        dense = rows.new_zeros(rows.shape[0], width).scatter_add(1, experts.long(), weights.to(rows.dtype))
        count = self.parts.partition.num_experts
        keys = [f"expert {e if known.by_expert else 0}" for e in range(count)]
        terms = [dense[:, e, None] * self._rowwise(known.of(e), key, rows) for e, key in enumerate(keys)]
        return functools.reduce(torch.add, terms)

    def _rowwise(self, program: Program, key: str, rows: Tensor) -> Tensor:
        """The program on each row, flat: [T, n]. key: programs of one key share their operations."""
        leaves = [self._leaf(n, t, rows) for n, t in zip(*_leaves(program), strict=True) if n != ROWS]
        return self._batched[key](rows, *leaves)

    def _batch(self) -> None:
        """Makes the row programs' batched forms; a trace cannot do that by itself."""
        rows = torch.zeros(1, self.parts.call.hidden, dtype=self.dtype)
        programs = {f"program {id(f.program)}": f.program for f in self._found() if f.rowwise}
        if isinstance(self.parts.experts, GraphExperts):
            every = range(self.parts.partition.num_experts if self.parts.experts.by_expert else 1)
            programs |= {f"expert {e}": self.parts.experts.of(e) for e in every}
        for key, program in programs.items():
            leaves = [self._leaf(n, t, rows) for n, t in zip(*_leaves(program), strict=True) if n != ROWS]
            known = self.parts.experts
            made = known.many if isinstance(known, GraphExperts) and key.startswith("expert") else {}
            if (key, self.dtype) not in made:
                made[key, self.dtype] = batched(program, leaves, self.parts.call.hidden, self.dtype)
            self._batched[key] = made[key, self.dtype]
        if isinstance(self.parts.experts, GraphExperts):
            self._encode_experts(self.parts.experts)

    def _encode_experts(self, known: GraphExperts) -> None:
        """The experts' graphs as moec::expert_graphs takes them."""
        count = self.parts.partition.num_experts
        used = [self._attributes_of(known.of(e)) for e in range(count)]
        self._body_tensors = list(dict.fromkeys(a for names in used for a in names))
        index = {a: i for i, a in enumerate(self._body_tensors)}
        graphs = [self._batched[f"expert {e}"] for e in range(count if known.by_expert else 1)]
        result = next(n for n in reversed(graphs[0].graph.nodes)).args[0]
        body = {"tensors": [[index[a] for a in names] for names in used], "width": result.meta["val"].shape[-1]}
        try:
            self._body = json.dumps({"graphs": [body_of(g) for g in graphs], **body})
        except (ValueError, KeyError):
            self._body = None

    def _attributes_of(self, program: Program) -> list[str]:
        """The attributes that hold a program's leaves, the row left out."""
        leaves = [(n, t) for n, t in zip(*_leaves(program), strict=True) if n != ROWS]
        return [self._constants[id(t)] if n == HOST else self._attributes[n] for n, t in leaves]

    def lifted(self, rows: Tensor) -> Tensor:
        """rows [T, H] -> the main output [T, H], no masks."""
        y, shared = self.mix(rows, *self.route(rows))
        return y if shared is None else y + shared

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's own forward."""
        parts = self.parts
        given: dict[Key, Any] = dict([*enumerate(args), *kwargs.items()])
        x = given[parts.call.key]
        rows = x.reshape(-1, parts.call.hidden)
        y, shared = self.mix(rows, *self.route(rows))
        y = self._masked(y, shared, rows, given)
        values = []
        for output in parts.outputs.parts:
            if output.kind == "main":
                values.append(y if parts.outputs.flat else y.reshape(x.shape))
            elif output.kind == "constant":
                values.append(output.constant)
            else:
                assert output.found is not None
                value = self._replay(output.found, rows)
                values.append(value if output.tail is None else value.reshape(*x.shape[:-1], *output.tail))
        return rebuilt(parts.outputs.sample, values)

    def _masked(self, y: Tensor, shared: Tensor | None, rows: Tensor, given: dict[Key, Any]) -> Tensor:
        rule = next((r for r in self.parts.masks.values() if r != "unused"), None)
        total = y if shared is None else y + shared
        if rule is None:
            return total
        key = next(iter(self.parts.masks))
        keep = given[key].reshape(-1, 1) != 0
        off = {"zero": torch.zeros_like(total), "input": rows, "shared": total - y if shared is None else shared}[rule]
        return torch.where(keep, total, off)


def _leaves(program: Program) -> tuple[list[str], list[Tensor]]:
    return program.leaf_names, program.leaf_tensors

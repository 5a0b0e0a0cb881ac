"""Checks plan.json on its own: coverage, alignment, memory, load, objective, bound. Imports nothing of the solver."""

import math

EPS = 1e-6  # relative


def verify_plan(plan: dict) -> list[str]:
    """What is wrong with the plan, one line each; empty for a plan that holds."""
    out: list[str] = []
    plan = plan | {"classes": [i for i, c in enumerate(plan["model"]["layers"]) for _ in range(c["count"])]}
    rows = iter(plan["routing"]["counts"])
    rows = [next(rows) if plan["model"]["layers"][i]["moe"] else [1] for i in plan["classes"]]
    plan["chance"] = [[n / sum(row) if sum(row) else 1 / len(row) for n in row] for row in rows]
    cert = plan["certificate"]
    least = min([_least_seconds(plan, entry, out) for entry in cert["strategies"]], default=math.inf)
    if not plan["feasible"]:
        return out + (["a strategy fits, the plan says that none does"] if least < math.inf else [])
    mine = cert["plan"]
    rate, cuts, stages = plan["tokens_per_s"], plan["cuts"], mine["stages"]
    if cuts != sorted({0, *cuts, len(plan["classes"])}) or len(cuts) != stages + 1:
        return [*out, "cuts: the layers are not covered exactly once"]
    _check_memory(plan, mine, out)
    if abs(cert["objective"] * rate - 1) > EPS or cert["lower_bound"] > min(least, cert["objective"]) * (1 + EPS):
        out.append("certificate: the bound is above what a strategy can reach, or the objective is not the plan's")
    ends = [mine["send_s"]] * (stages - 1) + [mine["send_s"] + _slowest(plan["head"], mine["head"])]
    spent = [sum(_plan_seconds(plan, mine, i, k) for i in range(cuts[k], cuts[k + 1])) for k in range(stages)]
    step = stages * max(map(sum, zip(spent, ends, strict=True))) + mine["host_s"]
    if cert["kind"] == "steady state" and abs(rate * step / mine["replicas"] / mine["sequences"] - 1) > EPS:
        out.append(
            f"objective: the shares give {mine['replicas'] * mine['sequences'] / step:.1f} tokens/s, not {rate:.1f}"
        )
    return out


def _slowest(held: list[int], term: dict) -> float:
    return max(n * t + (n > 0) * f for n, t, f in zip(held, term["unit_s"], term["fixed_s"], strict=True))


def _plan_seconds(plan: dict, s: dict, number: int, stage: int) -> float:
    """Seconds of a layer with the plan's shares; the greatest expert load and the experts read follow from routing."""
    layer, cls, p = plan["layers"][number], s["classes"][plan["classes"][number]], plan["chance"][number]
    total = cls["other_s"] + sum(_slowest(layer[n], t) for n, t in cls["terms"].items() if n != "experts")
    if "experts" not in cls["terms"]:
        return total
    used, load, read = _touched(plan, s, number), [0.0] * s["expert_groups"], [0.0] * s["expert_groups"]
    for expert, group, share in layer["resident"]:
        read[group], load[group] = read[group] + used[expert], load[group] + p[expert] * share
    term, first = cls["terms"]["experts"], stage * s["expert_groups"] * s["expert_tp"]
    groups = [(r, (r - first) // s["expert_tp"]) for r, n in enumerate(layer["experts"]) if n]
    cost = [layer["experts"][r] * max(read[g] * term["unit_s"][r], load[g] * term["slots_s"][r]) for r, g in groups]
    return total + max(cost)


def _touched(plan: dict, s: dict, number: int) -> list[float]:
    k = plan["model"]["layers"][plan["classes"][number]]["moe"]["top_k"]
    return [-math.expm1(s["tokens"] * math.log1p(-min(k * p, 1 - 1e-12))) for p in plan["chance"][number]]


def _check_memory(plan: dict, s: dict, out: list[str]) -> None:
    """Every tensor covered exactly once per copy by whole units; weights and cache within every device."""
    stage, model, weights = (
        s["expert_groups"] * s["expert_tp"],
        plan["model"],
        [0.0] * s["stages"] * len(plan["mesh"]["devices"]),
    )
    ranks, cache = s["stages"] * stage, [0.0] * len(weights)
    covers = [("embedding", plan["embedding"], s["head"], 0, 1), ("head", plan["head"], s["head"], ranks - stage, 1)]
    for number, layer in enumerate(plan["layers"]):
        first, cls = (
            stage * max(k for k in range(s["stages"]) if plan["cuts"][k] <= number),
            s["classes"][plan["classes"][number]],
        )
        moe, slots = model["layers"][plan["classes"][number]]["moe"], [1] * s["expert_groups"]
        for r in range(first, first + stage):
            weights[r] += cls["replicated_bytes"]
        if moe:
            pairs = {(e, g): f for e, g, f in layer["resident"]}
            slots = [sum(g == group for _, g in pairs) for group in range(s["expert_groups"])]
            served = [sum(f for (e, _), f in pairs.items() if e == expert) for expert in range(moe["num_experts"])]
            once = len(pairs) == len(layer["resident"]) and (s["copies"] or len(pairs) == len(served))
            if (
                not once
                or max(slots) > s["expert_slots"]
                or max(abs(f - 1) for f in served) > EPS
                or min(pairs.values()) < 0
            ):
                out.append(f"layer {number}: experts are not each served once within {s['expert_slots']} slots a group")
        covers += [
            (f"layer {number}: {n}", layer[n], t, first, slots if n == "experts" else 1)
            for n, t in cls["terms"].items()
        ]
    for name, held, term, first, times in covers:
        copies = [sum(held[i : i + term["width"]]) for i in range(0, ranks, term["width"])]
        want = [term["units"] * (first <= i < first + stage) for i in range(0, ranks, term["width"])]
        if copies != want or min(held) < 0 or any(n % 1 for n in held):
            out.append(f"{name} does not cover its {term['units']} units exactly once in each copy")
        for r in (
            r
            for r, n in enumerate(held)
            if n and not (name == "head" and model["tied_embeddings"] and s["stages"] == 1)
        ):
            many = times if times == 1 else times[(r - first) // s["expert_tp"]]
            weights[r] += many * (held[r] * term["bytes"] + term["fixed_bytes"])
            cache[r] += plan["kv_bytes"] * (held[r] * term["kv"] + term["fixed_kv"])
    for rank, entry in enumerate(plan["ranks"]):
        mine, kv = weights[rank % ranks], cache[rank % ranks]
        if abs(entry["weight_bytes"] - mine) > EPS * mine or abs(entry["kv_bytes_per_token"] - kv) > EPS * kv + EPS:
            out.append(f"rank {rank}: states {entry['weight_bytes']:.0f} bytes, its shares take {mine:.0f}")
        if mine + kv * plan["kv_tokens"] / s["replicas"] * s["attention_tp"] / stage > _free(plan, rank) * (1 + EPS):
            out.append(f"rank {rank}: weights and {plan['kv_tokens']} cached tokens exceed its memory")


def _free(plan: dict, rank: int) -> float:
    return (
        plan["mesh"]["devices"][rank]["memory_bytes"] * plan["memory"]["utilisation"] - plan["memory"]["reserved_bytes"]
    )


def _least_seconds(plan: dict, s: dict, out: list[str]) -> float:
    """Re-derives one strategy's cache and time bounds; returns its seconds per token, infinite where no request fits."""
    size, stages, work, classes = s["expert_groups"] * s["expert_tp"], s["stages"], plan["workload"], plan["classes"]
    length, replicas, weights, cache = work["prompt_len"] + work["gen_len"], s["replicas"], [], []
    for i in classes:
        cls, c = s["classes"][i], plan["model"]["layers"][i]
        _check_units(plan, s, cls["terms"], c, out)
        held = s["expert_slots"] * s["expert_groups"] if s["copies"] else c["moe"] and c["moe"]["num_experts"]
        many = {n: held if n == "experts" else size // t["width"] for n, t in cls["terms"].items()}
        parts = (many[n] * (t["units"] * t["bytes"] + t["width"] * t["fixed_bytes"]) for n, t in cls["terms"].items())
        weights.append(size * cls["replicated_bytes"] + sum(parts))
        kv = cls["terms"]["attention"]
        cache.append(plan["kv_bytes"] * (kv["units"] * kv["kv"] + kv["width"] * kv["fixed_kv"]))
    table, tokens = (
        s["head"]["units"] * s["head"]["bytes"] * size / s["head"]["width"],
        max(s["kv_tokens"], 0) * (1 + EPS) + 1,
    )
    tied = plan["model"]["tied_embeddings"] and stages == 1
    free = [sum(_free(plan, r) for r in range(k * size, (k + 1) * size)) for k in range(stages)]
    room = [f - table * ((k == 0) + (k == stages - 1 and not tied)) for k, f in enumerate(free)]
    if _packs(len(classes), room, lambda _, i: weights[i] + tokens * cache[i]):
        out.append(f"{s['strategy']}: more than the stated {s['kv_tokens']:.0f} tokens could be cached")
    if s["lower_bound"] is None or plan["certificate"]["kind"] != "steady state":
        fits = s["kv_tokens"] >= length * max(1, -(-work["batch"] // replicas))
        out += [f"{s['strategy']}: rejected although it fits"] if fits and s["lower_bound"] is None else []
        return s["lower_bound"] or math.inf
    most = work["batch"] / replicas or min(4096, s["kv_tokens"] // length)
    time = (s["lower_bound"] * (1 - EPS) * replicas * s["sequences"] - s["host_s"]) / stages - s["send_s"]
    left = [time] * (stages - 1) + [time - _least(s["head"], (stages - 1) * size, size)]
    if s["sequences"] < most or _packs(len(classes), left, lambda k, i: _least_layer(plan, s, i, k * size, size)):
        out.append(f"{s['strategy']}: its stated bound of {1 / s['lower_bound']:.1f} tokens/s is not proven")
    return s["lower_bound"]


def _check_units(plan: dict, s: dict, terms: dict, c: dict, out: list[str]) -> None:
    """Units are whole quantisation groups, cover the model's matrices and take the bytes that the format needs."""
    a, m, h, f = c["attention"], c["moe"], plan["model"]["hidden"], plan["weights"]
    need = {"attention": h * a["heads"] * ((a["v_head_dim"] or 2 * a["head_dim"]) + 0)}
    need["dense"] = h * (
        c["dense"]["width"] * c["dense"]["matrices"] if c["dense"] else m["shared_width"] * m["matrices"]
    )
    need["experts"] = h * m["width"] * m["matrices"] if m else 0
    for name, size in need.items():
        t = terms.get(name, {"units": 0, "params": 0, "bytes": 0, "group": 0})
        bits = (
            16
            if name == "attention" and f["experts_only"]
            else f["bits"] + (8 * f["group_scale_bytes"] / t["group"] if t["group"] else 0)
        )
        if (
            t["units"] * t["params"] < size
            or t["bytes"] < t["params"] * bits / 8 * (1 - EPS)
            or t["group"]
            and t["params"] % t["group"]
        ):
            out.append(f"{s['strategy']}: units of {name} do not cover its matrices in whole groups of {f['name']}")


def _packs(num_layers: int, room: list[float], cost) -> bool:  # type: ignore[no-untyped-def]
    """Whether consecutive layers fit into the stages' room, each stage taking as many as it can."""
    layer = 0
    for stage, left in enumerate(room):
        while layer < num_layers and (left := left - cost(stage, layer)) >= 0:
            layer += 1
    return layer == num_layers


def _least(term: dict, first: int, size: int) -> float:
    """The slowest copy's least time for its whole units: no t below it has room for them all."""
    out = 0.0
    for r in range(first, first + size, term["width"]):
        costs, low = term["unit_s"][r : r + term["width"]], 0.0
        high = -(-term["units"] // len(costs)) * max(costs)
        for _ in range(60 if min(costs) < max(costs) else 0):
            mid = (low + high) / 2
            low, high = (low, mid) if sum(int(mid / c) for c in costs) >= term["units"] else (mid, high)
        out = max(out, (low or high) + min(term["fixed_s"][r : r + term["width"]]))
    return out


def _least_layer(plan: dict, s: dict, number: int, first: int, size: int) -> float:
    cls, p, groups = s["classes"][plan["classes"][number]], sorted(plan["chance"][number]), s["expert_groups"]
    total = cls["other_s"] + sum(_least(t, first, size) for n, t in cls["terms"].items() if n != "experts")
    if "experts" not in cls["terms"]:
        return total
    t, used, slots = cls["terms"]["experts"], sorted(_touched(plan, s, number)), s["expert_slots"]
    spare, rates = (
        slots * groups - len(p),
        [[c[r] for r in range(first, first + size)] for c in (t["unit_s"], t["slots_s"])],
    )
    read, load, blocks = (sum(used) + s["copies"] * spare * used[0]) / groups, 1 / groups, t["units"] / t["width"]
    if all(
        min(c) == max(c) for c in rates
    ):  # equal devices: whole blocks, crowded groups and hot experts bound as well
        least, blocks, read = max(len(p) - (groups - 1) * slots, 0), math.ceil(blocks), max(read, sum(used[:slots]))
        met = sum(p[: max(least - 2, 0)]) + sum(p[-groups - 1 : len(p) - groups + 1]) if len(p) > groups else 0
        load = max(
            load, p[-1] / min(spare + 1, groups) if s["copies"] else max(met, p[-1] + sum(p[: max(least - 1, 0)]))
        )
    read_s, slots_s = (size / sum(1 / c for c in costs) for costs in rates)
    return total + blocks * max(read * read_s, load * slots_s)

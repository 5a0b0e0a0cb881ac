"""Checks plan.json on its own: coverage, alignment, memory, load, objective, bound. Imports nothing of the solver."""

import math

EPS = 1e-6  # relative


def verify_plan(plan: dict) -> list[str]:
    """What is wrong with the plan, one line each; empty for a plan that holds."""
    out, cert, memory = list[str](), plan["certificate"], plan["memory"]
    free = [d["memory_bytes"] * memory["utilisation"] - memory["reserved_bytes"] for d in plan["mesh"]["devices"]]
    index = [i for i, c in enumerate(plan["model"]["layers"]) for _ in range(c["count"])]
    moes, rows = [plan["model"]["layers"][i]["moe"] for i in index], iter(plan["routing"]["counts"])
    counts = [next(rows) if moe else [] for moe in moes]
    chance = [[n / sum(row) if sum(row) else 1 / len(row) for n in row] for row in counts]
    plan = plan | {"free": free, "index": index, "moes": moes, "chance": chance}
    least = min([_least_seconds(plan, entry, out) for entry in cert["strategies"]], default=math.inf)
    if not plan["feasible"]:
        return out + (["a strategy fits, the plan says that none can"] if plan["proven"] and least < math.inf else [])
    s, cuts, rate = cert["plan"], plan["cuts"], plan["tokens_per_s"]
    if cuts != sorted({0, *cuts, len(index)}) or len(cuts) != s["stages"] + 1:
        return [*out, "cuts: the layers are not covered exactly once"]
    _check_shares(plan, s, out)
    stages = [sum(_plan_seconds(plan, s, i, k) for i in range(cuts[k], cuts[k + 1])) for k in range(s["stages"])]
    stages[-1] += _slowest(plan["head"], s["head"])
    step = (s["stages"] * (max(stages) + s["send_s"]) + s["host_s"]) / s["replicas"] / s["sequences"]
    if cert["kind"] == "steady state" and abs(rate * step - 1) > EPS:
        out.append(f"objective: the shares give {1 / step:.1f} tokens/s, the plan says {rate:.1f}")
    if abs(cert["objective"] * rate - 1) > EPS or cert["lower_bound"] > min(least, cert["objective"]) * (1 + EPS):
        out.append("certificate: the bound is above what a strategy can reach, or the objective is not the plan's")
    return out


def _slowest(held: list[int], term: dict) -> float:
    return max(n * t + (n > 0) * f for n, t, f in zip(held, term["unit_s"], term["fixed_s"], strict=True))


def _plan_seconds(plan: dict, s: dict, number: int, stage: int) -> float:
    """Seconds of a layer with the plan's shares; expert loads and the experts read follow from routing."""
    layer, cls, groups = plan["layers"][number], s["classes"][plan["index"][number]], s["expert_groups"]
    total = cls["other_s"] + sum(_slowest(layer[n], t) for n, t in cls["terms"].items() if n != "experts")
    if not plan["moes"][number]:
        return total
    used, load, read, t = _used(plan, s, number), [0.0] * groups, [0.0] * groups, cls["terms"]["experts"]
    for expert, g, share in layer["resident"]:
        read[g], load[g] = read[g] + used[expert], load[g] + plan["chance"][number][expert] * share
    held = [(n, r, r // s["expert_tp"] - stage * groups) for r, n in enumerate(layer["experts"]) if n]
    return total + max(n * max(read[g] * t["unit_s"][r], load[g] * t["slots_s"][r]) for n, r, g in held)


def _used(plan: dict, s: dict, number: int) -> list[float]:
    """The chance of each expert to be picked by any token of a micro-batch."""
    top_k = plan["moes"][number]["top_k"]
    return [-math.expm1(s["tokens"] * math.log1p(-min(top_k * p, 1 - 1e-12))) for p in plan["chance"][number]]


def _check_shares(plan: dict, s: dict, out: list[str]) -> None:
    """Every tensor covered exactly once per copy by whole units; weights and cache within every device."""
    stage, ranks = s["expert_groups"] * s["expert_tp"], s["expert_groups"] * s["expert_tp"] * s["stages"]
    weights, cache, ends = [0.0] * ranks, [0.0] * ranks, (("embedding", 0), ("head", ranks - stage))
    covers = [(name, plan[name], s[name], first, [1] * ranks) for name, first in ends]
    for number, (layer, moe) in enumerate(zip(plan["layers"], plan["moes"], strict=True)):
        first, slots = stage * (sum(cut <= number for cut in plan["cuts"]) - 1), [1] * s["expert_groups"]
        if moe:
            share = {(e, g): f for e, g, f in layer["resident"]}
            served = [sum(f for (e, _), f in share.items() if e == expert) for expert in range(moe["num_experts"])]
            slots = [sum(g == group for _, g in share) for group in range(s["expert_groups"])]
            once = len(share) == len(layer["resident"]) and (s["copies"] or len(share) == len(served))
            wrong = max(abs(f - 1) for f in served) + max(-min(share.values()), 0) > EPS
            if not once or wrong or max(slots) > s["expert_slots"]:
                out.append(f"layer {number}: experts are not each served once within {s['expert_slots']} slots a group")
        many = [n for n in slots for _ in range(s["expert_tp"])] * s["stages"]
        for name, t in s["classes"][plan["index"][number]]["terms"].items():
            times = many if name == "experts" else [1] * ranks
            covers.append((f"layer {number}: {name}", layer[name], t, first, times))
    for name, held, t, first, times in covers:
        copies = [sum(held[i : i + t["width"]]) for i in range(0, ranks, t["width"])]
        want = [t["units"] * (first <= i < first + stage) for i in range(0, ranks, t["width"])]
        if copies != want or min(held) < 0 or any(n % 1 for n in held):
            out.append(f"{name} does not cover its {t['units']} units exactly once in each copy")
        for r, n in enumerate(held):
            weights[r] += times[r] * (n * t["bytes"] + (n > 0) * t["fixed_bytes"])
            cache[r] += plan["kv_bytes"] * (n * t["kv"] + (n > 0) * t["fixed_kv"])
    for rank, entry in enumerate(plan["ranks"]):
        mine, kv = weights[rank % ranks], cache[rank % ranks]
        if abs(entry["weight_bytes"] - mine) > EPS * mine or abs(entry["kv_bytes_per_token"] - kv) > EPS * kv + EPS:
            out.append(f"rank {rank}: states {entry['weight_bytes']:.0f} bytes, its shares take {mine:.0f}")
        if mine + kv * plan["kv_tokens"] / s["replicas"] * s["attention_tp"] / stage > plan["free"][rank] * (1 + EPS):
            out.append(f"rank {rank}: weights and {plan['kv_tokens']} cached tokens exceed its memory")


def _least_seconds(plan: dict, s: dict, out: list[str]) -> float:
    """Re-derives one strategy's cache and time bounds; returns seconds per token, infinite where no request fits."""
    size, stages, work, fmt = s["expert_groups"] * s["expert_tp"], s["stages"], plan["workload"], plan["weights"]
    ranks = [range(k * size, (k + 1) * size) for k in range(stages)]
    weights, cache, params = [], [], s["embedding"]["units"] * s["embedding"]["params"]
    for i, moe in zip(plan["index"], plan["moes"], strict=True):
        terms, experts = s["classes"][i]["terms"], moe["num_experts"] if moe else 0
        for name, t in terms.items():
            plain = name == "attention" and fmt["experts_only"]
            bits = 16 if plain else fmt["bits"] + 8 * fmt["group_scale_bytes"] / (t["group"] or math.inf)
            params += (t["units"] * t["params"] + t["fixed_params"]) * (experts if name == "experts" else 1)
            if t["bytes"] < t["params"] * bits / 8 * (1 - EPS) or t["params"] % (t["group"] or 1):
                out.append(f"{s['strategy']}: units of {name} are not whole groups of {fmt['name']}")
        held = s["expert_slots"] * s["expert_groups"] if s["copies"] else experts
        many = {name: held if name == "experts" else size // t["width"] for name, t in terms.items()}
        least = {name: t["width"] if name == "attention" else 1 for name, t in terms.items()}  # ranks that hold any
        parts = (many[n] * (t["units"] * t["bytes"] + least[n] * t["fixed_bytes"]) for n, t in terms.items())
        weights.append(sum(parts))
        cache.append(plan["kv_bytes"] * sum(t["units"] * t["kv"] + t["width"] * t["fixed_kv"] for t in terms.values()))
    ends = [s[n]["units"] * s[n]["bytes"] * size / s[n]["width"] for n in ("embedding", "head")]
    room, claim = [sum(plan["free"][r] for r in stage) for stage in ranks], s["lower_bound"]
    room[0], tokens = room[0] - ends[0], max(s["kv_tokens"], 0) * (1 + EPS) + 1
    room[-1] -= ends[1]
    more = _packs(room, lambda k, i: weights[i] + tokens * cache[i], len(weights))
    if more or params < plan["model"]["matrix_params"]:
        out.append(f"{s['strategy']}: more than the stated {s['kv_tokens']:.0f} tokens could be cached")
    most = s["kv_tokens"] // (work["prompt_len"] + work["gen_len"])
    if claim is None:
        return math.inf if most < max(1, -(-work["batch"] // s["replicas"])) else 0.0
    left = [(claim * (1 - EPS) * s["replicas"] * s["sequences"] - s["host_s"]) / stages - s["send_s"]] * stages
    left[-1] -= _least(s["head"], ranks[-1])
    few = s["sequences"] < (work["batch"] / s["replicas"] or min(4096, most))
    seconds = {(k, i): _least_layer(plan, s, i, ranks[k]) for k in range(stages) for i in range(len(cache))}
    if plan["certificate"]["kind"] == "steady state" and (few or _packs(left, lambda k, i: seconds[k, i], len(cache))):
        out.append(f"{s['strategy']}: its stated bound of {1 / claim:.1f} tokens/s is not proven")
    return claim


def _packs(room: list[float], cost, num_layers: int) -> bool:  # type: ignore[no-untyped-def]
    """Whether layers fit the stages in order: each takes what it can, at least one, and leaves one to each later."""
    layer = 0
    for stage, left in enumerate(room):
        first, last = layer, num_layers - len(room) + stage + 1
        while layer < last and (left := left - cost(stage, layer)) >= 0:
            layer += 1
        if layer == first:
            return False
    return layer == num_layers


def _least(t: dict, ranks: range) -> float:
    """The slowest copy's least time for its whole units: below it the ranks have no room for them all."""
    out = 0.0
    for r in ranks[:: t["width"]]:
        costs, low = t["unit_s"][r : r + t["width"]], 0.0
        high = -(-t["units"] // len(costs)) * max(costs)
        for _ in range(45 if min(costs) < max(costs) else 0):
            middle = (low + high) / 2
            low, high = (low, middle) if sum(int(middle / c) for c in costs) >= t["units"] else (middle, high)
        out = max(out, (low or high) + min(t["fixed_s"][r : r + t["width"]]))
    return out


def _least_layer(plan: dict, s: dict, number: int, ranks: range) -> float:
    cls, p = s["classes"][plan["index"][number]], sorted(plan["chance"][number])
    total = cls["other_s"] + sum(_least(t, ranks) for n, t in cls["terms"].items() if n in ("attention", "dense"))
    if not plan["moes"][number]:
        return total
    t, used = cls["terms"]["experts"], sorted(_used(plan, s, number))
    groups, slots = s["expert_groups"], s["expert_slots"]
    spare, rates = slots * groups - len(p), [t[name][ranks[0] : ranks[-1] + 1] for name in ("unit_s", "slots_s")]
    read, load, blocks = (sum(used) + s["copies"] * spare * used[0]) / groups, 1 / groups, t["units"] / t["width"]
    if all(min(costs) == max(costs) for costs in rates):  # equal devices: crowded groups and hot experts bound as well
        least, blocks, read = max(len(p) - (groups - 1) * slots, 0), math.ceil(blocks), max(read, sum(used[:slots]))
        met = sum(p[: max(least - 2, 0)]) + sum(p[-groups - 1 : len(p) - groups + 1]) if len(p) > groups else 0
        alone = max(met, p[-1] + sum(p[: max(least - 1, 0)]))
        load = max(load, p[-1] / min(spare + 1, groups) if s["copies"] else alone)
    read_s, slots_s = (len(ranks) / sum(1 / c for c in costs) for costs in rates)
    return total + blocks * max(read * read_s, load * slots_s)

"""Checks plan.json on its own: coverage, alignment, memory, load, objective, bound. Imports nothing of the solver."""

import numpy as np

EPS = 1e-6  # relative


def verify_plan(plan: dict) -> list[str]:
    """What is wrong with the plan, one line each; empty for a plan that holds."""
    out, cert, memory, counts = list[str](), plan["certificate"], plan["memory"], iter(plan["routing"]["counts"])
    free = [d["memory_bytes"] * memory["utilisation"] - memory["reserved_bytes"] for d in plan["mesh"]["devices"]]
    index = [i for i, c in enumerate(plan["model"]["layers"]) for _ in range(c["count"])]
    moes = [plan["model"]["layers"][i]["moe"] for i in index]
    rows = [np.array(next(counts), float) if moe else np.ones(1) for moe in moes]
    chance = [row / row.sum() if row.sum() else np.full(len(row), 1 / len(row)) for row in rows]
    picked = [np.minimum(moe["top_k"] * row, 1 - 1e-12) if moe else row for moe, row in zip(moes, chance, strict=True)]
    plan, last = plan | {"index": index, "moes": moes, "chance": chance, "picked": picked}, dict[str, float]()
    plan |= {"free": np.array(free), "most": {s["strategy"]: s["kv_tokens"] for s in cert["strategies"]}}
    least = min([_least_seconds(plan, s, last, out) for s in cert["strategies"]], default=np.inf)
    if not plan["feasible"]:
        return out + (["a strategy fits, the plan says that none can"] if plan["proven"] and least < np.inf else [])
    s, cuts, rate = cert["plan"], plan["cuts"], plan["tokens_per_s"]
    if cuts != sorted({0, *cuts, len(index)}) or len(cuts) != s["stages"] + 1:
        return [*out, "cuts: the layers are not covered exactly once"]
    _check_shares(plan, s, out)
    stages = [sum(_plan_seconds(plan, s, i, k) for i in range(cuts[k], cuts[k + 1])) for k in range(s["stages"])]
    stages[-1] += max(np.multiply(plan["head"], s["head"]["unit_s"]))
    step = (s["stages"] * (max(stages) + s["send_s"]) + s["host_s"]) / s["replicas"] / s["sequences"]
    if cert["kind"] == "steady state" and abs(rate * step - 1) > EPS:
        out.append(f"objective: the shares give {1 / step:.1f} tokens/s, the plan says {rate:.1f}")
    if abs(cert["objective"] * rate - 1) > EPS or cert["lower_bound"] > min(least, cert["objective"]) * (1 + EPS):
        out.append("certificate: the bound is above what a strategy can reach, or the objective is not the plan's")
    return out


def _plan_seconds(plan: dict, s: dict, number: int, stage: int) -> float:
    """Seconds of a layer with the plan's shares; expert loads and the experts read follow from routing."""
    layer, cls, groups = plan["layers"][number], s["classes"][plan["index"][number]], s["expert_groups"]
    held = {n: (np.array(layer[n]), np.array(t["unit_s"]), np.array(t["fixed_s"])) for n, t in cls["terms"].items()}
    total = cls["other_s"] + sum(max(n * unit + (n > 0) * f) for k, (n, unit, f) in held.items() if k != "experts")
    if not plan["moes"][number]:
        return total
    t, used = cls["terms"]["experts"], -np.expm1(s["tokens"] * np.log1p(-plan["picked"][number]))
    expert, home, share = (np.array(column) for column in zip(*layer["resident"], strict=True))
    read, load = (np.bincount(home, x, groups) for x in (used[expert], plan["chance"][number][expert] * share))
    where = [(n, r, r // s["expert_tp"] - stage * groups) for r, n in enumerate(layer["experts"]) if n]
    return total + max(n * max(read[g] * t["unit_s"][r], load[g] * t["slots_s"][r]) for n, r, g in where)


def _check_shares(plan: dict, s: dict, out: list[str]) -> None:
    """Every tensor covered exactly once per copy by whole units; weights and cache within every device."""
    size, ranks = s["expert_groups"] * s["expert_tp"], s["expert_groups"] * s["expert_tp"] * s["stages"]
    weights, cache, ones = np.zeros(ranks), np.zeros(ranks), np.ones(ranks)
    covers = [(n, plan[n], s[n], first, ones) for n, first in (("embedding", 0), ("head", ranks - size))]
    for number, (layer, moe) in enumerate(zip(plan["layers"], plan["moes"], strict=True)):
        first, slots = size * (sum(cut <= number for cut in plan["cuts"]) - 1), ones
        if moe:
            share = {(e, g): f for e, g, f in layer["resident"]}
            served = np.bincount([e for e, _ in share], list(share.values()), moe["num_experts"])
            slots = np.bincount([g for _, g in share], minlength=s["expert_groups"]).repeat(s["expert_tp"])
            once = len(share) == len(layer["resident"]) and (s["copies"] or len(share) == len(served))
            if not once or max(abs(served - 1)) > EPS or min(share.values()) < 0 or max(slots) > s["expert_slots"]:
                out.append(f"layer {number}: experts are not each served once within {s['expert_slots']} slots a group")
        for name, t in s["classes"][plan["index"][number]]["terms"].items():
            covers.append((f"layer {number}: {name}", layer[name], t, first, slots if name == "experts" else ones))
    for name, shares, t, first, times in covers:
        held, starts = np.array(shares), np.arange(0, ranks, t["width"])
        wanted = t["units"] * ((starts >= first) & (starts < first + size))
        if any(held.reshape(-1, t["width"]).sum(1) != wanted) or min(held) < 0 or any(held % 1):
            out.append(f"{name} does not cover its {t['units']} units exactly once in each copy")
        weights += np.resize(times, ranks) * (held * t["bytes"] + (held > 0) * t["fixed_bytes"])
        cache += plan["kv_bytes"] * (held * t["kv"] + (held > 0) * t["fixed_kv"])
    for rank, entry in enumerate(plan["ranks"]):
        mine, kv = weights[rank % ranks], cache[rank % ranks]
        if abs(entry["weight_bytes"] - mine) > EPS * mine or abs(entry["kv_bytes_per_token"] - kv) > EPS * kv + EPS:
            out.append(f"rank {rank}: states {entry['weight_bytes']:.0f} bytes, its shares take {mine:.0f}")
        if mine + kv * plan["kv_tokens"] / s["replicas"] * s["attention_tp"] / size > plan["free"][rank] * (1 + EPS):
            out.append(f"rank {rank}: weights and {plan['kv_tokens']} cached tokens exceed its memory")


def _least_seconds(plan: dict, s: dict, reached: dict[str, float], out: list[str]) -> float:
    """Re-derives an entry's cache and time bounds; returns seconds per token, infinite where no request fits."""
    size, tp, stages, kept = s["expert_groups"] * s["expert_tp"], s["attention_tp"], range(s["stages"]), plan["weights"]
    cell, name, needs = np.lcm(tp, s["expert_tp"]), s["strategy"], np.zeros((len(plan["index"]), 2, 2))
    params, slots = s["embedding"]["units"] * s["embedding"]["params"], s["expert_slots"]
    for need, i, moe in zip(needs, plan["index"], plan["moes"], strict=True):  # bytes, bytes a token; of stage, cell
        for n, t in s["classes"][i]["terms"].items():
            bits = 16 if n == "attention" and kept["experts_only"] else kept["bits"]
            bits += 8 * kept["group_scale_bytes"] / t["group"] if t["group"] else 0
            if t["bytes"] < t["params"] * bits / 8 * (1 - EPS) or t["params"] % (t["group"] or 1):
                out.append(f"{name}: units of {n} are not whole groups of {kept['name']}")
            params += (moe["num_experts"] if n == "experts" else 1) * (t["units"] * t["params"] + t["fixed_params"])
            copies = np.array([size, cell]) // t["width"]
            if n == "experts":  # a cell, whole lanes and groups, holds those that the others have no slots for
                held = slots * s["expert_groups"] if s["copies"] else moe["num_experts"]
                copies = np.array([held, max(held - slots * (size - cell) // s["expert_tp"], 0)])
            fixed = t["fixed_bytes"] * (t["width"] if n == "attention" else 1)  # of the ranks of a copy that hold any
            kv = plan["kv_bytes"] * (t["units"] * t["kv"] + t["width"] * t["fixed_kv"])
            need += copies * (t["units"] * t["bytes"] + fixed), (kv, kv * cell / size)
    for end, at in (("embedding", 0), ("head", -1)):  # they lie with the first and with the last layer
        needs[at][0] += s[end]["units"] * s[end]["bytes"] * np.array([size, cell]) // tp
    cells = plan["free"][: size * len(stages)].reshape(len(stages), -1, cell).sum(2)
    space, each, every = np.stack([cells.sum(1), cells.min(1)], 1), *np.swapaxes(needs, 0, 1)
    length, batch = plan["workload"]["prompt_len"] + plan["workload"]["gen_len"], plan["workload"]["batch"]
    needed = max(length * max(1, -(-batch // s["replicas"])), reached.get(name, 0))  # what a layout here must cache
    reached[name], more = s["kv_tokens"], each + every * (max(s["kv_tokens"], 0) * (1 + EPS) + 1)
    roomy = s["kv_tokens"] == plan["most"][name] and _packs(space, [more] * len(stages))
    if roomy or params < plan["model"]["matrix_params"]:
        out.append(f"{name}: more than the stated {s['kv_tokens']:.0f} tokens could be cached")
    if s["lower_bound"] is None:
        return np.inf if s["kv_tokens"] < needed else 0.0
    left = (s["lower_bound"] * (1 - EPS) * s["replicas"] * s["sequences"] - s["host_s"]) / len(stages) - s["send_s"]
    seconds = np.array([[_least_layer(plan, s, i, k) for i in range(len(needs))] for k in stages])
    seconds[-1, -1] += _dealt(s["head"], size, stages[-1])
    few = s["sequences"] < (batch / s["replicas"] or min(4096, s["kv_tokens"] // length))
    beaten = _packs([(left, *free) for free in space], [np.c_[one, each + every * needed] for one in seconds])
    if plan["certificate"]["kind"] == "steady state" and (few or beaten):
        out.append(f"{name}: its stated bound of {1 / s['lower_bound']:.1f} tokens/s is not proven")
    return s["lower_bound"]


def _packs(room: list, costs: list) -> bool:  # layers fit the stages in order: each takes what it can, at least one
    taken = list[int]()
    for stage, (left, cost) in enumerate(zip(room, costs, strict=True)):
        taken.append(np.all(np.cumsum(cost[sum(taken) : len(cost) - len(room) + stage + 1], 0) <= left, 1).sum())
    return min(taken) > 0 and sum(taken) == len(costs[0])


def _dealt(t: dict, size: int, stage: int) -> float:
    """The stated least time of a tensor on a stage if some copy's whole units cannot be dealt in less; else 0."""
    unit_s, fixed_s = (np.array(t[n][stage * size :][:size]).reshape(-1, t["width"]) for n in ("unit_s", "fixed_s"))
    dealt = np.floor((t["least_s"][stage] - fixed_s.min(1, keepdims=True)) * (1 - EPS) / unit_s).sum(1)
    return t["least_s"][stage] if min(dealt) < t["units"] else 0.0


def _least_layer(plan: dict, s: dict, number: int, stage: int) -> float:
    cls, groups, slots = s["classes"][plan["index"][number]], s["expert_groups"], s["expert_slots"]
    size = groups * s["expert_tp"]
    total = cls["other_s"] + sum(_dealt(t, size, stage) for n, t in cls["terms"].items() if n in ("attention", "dense"))
    if not plan["moes"][number]:
        return total
    t, p, free = cls["terms"]["experts"], np.sort(plan["chance"][number]), slots * groups - len(plan["chance"][number])
    used = -np.expm1(s["tokens"] * np.log1p(-np.sort(plan["picked"][number])))
    read, load, blocks = (used.sum() + s["copies"] * free * used[0]) / groups, 1 / groups, t["units"] / t["width"]
    rates = [np.array(t[name][stage * size :][:size]) for name in ("unit_s", "slots_s")]
    if all(min(costs) == max(costs) for costs in rates):  # equal devices: crowded groups and hot experts bound as well
        low, blocks, read = max(len(p) - (groups - 1) * slots, 0), np.ceil(blocks), max(read, used[:slots].sum())
        met = p[: max(low - 2, 0)].sum() + p[-groups - 1 : len(p) - groups + 1].sum() if len(p) > groups else 0
        load = max(load, p[-1] / min(free + 1, groups) if s["copies"] else max(met, p[-1] + p[: max(low - 1, 0)].sum()))
    return total + blocks * max(work * size / (1 / cost).sum() for work, cost in zip((read, load), rates, strict=True))

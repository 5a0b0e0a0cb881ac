"""Algorithms that deal experts to groups: EPLB packing, swap descent, token shares by LP, residency by MILP.

All work on one layer: `load` f64[E] (any unit), G groups of at most S slots. A residency is bool[E, G], a share
f64[E, G]
with rows that sum to 1 and zeros where the expert is not resident. An assignment is i64[E].
"""

from __future__ import annotations

import numpy as np


def pack_heaviest_first(load: np.ndarray, num_groups: int) -> np.ndarray:
    """Assigns items, heaviest first, to the lightest group with room; groups end with equal counts where E % G == 0.

    Source: the balanced packing that DeepSeek describes for EPLB (longest processing time first, equal counts).
    """
    most = -(-len(load) // num_groups)
    full = len(load) - (most - 1) * num_groups  # groups that may hold `most` items
    total, count = np.zeros(num_groups), np.zeros(num_groups, dtype=int)
    assignment = np.empty(len(load), dtype=int)
    for item in np.argsort(-load, kind="stable"):
        may_fill = np.sum(count == most) < full
        room = np.flatnonzero(count < (most if may_fill else most - 1))
        group = room[np.argmin(total[room])]
        assignment[item] = group
        total[group] += load[item]
        count[group] += 1
    return assignment


def replicate_and_pack(load: np.ndarray, num_groups: int, slots: int) -> np.ndarray:
    """EPLB: copies the expert with the most load per copy until all slots are used, then packs the copies. Even shares.

    Returns:
        f64[E, G] shares; two copies that land on one group count there twice.
    """
    copies = np.ones(len(load), dtype=int)
    for _ in range(num_groups * slots - len(load)):
        copies[np.argmax(load / copies)] += 1
    owner = np.repeat(np.arange(len(load)), copies)
    assignment = pack_heaviest_first((load / copies)[owner], num_groups)
    share = np.zeros((len(load), num_groups))
    np.add.at(share, (owner, assignment), 1.0 / copies[owner])
    return share


def one_hot(assignment: np.ndarray, num_groups: int) -> np.ndarray:
    """f64[E, G] shares of an assignment without copies."""
    return np.eye(num_groups)[assignment]


def swap_descent(
    loads: np.ndarray, assignment: np.ndarray, num_groups: int, max_swaps: int = 400, enough: float = 0.0
) -> np.ndarray:
    """Swaps two experts as long as the mean over scenarios of the greatest group load falls; counts per group stay.

    Args:
        loads: f64[N, E], one row per scenario; one row gives plain descent on a trace.
        enough: stop once the value is this low: swaps beyond what is needed only fit the trace's noise.
    """
    assignment = assignment.copy()
    num_scenarios = len(loads)
    total = np.zeros((num_scenarios, num_groups))
    np.add.at(total.T, assignment, loads.T)
    value = total.max(axis=1).mean()
    for _ in range(max_swaps):
        if value <= enough:
            break
        heavy = np.bincount(total.argmax(axis=1), minlength=num_groups).argmax()
        inside, outside = np.flatnonzero(assignment == heavy), np.flatnonzero(assignment != heavy)
        other = assignment[outside]
        moved = loads[:, inside][:, :, None] - loads[:, outside][:, None, :]  # [N, I, J]
        rest = _greatest_without(total, heavy, other)  # [N, J]
        worst = np.maximum(total[:, heavy, None, None] - moved, total[:, other][:, None, :] + moved)
        worst = np.maximum(worst, rest[:, None, :]).mean(axis=0)
        i, j = np.unravel_index(worst.argmin(), worst.shape)
        if worst[i, j] >= value * (1 - 1e-9):
            break
        gain = loads[:, inside[i]] - loads[:, outside[j]]
        total[:, heavy] -= gain
        total[:, other[j]] += gain
        assignment[inside[i]], assignment[outside[j]] = other[j], heavy
        value = worst[i, j]
    return assignment


def _greatest_without(total: np.ndarray, heavy: int, other: np.ndarray) -> np.ndarray:
    """f64[N, J]: the greatest group load leaving out `heavy` and other[j]."""
    masked = total.copy()
    masked[:, heavy] = -np.inf
    if masked.shape[1] < 3:
        return np.full((len(total), len(other)), -np.inf)
    order = np.argsort(-masked, axis=1)[:, :2]
    first, second = (np.take_along_axis(masked, order[:, i : i + 1], axis=1) for i in (0, 1))
    return np.where(order[:, :1] == other[None, :], second, first)


def even_out_shares(load: np.ndarray, resident: np.ndarray) -> tuple[np.ndarray, float]:
    """Token shares with the least greatest group load for a fixed residency, by linear programming (HiGHS).

    Returns:
        (f64[E, G] shares, the greatest load). Exact up to the solver's 1e-7.
    """
    import scipy.sparse as sparse
    from scipy.optimize import linprog

    expert, group = np.nonzero(resident)
    n, num_experts, num_groups = len(expert), *resident.shape
    scale = max(float(load.sum()), 1e-300)
    by_group = sparse.csr_matrix((load[expert] / scale, (group, np.arange(n))), (num_groups, n))
    by_group = sparse.hstack([by_group, sparse.csr_matrix(-np.ones((num_groups, 1)))])
    whole = sparse.csr_matrix((np.ones(n), (expert, np.arange(n))), (num_experts, n + 1))
    cost = np.append(np.zeros(n), 1.0)
    found = linprog(cost, by_group, np.zeros(num_groups), whole, np.ones(num_experts), method="highs")
    share = np.zeros(resident.shape)
    if found.x is None:  # numerical failure: even shares are always feasible
        share = resident / resident.sum(axis=1, keepdims=True)
    else:
        share[expert, group] = np.maximum(found.x[:n], 0)
        share /= share.sum(axis=1, keepdims=True)
    return share, float((load @ share).max())


def residency_by_milp(
    load: np.ndarray, num_groups: int, slots: int, node_limit: int = 500
) -> tuple[np.ndarray, float] | None:
    """Residency and shares together by mixed-integer programming.

    Returns:
        (f64[E, G] shares, proven lower bound on the greatest load); None where the limit came first.
    """
    import scipy.sparse as sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    num_experts, n = len(load), len(load) * num_groups
    scale = float(load.sum()) / num_groups
    held, shared, one = sparse.eye(n), sparse.eye(n), np.ones
    none = sparse.csr_matrix
    rows = [
        sparse.hstack([-held, shared, none((n, 1))]),
        sparse.hstack(
            [none((num_experts, n)), sparse.kron(sparse.eye(num_experts), one((1, num_groups))), none((num_experts, 1))]
        ),
        sparse.hstack([sparse.kron(one((1, num_experts)), sparse.eye(num_groups)), none((num_groups, n + 1))]),
        sparse.hstack(
            [none((num_groups, n)), sparse.kron(load[None, :] / scale, sparse.eye(num_groups)), -one((num_groups, 1))]
        ),
    ]
    low = np.concatenate([np.full(n, -np.inf), np.ones(num_experts), np.full(2 * num_groups, -np.inf)])
    high = np.concatenate([np.zeros(n), np.ones(num_experts), np.full(num_groups, slots), np.zeros(num_groups)])
    found = milp(
        np.append(np.zeros(2 * n), 1.0),
        constraints=LinearConstraint(sparse.vstack(rows).tocsr(), low, high),
        integrality=np.concatenate([np.ones(n), np.zeros(n + 1)]),
        bounds=Bounds(np.append(np.zeros(2 * n), 1.0), np.append(np.ones(2 * n), float(num_groups))),
        options={"node_limit": node_limit, "mip_rel_gap": 1e-3},
    )
    if found.x is None:
        return None
    share = np.maximum(found.x[n : 2 * n].reshape(num_experts, num_groups), 0)
    share /= share.sum(axis=1, keepdims=True)
    return share, max(float(found.mip_dual_bound), 1.0) * scale


def load_bound(load: np.ndarray, num_groups: int, copies_allowed: bool, slots: int) -> float:
    """A lower bound on the greatest group load for any residency of at most `slots` experts a group.

    The mean always bounds. With copies, the heaviest expert is at best spread over all spare slots. Without copies
    the heaviest expert is joined by the lightest ones that must sit with it, and of the G + 1 heaviest two must meet
    (pigeonhole).
    """
    mean = float(load.sum()) / num_groups
    if copies_allowed:
        copies = num_groups * slots - len(load) + 1
        return max(mean, float(load.max()) / min(copies, num_groups))
    least = max(len(load) - (num_groups - 1) * slots, 0)  # experts that the emptiest group must still hold
    ordered = np.sort(load)[::-1]
    lightest = np.concatenate([[0.0], np.cumsum(ordered[::-1])])
    bound = max(mean, float(ordered[0] + lightest[max(least - 1, 0)]))
    if len(load) > num_groups:
        bound = max(bound, float(ordered[num_groups - 1] + ordered[num_groups] + lightest[max(least - 2, 0)]))
    return bound

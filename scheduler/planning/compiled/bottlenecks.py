"""Equal layers on n devices: the least largest stage of k, and a split that has it (`planning.uniform` says why this is exact).

Seconds of the mean step: ``stage [n]`` before its layers, ``layer [n]`` each of them, ``last [n]`` the LM head. ``memory [4, n]`` are the layers for
which a device has memory as an inner, a first, a last and an only stage, as `caps` are the layers within a bound, too; `NEVER` where it
cannot be that at all.
"""

import math

import numpy as np

from scheduler.planning.compiled.build import F1, F2, F3, I1, I2, INT, REAL, kernel, part, sort_by
from scheduler.planning.convoy import slow_weight
from scheduler.planning.splits import SLACK

INNER, FIRST, LAST, ONLY = range(4)
NEVER = -1e9
"""It spoils any sum, and unlike -inf it can be subtracted again."""
_SLACK = SLACK


@part
def _whole(layers):
    return math.floor(layers * (1.0 + _SLACK / 4) + _SLACK / 4)


@part
def _or_never(layers, least):
    return layers if layers >= least else NEVER


@part
def _memory_caps(room, first_bytes, last_bytes, layer_bytes, num_layers):
    caps = np.empty((4, len(room)))
    for d in range(len(room)):
        for role in range(4):
            left = room[d]
            if role in (FIRST, ONLY):
                left -= first_bytes
            if role in (LAST, ONLY):
                left -= last_bytes
            layers = _whole(min(left / layer_bytes, float(num_layers)))
            caps[role, d] = _or_never(layers, 1.0 if role == INNER else 0.0)
    return caps


@kernel(F1, REAL, REAL, REAL, INT)
def memory_caps(room, first_bytes, last_bytes, layer_bytes, num_layers):
    """``[4, n]``: for how many layers of `layer_bytes` devices with ``room [n]`` bytes have memory in each role."""
    return _memory_caps(room, first_bytes, last_bytes, layer_bytes, num_layers)


@part
def _fill_caps(bound, stage, layer, last, memory, caps):
    for d in range(len(stage)):
        free = _whole(min((bound - stage[d]) / layer[d], 1e9))
        ending = _whole(min((bound - stage[d] - last[d]) / layer[d], 1e9))
        caps[INNER, d] = _or_never(min(free, memory[INNER, d]), 1.0)
        caps[FIRST, d] = _or_never(min(free, memory[FIRST, d]), 0.0)
        caps[LAST, d] = _or_never(min(ending, memory[LAST, d]), 0.0)
        caps[ONLY, d] = _or_never(min(ending, memory[ONLY, d]), 0.0)


@kernel(REAL, F1, F1, F1, F2)
def caps_within(bound, stage, layer, last, memory):
    """``[4, n]``: the layers that each device may hold in each role with no stage above `bound`."""
    caps = np.empty(memory.shape)
    _fill_caps(bound * (1.0 + _SLACK), stage, layer, last, memory, caps)
    return caps


@part
def _fill_ranked(inner, num_layers, devices, count, ranked, sums):
    """Devices by how many layers they hold, most first, those of ``devices [n]`` earlier among equals, into ``ranked [n]``; what the first ones
    hold together into ``sums [n + 1]``. ``count [num_layers + 3]`` is scratch."""
    count[:] = 0
    for d in devices:
        count[1 + _bucket(inner[d], num_layers)] += 1
    for b in range(1, len(count)):
        count[b] += count[b - 1]
    for d in devices:
        b = _bucket(inner[d], num_layers)
        ranked[count[b]] = d
        count[b] += 1
    sums[0] = 0.0
    for position in range(len(ranked)):
        sums[position + 1] = sums[position] + inner[ranked[position]]


@part
def _bucket(layers, num_layers):
    return max(num_layers - int(layers), 0) if layers >= 0.0 else num_layers + 1


@part
def _held(caps, ranked, sums, k, i, j):
    """The most layers of k >= 2 devices, of which those at places `i` and `j` of ``ranked [n]`` are the first and the last stage: these and
    the k - 2 others that hold most."""
    low, high, q = min(i, j), max(i, j), k - 2
    if low >= q:
        inner = sums[q]
    elif high > q:
        inner = sums[q + 1] - caps[INNER, ranked[low]]
    else:
        inner = sums[q + 2] - caps[INNER, ranked[low]] - caps[INNER, ranked[high]]
    return inner + caps[FIRST, ranked[i]] + caps[LAST, ranked[j]]


@part
def _can_hold(caps, k, num_layers, devices, count, ranked, sums):
    """Whether k of the devices can hold all layers."""
    n = caps.shape[1]
    if k == 1:
        alone = NEVER
        for d in range(n):
            alone = max(alone, caps[ONLY, d])
        return alone >= num_layers
    _fill_ranked(caps[INNER], num_layers, devices, count, ranked, sums)
    # at most what the best k hold as inner stages; an end is one of them or takes the place of the least, and costs what it holds less
    most, least = 0.0, max(caps[INNER, ranked[k - 1]], 0.0)
    for position in range(k):
        most += max(caps[INNER, ranked[position]], 0.0)
    first = last = -math.inf
    for d in range(n):
        inner = max(caps[INNER, d], least)
        first, last = max(first, caps[FIRST, d] - inner), max(last, caps[LAST, d] - inner)
    if most + first + last < num_layers:
        return False
    for i in range(n):
        for j in range(n):
            if i != j and _held(caps, ranked, sums, k, i, j) >= num_layers:
                return True
    return False


@part
def _least_bottleneck(stage, layer, last, memory, k, num_layers, caps, devices, count, ranked, sums):
    """The least possible largest stage, inf where nothing fits the memory. The last five are scratch.

    It is a value at which some device can take one more layer. Between the largest one that is known to do and the smallest one that is not
    known not to, halves are tried.
    """
    low, high = math.inf, 0.0
    for d in range(len(stage)):
        low, high = min(low, stage[d]), max(high, stage[d] + layer[d] * num_layers + last[d])
    _fill_caps(2.0 * high, stage, layer, last, memory, caps)
    if not _can_hold(caps, k, num_layers, devices, count, ranked, sums):
        return math.inf
    while low < high * (1.0 - _SLACK):
        middle = 0.5 * (low + high)
        _fill_caps(middle, stage, layer, last, memory, caps)
        holds = _can_hold(caps, k, num_layers, devices, count, ranked, sums)
        nearest = 0.0 if holds else math.inf
        for d in range(len(stage)):
            for fixed in (stage[d], stage[d] + last[d]):
                layers = _whole((middle - fixed) / layer[d])
                if holds and layers >= 0.0:
                    nearest = max(nearest, fixed + layers * layer[d])
                elif not holds:
                    nearest = min(nearest, fixed + max(layers + 1.0, 0.0) * layer[d])
        if holds:
            high = min(nearest, middle)
        else:
            low = max(nearest, middle)
    return high


@part
def _fill_order(caps, k, num_layers, rank, num_wanted, ranked, sums, order):
    """k devices that together hold all layers, into ``order [k]``; wanted ones, and at their ends, where that makes no difference. False: none do.

    ``rank [n]`` is a device's place among the wanted, n for those that are not; ``ranked [n]`` is to hold devices by rank.
    """
    n = len(rank)
    if k == 1:
        for d in ranked:
            if caps[ONLY, d] >= num_layers:
                order[0] = d
                return True
        return False
    by_rank = np.empty(n, np.int64)
    for position in range(n):
        by_rank[position] = ranked[position]
    _fill_ranked(caps[INNER], num_layers, by_rank, np.empty(num_layers + 3, np.int64), ranked, sums)
    best, first, last = -1.0, -1, -1
    for i in range(n):
        for j in range(n):
            if i == j:
                continue
            a, b = rank[ranked[i]], rank[ranked[j]]
            merit = 0.5 * (a < n) + 0.5 * (b < n)
            if num_wanted:
                merit += 2.0 * (a == 0) + 2.0 * (b == num_wanted - 1)
            if merit > best and _held(caps, ranked, sums, k, i, j) >= num_layers:
                best, first, last = merit, i, j
    if first < 0:
        return False
    order[0], order[k - 1] = ranked[first], ranked[last]
    filled = 1
    for position in range(n):
        if filled == k - 1:
            break
        if position not in (first, last):
            d = ranked[position]
            at = filled  # in the order of the wanted, then by index
            while at > 1 and (rank[order[at - 1]], order[at - 1]) > (rank[d], d):
                order[at] = order[at - 1]
                at -= 1
            order[at] = d
            filled += 1
    return True


@part
def _fill_counts(caps, order, cuts, num_layers, counts):
    """Layers of each stage within the caps, boundaries as near to ``cuts [k - 1]`` as that allows; without cuts, even shares. False: no room."""
    k = len(order)
    total, least = 0.0, max(0, k - 2)
    for i in range(k):
        counts[i] = caps[ONLY if k == 1 else FIRST if i == 0 else LAST if i == k - 1 else INNER, order[i]]
        if counts[i] < 0:
            return False
        total += counts[i]
    if total < num_layers or least > num_layers:
        return False
    start, before = 0, 0
    for i in range(k):
        most = counts[i]
        before += most
        mine = 1 if 0 < i < k - 1 else 0
        least -= mine
        aim = round(before * num_layers / total) if len(cuts) != k - 1 or i == k - 1 else cuts[i]
        stop = min(max(aim, start + mine, num_layers - (int(total) - before)), start + most, num_layers - least)
        counts[i] = stop - start
        start = stop
    return True


@kernel(F1, F1, F1, F2, INT, INT, I1, I1, I1, I1)
def least_bottleneck(stage, layer, last, memory, k, num_layers, wanted, cuts, order, counts):
    """The least largest stage of k, inf where nothing fits the memory, and a split that has it into ``order [k]`` and ``counts [k]``; among
    equals one of the devices ``wanted`` in this order, with boundaries near ``cuts``."""
    n = len(stage)
    caps, rank, devices = np.empty((4, n)), np.arange(n) * 0 + n, np.arange(n)
    ranked, sums, count = np.empty(n, np.int64), np.empty(n + 1), np.empty(num_layers + 3, np.int64)
    bound = _least_bottleneck(stage, layer, last, memory, k, num_layers, caps, devices, count, ranked, sums)
    if bound == math.inf:
        return bound
    _fill_caps(bound * (1.0 + _SLACK), stage, layer, last, memory, caps)
    if len(wanted) == k:
        for i in range(k):
            order[i] = wanted[i]
        if _fill_counts(caps, order, cuts, num_layers, counts):
            return bound
    filled = 0
    for place in range(len(wanted)):
        rank[wanted[place]] = place
        ranked[filled] = wanted[place]
        filled += 1
    for d in range(n):
        if rank[d] == n:
            ranked[filled] = d
            filled += 1
    found = _fill_order(caps, k, num_layers, rank, len(wanted), ranked, sums, order)
    found = found and _fill_counts(caps, order, cuts[:0], num_layers, counts)
    assert found  # what can be held can be given out
    return bound


@kernel(F1, REAL, REAL, REAL, REAL, INT, I1, F1)
def with_room(room, first_bytes, last_bytes, layer_bytes, kv_bytes, num_layers, ks, in_service):
    """``[R]``: the sequences ``in_service [R]``, halved until the KV of so many, `kv_bytes` a layer each, has room on some ``ks [R]`` of the devices; 1
    at least."""
    n = len(room)
    devices, ranked, sums = np.arange(n), np.empty(n, np.int64), np.empty(n + 1)
    count, held = np.empty(num_layers + 3, np.int64), np.empty(len(ks))
    for r in range(len(ks)):
        held[r] = max(1.0, in_service[r])
        while held[r] > 1.0:
            caps = _memory_caps(room, first_bytes, last_bytes, layer_bytes + held[r] * kv_bytes, num_layers)
            if _can_hold(caps, ks[r], num_layers, devices, count, ranked, sums):
                break
            held[r] = max(1.0, held[r] / 2.0)
    return held


@kernel(F2, INT, INT)
def can_hold(memory, k, num_layers):
    """Whether k of the devices have memory for all layers."""
    n = memory.shape[1]
    count, ranked, sums = np.empty(num_layers + 3, np.int64), np.empty(n, np.int64), np.empty(n + 1)
    return _can_hold(memory, k, num_layers, np.arange(n), count, ranked, sums)


@kernel(F2, F2, F2, INT, I1)
def relaxed_bottlenecks(stage, layer, last, num_layers, ks):
    """``[R]``: the largest stage of R problems, ``[R, n]`` each, of ``ks [R]`` stages, if layers could be cut anywhere and memory did not matter: no split
    has a smaller one.

    The share that k devices hold under a bound is a convex, piecewise linear function of it, so Newton's method finds the
    bound in a few steps, and exactly.
    """
    n = stage.shape[1]
    bounds, order, lacking = np.empty(len(ks)), np.empty(n, np.int64), np.empty(n)
    for r in range(len(ks)):
        head = bound = math.inf
        for d in range(n):
            order[d], lacking[d] = d, layer[r, d]
            head = min(head, last[r, d] / layer[r, d])
        for _ in range(20):
            sort_by(lacking, order)
            held, lost = 0.0, 0.0
            for d in order[: ks[r]]:
                held += 1.0 / layer[r, d]
                lost += stage[r, d] / layer[r, d]
            following = min(bound, (num_layers + head + lost) / held)
            if not following < bound * (1.0 - _SLACK):
                break
            bound = following
            for d in range(n):
                lacking[d] = (stage[r, d] - bound) / layer[r, d]
        bounds[r] = bound
    return bounds


@kernel(F3, F3, F3, F1, F1, F1, F1, I1, INT, F1)
def round_bounds(stage, layer, last, busiest, fastest, share, in_flight, ks, num_layers, limits):
    """``[R]``: no split over ``ks [R]`` devices has a round that is shorter than this and than its ``limits [R]``.

    ``stage``, ``layer`` and ``last`` ``[3, R, n]`` are those of fast, slow and mean steps. No busiest stage is below ``busiest [R]`` in mean and
    ``fastest [R]`` in a fast step; and of a slow step no device holds more layers than the mean step allows within the limit.
    """
    bounds, order = np.empty(len(ks)), np.empty(stage.shape[2], np.int64)
    for r in range(len(ks)):
        slow, left = math.inf, float(num_layers)
        for d in range(len(order)):
            order[d] = d
            slow = min(slow, last[1, r, d])
        sort_by(stage[1, r], order)
        for d in order[: ks[r]]:
            slow += stage[1, r, d]
        sort_by(layer[1, r], order)
        for d in order:
            within = (limits[r] / in_flight[r] - stage[2, r, d]) / layer[2, r, d]
            held = min(left, max(within, 0.0))
            slow += held * layer[1, r, d]
            left -= held
        is_full = in_flight[r] >= ks[r]  # then no stage is less busy than it would be in mean
        weight = slow_weight(share[r], in_flight[r], 1.0 if is_full else 0.0)
        along = (1.0 - weight) * in_flight[r] * fastest[r] if is_full else 0.0
        bounds[r] = max(in_flight[r] * busiest[r], weight * slow + along)
    return bounds


@kernel(F1, F1, F1, F2, INT, I2, I1)
def least_sum(stage, layer, last, caps, num_layers, orders, counts):
    """Which of the ``orders [C, k]`` of devices has the least sum of stages within ``caps [4, n]``, its layers into ``counts [k]``; -1: none has room.

    Of each order that has room the least sum comes from giving layers to the devices on which one costs least.
    """
    n, k = len(stage), orders.shape[1]
    by_cost, place, cap, least = np.arange(n), np.empty(n, np.int64), np.empty(k), np.empty(k)
    sort_by(layer, by_cost)
    best, winner = math.inf, -1
    for c in range(len(orders)):
        place[:] = -1
        total, left = last[orders[c, k - 1]], float(num_layers)
        for i in range(k):
            d, is_end = orders[c, i], i == 0 or i == k - 1
            place[d] = i
            cap[i] = caps[ONLY if k == 1 else FIRST if i == 0 else LAST if is_end else INNER, d]
            least[i] = 0.0 if is_end else 1.0
            total += stage[d] + (least[i] * layer[d] if cap[i] >= least[i] else math.inf)
            left -= least[i]
        for d in by_cost:
            if left <= 0.0 or total >= best:
                break
            if place[d] >= 0:
                more = min(left, cap[place[d]] - least[place[d]])
                total += more * layer[d]
                left -= more
        if left == 0.0 and total < best:
            best, winner = total, c
            for i in range(k):
                counts[i] = int(least[i])
            left = num_layers - least.sum()
            for d in by_cost:
                if place[d] >= 0:
                    more = min(left, cap[place[d]] - least[place[d]])
                    counts[place[d]] += int(more)
                    left -= more
    return winner

"""Rounds of whole splits by the law of convoys: the shortest one of few devices, exactly, and the best of many splits.

Inside of `shortest_round` the n devices are sorted by what a layer costs them in a slow step, the cheapest first, and have

    fixed   [3, 4, n]  seconds of a stage before its layers, in a fast, a slow and a mean step, as an inner, a first, a last and an only stage
    layer   [3, n]     seconds of each layer
    memory  [4, n]     layers for which there is memory in each role, below 0 where a device cannot be that

`planning.exact` has the reasoning.
"""

import math

import numpy as np

from scheduler.planning.compiled.build import F1, F2, F3, I1, I2, INT, REAL, kernel, part, sort_by
from scheduler.planning.convoy import round_seconds, slow_weight
from scheduler.planning.splits import SLACK

FAST, SLOW, MEAN = range(3)
INNER, FIRST, LAST, ONLY = range(4)
_SLACK = SLACK


@part
def _layers_within(limit, fixed, layer):
    return float(math.floor(min((limit - fixed) / layer, 1e9) + _SLACK))


@part
def _fill(layer, caps, least, devices, num_layers, counts):
    """Layers where a slow step is cheapest, up to ``caps [k]``, ``least [k]`` at least, into ``counts [k]``; the seconds of these layers in a
    slow step, inf where they have no room."""
    left = num_layers
    for i in range(len(devices)):
        if caps[i] < least[i]:
            return math.inf
        left -= least[i]
    if left < 0.0:
        return math.inf
    seconds = 0.0
    for i in range(len(devices)):
        more = min(left, caps[i] - least[i])
        counts[i] = least[i] + more
        left -= more
        seconds += counts[i] * layer[SLOW, devices[i]]
    return math.inf if left > 0.0 else seconds


@part
def _fill_caps(limit, kind, fixed, layer, memory, devices, roles, caps):
    """Into ``caps [k]``: the layers that fit the memory with no stage of a step of this kind above `limit`. False: some device has none."""
    for i in range(len(devices)):
        d, role = devices[i], roles[i]
        caps[i] = min(_layers_within(limit, fixed[kind, role, d], layer[kind, d]), memory[role, d])
        if caps[i] < 0.0:
            return False
    return True


@part
def _scan(weight, in_flight, fixed, layer, memory, devices, roles, num_layers, limit, counts, best):
    """The shortest round below `limit` of devices in these roles, its layers into ``best [k]``; `limit` if there is none.

    With no fast stage above F and within the limit the least sum of slow stages comes from filling the devices where that is cheapest. So F goes
    down from the most that the sum leaves: each time to just below the busiest fast stage that there was, since between the two
    nothing changes. Where the busiest mean stage is what counts, the lower limit may change the filling, and F stays.
    """
    k = len(devices)
    caps, fast_caps, least = np.empty(k), np.empty(k), np.empty(k)
    slow_fixed = share = idle = 0.0
    for i in range(k):
        d, role = devices[i], roles[i]
        least[i] = 1.0 if role == INNER else 0.0
        slow_fixed += fixed[SLOW, role, d]
        share += 1.0 / layer[FAST, d]
        idle += fixed[FAST, role, d] / layer[FAST, d]
    evenly = (num_layers + idle) / share  # the busiest fast stage if layers could be cut anywhere
    of_fast = (1.0 - weight) * in_flight
    if not _fill_caps(limit / in_flight, MEAN, fixed, layer, memory, devices, roles, caps):
        return limit
    at_most = math.inf
    while True:
        tried = at_most
        for i in range(k):
            d = devices[i]
            fast_caps[i] = min(caps[i], _layers_within(at_most, fixed[FAST, roles[i], d], layer[FAST, d]))
        slow = slow_fixed + _fill(layer, fast_caps, least, devices, num_layers, counts)
        if not weight * slow + of_fast * evenly < limit:
            return limit
        if of_fast > 0.0 and (limit - weight * slow) / of_fast < at_most:
            at_most = (limit - weight * slow) / of_fast  # what else there is to gain leaves fast stages no more
        fast = mean = 0.0
        for i in range(k):
            d, role = devices[i], roles[i]
            fast = max(fast, fixed[FAST, role, d] + counts[i] * layer[FAST, d])
            mean = max(mean, fixed[MEAN, role, d] + counts[i] * layer[MEAN, d])
        convoy = weight * slow + of_fast * fast
        seconds = max(in_flight * mean, convoy)
        if seconds < limit:
            for i in range(k):
                best[i] = counts[i]
            limit = seconds * (1.0 - _SLACK)
            if not _fill_caps(limit / in_flight, MEAN, fixed, layer, memory, devices, roles, caps):
                return limit
            if in_flight * mean > convoy:
                continue
        if of_fast <= 0.0:
            return limit
        at_most = min(at_most, fast * (1.0 - _SLACK), tried * (1.0 - 4.0 * _SLACK))


@part
def _bound(weight, in_flight, fixed, layer, memory, devices, roles, num_layers, limit, caps, least, counts):
    """No round below `limit` of devices in these roles is shorter; inf: there is none."""
    if not _fill_caps(limit / in_flight, MEAN, fixed, layer, memory, devices, roles, caps):
        return math.inf
    slow = share = idle = 0.0
    for i in range(len(devices)):
        d, role = devices[i], roles[i]
        least[i] = 1.0 if role == INNER else 0.0
        slow += fixed[SLOW, role, d]
        share += 1.0 / layer[FAST, d]
        idle += fixed[FAST, role, d] / layer[FAST, d]
    slow += _fill(layer, caps, least, devices, num_layers, counts)
    return weight * slow + (1.0 - weight) * in_flight * (num_layers + idle) / share


@part
def _bound_of_any_ends(weight, in_flight, fixed, layer, memory, devices, num_layers, limit):
    """The same whichever of the devices is first and whichever is last."""
    slow = share = idle = 0.0
    left, head_s = float(num_layers), math.inf
    for d in devices:
        role = ONLY if len(devices) == 1 else FIRST
        within = _layers_within(limit / in_flight, fixed[MEAN, FIRST, d], layer[MEAN, d])
        most = max(max(memory[INNER, d], memory[FIRST, d]), max(memory[LAST, d], memory[role, d]))
        count = max(0.0, min(min(left, within), most))
        left -= count
        slow += fixed[SLOW, FIRST, d] + count * layer[SLOW, d]
        share += 1.0 / layer[FAST, d]
        idle += fixed[FAST, FIRST, d] / layer[FAST, d]
        head_s = min(head_s, fixed[SLOW, LAST, d] - fixed[SLOW, FIRST, d])
    if left > 0.0:
        return math.inf
    return weight * (slow + head_s) + (1.0 - weight) * in_flight * (num_layers + idle) / share


@kernel(REAL, REAL, F2, F2, F2, F2, INT, REAL, I2, I1, F1)
def shortest_round(share, in_flight, stage, layer, last, memory, num_layers, limit, chosen, order, counts):
    """The shortest round below `limit` of k stages on n devices, inf if there is none; its devices into ``order [k]``, first to last, and their layers
    into ``counts [k]``.

    A `share` of the steps is slow, and `in_flight` of them are, k at least. ``stage``, ``layer`` and ``last`` ``[2, n]`` are the seconds of a stage before
    its layers, of each layer and of the LM head, in a fast and a slow step; ``memory [4, n]`` layers. ``chosen [S, k]`` are all choices of k
    devices, each ascending.
    """
    k, n = chosen.shape[1], layer.shape[1]
    weight = slow_weight(share, in_flight, 1.0)
    by_cost = np.arange(n)
    sort_by(layer[SLOW], by_cost)
    fixed, each, room, like_before = np.empty((3, 4, n)), np.empty((3, n)), np.empty((4, n)), np.empty(n, np.bool_)
    for at in range(n):
        d = by_cost[at]
        alike = at > 0
        for kind in range(3):
            slow = float(kind) if kind < MEAN else share
            each[kind, at] = (1.0 - slow) * layer[FAST, d] + slow * layer[SLOW, d]
            inner = (1.0 - slow) * stage[FAST, d] + slow * stage[SLOW, d]
            ending = inner + (1.0 - slow) * last[FAST, d] + slow * last[SLOW, d]
            fixed[kind, INNER, at] = fixed[kind, FIRST, at] = inner
            fixed[kind, LAST, at] = fixed[kind, ONLY, at] = ending
            alike = alike and each[kind, at] == each[kind, at - 1]
            alike = alike and inner == fixed[kind, INNER, at - 1] and ending == fixed[kind, LAST, at - 1]
        for role in range(4):
            room[role, at] = min(memory[role, d], float(num_layers))
            alike = alike and room[role, at] == room[role, at - 1]
        like_before[at] = alike
    bounds, ids = _promising(weight, in_flight, fixed, each, room, like_before, num_layers, limit, chosen)
    seconds, winner, num_ends = limit, -1, max(1, k * (k - 1))
    roles, filled, best = np.empty(k, np.int64), np.empty(k), np.empty(k)
    best_first = np.arange(len(bounds))
    sort_by(bounds, best_first)
    for found in best_first:
        if not bounds[found] < seconds:
            break
        devices = chosen[ids[found] // num_ends]
        _fill_roles(ids[found] % num_ends, roles)
        better = _scan(weight, in_flight, fixed, each, room, devices, roles, num_layers, seconds, filled, best)
        if better < seconds:
            seconds, winner = better, ids[found]
            for i in range(k):
                counts[i] = best[i]
    if winner < 0:
        return math.inf
    devices = chosen[winner // num_ends]
    _fill_roles(winner % num_ends, roles)
    inner = 1
    for i in range(k):
        filled[i] = counts[i]
    for i in range(k):
        at = 0 if roles[i] in (FIRST, ONLY) else k - 1 if roles[i] == LAST else inner
        if roles[i] == INNER:
            inner += 1
        order[at], counts[at] = by_cost[devices[i]], filled[i]
    return seconds / (1.0 - _SLACK)


@part
def _promising(weight, in_flight, fixed, layer, memory, like_before, num_layers, limit, chosen):
    """``[C]`` each: of the arrangements that may have a round below `limit` a bound on it, and which they are: a choice of devices times the
    number of ways to choose the ends, and that way (`_fill_roles`)."""
    k = chosen.shape[1]
    num_ends = max(1, k * (k - 1))
    bounds, ids = np.empty(len(chosen) * num_ends), np.empty(len(chosen) * num_ends, np.int64)
    roles, caps, least, filled = np.empty(k, np.int64), np.empty(k), np.empty(k), np.empty(k)
    is_in, found = np.empty(len(like_before), np.bool_), 0
    for s in range(len(chosen)):
        devices = chosen[s]
        is_in[:] = False
        for d in devices:
            is_in[d] = True
        skips = False
        for d in devices:  # of devices that are alike the first ones will do
            skips = skips or (like_before[d] and not is_in[d - 1])
        if skips or not _bound_of_any_ends(weight, in_flight, fixed, layer, memory, devices, num_layers, limit) < limit:
            continue
        for ends in range(num_ends):
            _fill_roles(ends, roles)
            bound = _bound(
                weight, in_flight, fixed, layer, memory, devices, roles, num_layers, limit, caps, least, filled
            )
            if bound < limit:
                bounds[found], ids[found] = bound, s * num_ends + ends
                found += 1
    return bounds[:found], ids[:found]


@part
def _fill_roles(ends, roles):
    """Number `ends` of the ways to choose a first and a last stage."""
    k = len(roles)
    if k == 1:
        roles[0] = ONLY
        return
    first, last = ends // (k - 1), ends % (k - 1)
    roles[:] = INNER
    roles[first], roles[last + (last >= first)] = FIRST, LAST


@kernel(REAL, REAL, F3, F2, F2, F1, F1, REAL, REAL, I2, I2)
def shortest_of(share, in_flight, until, stage, last, need_until, room, first_bytes, last_bytes, orders, counts):
    """The round of the first of C splits in seconds, which of those that fit has the shortest, and that one's.

    Their devices are ``orders [k, C]`` (or ``[k, 1]``: all the same), their layers ``counts [k, C]``. ``until [2, n, L + 1]`` are the seconds of the layers before
    each in a fast and a slow step, ``stage`` and ``last`` ``[2, n]`` what else a stage costs and the LM head; ``need_until [L + 1]`` bytes of the layers
    before each, ``room [n]`` bytes. An inner stage has a layer at least. That the first one fits is not asked.
    """
    k, num_layers = len(orders), until.shape[2] - 1
    own_s, best_s, best = 0.0, math.inf, 0
    for c in range(counts.shape[1]):
        fast_sum = slow_sum = mean_sum = fast_busiest = mean_busiest = 0.0
        start, fits = 0, True
        for i in range(k):
            d, stop = orders[i, c if orders.shape[1] > 1 else 0], start + counts[i, c]
            if stop < start or stop > num_layers or (stop == start and 0 < i < k - 1):
                fits = False
                break
            if c:
                need = need_until[stop] - need_until[start]
                if i == 0:
                    need += first_bytes
                if i == k - 1:
                    need += last_bytes
                if need > room[d] * (1.0 + _SLACK):
                    fits = False
                    break
            fast = stage[0, d] + until[0, d, stop] - until[0, d, start]
            slow = stage[1, d] + until[1, d, stop] - until[1, d, start]
            if i == k - 1:
                fast += last[0, d]
                slow += last[1, d]
            mean = (1.0 - share) * fast + share * slow
            fast_sum += fast
            slow_sum += slow
            mean_sum += mean
            fast_busiest, mean_busiest = max(fast_busiest, fast), max(mean_busiest, mean)
            start = stop
        if not fits:
            continue
        seconds = round_seconds(share, in_flight, mean_sum, mean_busiest, slow_sum, fast_sum, fast_busiest)
        if c == 0:
            own_s = seconds
        if seconds < best_s:
            best_s, best = seconds, c
    return own_s, best, best_s

"""One layout at many numbers of sequences in service: `planning.forecast` in numbers, which has the equations.

A layout of S stages on W workers is a `Chain`; what steps ask for and arrays of costs are those of `compiled.steps`.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import types

from scheduler.planning.compiled.build import F1, F2, I1, REAL, kernel, part
from scheduler.planning.compiled.steps import (
    HEAD_S,
    HOP_S,
    HOP_TOKEN_S,
    LAW,
    OUTPUT,
    PROMPT,
    RATE,
    STEP_S,
    VARIABILITY,
    fill_amounts,
    fill_step,
    head_seconds,
    layer_seconds,
)
from scheduler.planning.convoy import round_seconds

GRID_POINTS = 16
"""Numbers of sequences at which a pipeline is computed, from 1 to the most, in equal ratios; between them figures are interpolated."""
_CLOSER = 9
"""Into so many parts the step of the grid is divided in which the SLO begins to be missed."""
P_IN_SERVICE, P_RATE, P_TPOT, P_TTFT, P_PROMPT, P_REQUESTS = range(6)
"""The columns of a point: sequences in service, requests/s, seconds per output token, to the first one without waits, to read a prompt in
steps that are full (of an open loop only), and requests that a step finishes."""
S_MEAN, S_FAST, S_SLOW, S_HOP, S_BUSY = range(5)
"""The rows of stages: seconds of the mean, a fast and a slow step without the hop, of the hop; and of its worker's mean step in all."""


class Chain(NamedTuple):
    """``devices [S]`` and ``workers [S]`` say which device and which of the layout's workers a stage is on, ``counts [S]`` how many layers it has;
    `microbatches` are in flight at most."""

    devices: np.ndarray
    workers: np.ndarray
    counts: np.ndarray
    microbatches: float


class Limits(NamedTuple):
    """What bounds the sequences in service: `most` as the server and the load have it; KV memory, of which a sequence needs `per_sequence` bytes in each
    layer. ``memory [n]`` (0: no limit) and ``pools [n]`` (pages that are there already, 0: none yet) are each device's bytes; the embedding takes
    `first_bytes` and the LM head `last_bytes`."""

    most: float
    per_sequence: float
    first_bytes: float
    last_bytes: float
    memory: np.ndarray
    pools: np.ndarray


CHAIN = types.NamedTuple([I1, I1, I1, REAL], Chain)
LIMITS = types.NamedTuple([REAL, REAL, REAL, REAL, F1, F1], Limits)


@part
def fill_point(law, chain, in_service, amounts, head, busy, point, stages):
    """The chain with so many in service: ``point [6]`` and ``stages [5, S]``; the rest is scratch."""
    load, machine, until = law.load, law.machine, law.until
    devices, workers = chain.devices, chain.workers
    num_stages, start = len(devices), 0
    in_service, has_waits = max(1.0, in_service), load[RATE] > 0.0
    in_flight, requests, chunks, share, decode_rows, room = fill_step(
        law, num_stages, chain.microbatches, in_service, amounts, head
    )
    if has_waits:
        fill_amounts(law, decode_rows, room, decode_rows + room / load[PROMPT], amounts[2], head[2])
    busy[:] = 0.0
    for s in range(num_stages):
        d, w = devices[s], workers[s]
        fast, slow, full = machine[d, STEP_S], machine[d, STEP_S], machine[d, STEP_S]
        stop = start + chain.counts[s]
        for u in range(len(law.kinds)):
            count = until[stop, u] - until[start, u]
            if count > 0.0:
                fast += count * layer_seconds(law, d, amounts[0, u])
                slow += count * layer_seconds(law, d, amounts[1, u])
                if has_waits:
                    full += count * layer_seconds(law, d, amounts[2, u])
        start = stop
        if s == num_stages - 1:
            fast += head_seconds(law, d, head[0])
            slow += head_seconds(law, d, head[1])
            if has_waits:
                full += head_seconds(law, d, head[2])
        fast_hop = machine[d, HOP_S] + head[0, 3] * machine[d, HOP_TOKEN_S]
        slow_hop = machine[d, HOP_S] + head[1, 3] * machine[d, HOP_TOKEN_S]
        if has_waits:
            busy[3, w] += full + machine[d, HOP_S] + head[2, 3] * machine[d, HOP_TOKEN_S]
        hop = (1.0 - share) * fast_hop + share * slow_hop
        mean = (1.0 - share) * fast + share * slow
        stages[S_MEAN, s], stages[S_FAST, s], stages[S_SLOW, s], stages[S_HOP, s] = mean, fast, slow, hop
        busy[0, w] += mean + hop
        busy[1, w] += fast + fast_hop
        busy[2, w] += slow + slow_hop
    mean_sum = fast_sum = slow_sum = mean_busiest = fast_busiest = slowest = fullest = 0.0
    for w in range(busy.shape[1]):
        mean_sum += busy[0, w]
        fast_sum += busy[1, w]
        slow_sum += busy[2, w]
        mean_busiest = max(mean_busiest, busy[0, w])
        fast_busiest = max(fast_busiest, busy[1, w])
        slowest = max(slowest, busy[2, w])
        fullest = max(fullest, busy[3, w])
    for s in range(num_stages):
        stages[S_BUSY, s] = busy[0, workers[s]]
    cycle = round_seconds(share, in_flight, mean_sum, mean_busiest, slow_sum, fast_sum, fast_busiest)
    round_s = load[HEAD_S] + cycle
    if in_flight >= in_service:
        # a sequence that has its steps to itself and decodes is held up by the chunks of the others only
        others = share * (1.0 - 1.0 / in_flight)
        tpot_s = load[HEAD_S] + round_seconds(
            others, in_flight, fast_sum, mean_busiest, slow_sum, fast_sum, fast_busiest
        )
        one_pass = slow_sum
    else:
        tpot_s = round_s
        one_pass = max(slow_sum, cycle) + cycle / in_flight / 2
    point[P_IN_SERVICE], point[P_RATE], point[P_TPOT] = in_service, requests * in_flight / round_s, tpot_s
    point[P_TTFT] = load[HEAD_S] + one_pass + (chunks - 1.0) * slowest
    point[P_PROMPT], point[P_REQUESTS] = fullest * load[PROMPT] / room, requests


@part
def wait_seconds(law, places, point, rate):
    """Mean seconds before a request's first chunk, where `rate` requests/s arrive: for one of the places, and for room in a step."""
    variability = law.load[VARIABILITY]
    busy, full = min(rate * point[P_PROMPT], 1.0), min(point[P_IN_SERVICE] / places, 1.0)
    if busy >= 1.0 or full >= 1.0:
        return math.inf
    exponent = math.sqrt(2.0 * (places + 1.0)) - 1.0
    for_room = variability * busy / (1.0 - busy) * point[P_PROMPT]
    return for_room + variability * full**exponent / (places * (1.0 - full)) * point[P_IN_SERVICE] / rate


@part
def _where_reached(asked, rates, grid):
    """Between the points of the grid where it is asked for; ``rates`` do not fall, and the last one is more."""
    g = 0
    while rates[g] <= asked:
        g += 1
    if g == 0:
        return grid[0]
    return grid[g - 1] + (grid[g] - grid[g - 1]) * (asked - rates[g - 1]) / (rates[g] - rates[g - 1])


@part
def _grid(places):
    grid = np.empty(GRID_POINTS if places > 1.0 else 1)
    for g in range(len(grid)):
        grid[g] = places ** (g / (GRID_POINTS - 1.0))
    return grid


@part
def _scratch(law, chain):
    num_workers = 0
    for w in chain.workers:
        num_workers = max(num_workers, w + 1)
    return np.empty((3, len(law.kinds), 4)), np.empty((3, 4)), np.empty((4, num_workers))


@part
def _most_in_service(law, chain, limits):
    """How many sequences can be in service, at least 1, and the worker whose KV memory limits that, -1 where `limits.most` does."""
    most, worker = limits.most, -1
    num_stages, last = len(chain.devices), law.until.shape[1] - 1
    for w in range(num_stages):
        weights, held, room, pool, start = 0.0, 0.0, 0.0, 0.0, 0
        for s in range(num_stages):
            stop = start + chain.counts[s]
            if chain.workers[s] == w:
                room, pool = limits.memory[chain.devices[s]], limits.pools[chain.devices[s]]
                weights += law.until[stop, last] - law.until[start, last]
                weights += limits.first_bytes if s == 0 else 0.0
                weights += limits.last_bytes if s == num_stages - 1 else 0.0
                held += chain.counts[s]
            start = stop
        if room > 0.0 and held > 0.0:
            left = min(room - weights, pool) if pool > 0.0 else room - weights
            if left / (limits.per_sequence * held) < most:
                most, worker = max(left / (limits.per_sequence * held), 0.0), w
    return max(most, 1.0), worker


@kernel(LAW, CHAIN, LIMITS)
def most_in_service(law, chain, limits):
    """How many sequences can be in service, at least 1, and the worker whose KV memory limits that, -1 where `limits.most` does."""
    return _most_in_service(law, chain, limits)


@part
def _settle(law, chain, places, point, stages):
    amounts, head, busy = _scratch(law, chain)
    asked = law.load[RATE]
    grid = _grid(places)
    tried = len(grid) if asked > 0.0 else 0
    rates, most, in_service, is_saturated = np.empty(len(grid)), 0.0, places, False
    for turn in range(tried + 1):
        if turn < tried:
            in_service = grid[turn]
        elif tried:
            is_saturated = asked >= most
            in_service = places if is_saturated else _where_reached(asked, rates, grid)
        fill_point(law, chain, in_service, amounts, head, busy, point, stages)
        if turn < tried:
            most = max(most, point[P_RATE])
            rates[turn] = most
    if asked <= 0.0:
        return point[P_RATE], point[P_RATE], False, 0.0
    if is_saturated:
        return most, most, True, 0.0
    return most, asked, False, wait_seconds(law, places, point, asked)


@kernel(LAW, CHAIN, REAL, F1, F2)
def settle(law, chain, places, point, stages):
    """The point at which the load settles with at most `places` in service, into ``point [6]`` and ``stages [5, S]``.

    Returns the most requests/s that could be served, those that are, whether more arrive than that, and the wait before the first chunk.
    """
    return _settle(law, chain, places, point, stages)


@kernel(LAW, CHAIN, LIMITS)
def request_seconds(law, chain, limits):
    """Mean seconds from a request's arrival to its last token, inf where more arrive than can be served; and how many are in service."""
    point, stages = np.empty(6), np.empty((5, len(chain.devices)))
    places, _ = _most_in_service(law, chain, limits)
    _, rate, is_saturated, wait_s = _settle(law, chain, places, point, stages)
    in_service = point[P_IN_SERVICE] * min(1.0, rate / point[P_RATE])
    if is_saturated:
        return math.inf, in_service
    return point[P_TTFT] + wait_s + (law.load[OUTPUT] - 1.0) * point[P_TPOT], in_service


@kernel(LAW, CHAIN, LIMITS, REAL, REAL)
def goodput(law, chain, limits, ttft_s, tpot_s):
    """The largest rate, requests/s, at which the mean request meets this SLO, 0.0 if it never does, and how many are in service then."""
    amounts, head, busy = _scratch(law, chain)
    point, stages = np.empty(6), np.empty((5, len(chain.devices)))
    places, _ = _most_in_service(law, chain, limits)
    grid, rates = _grid(places), np.empty(GRID_POINTS)
    best, at = 0.0, 1.0
    for turn in range(2):
        top, edge = -1, -1
        for g in range(len(grid)):
            fill_point(law, chain, grid[g], amounts, head, busy, point, stages)
            rates[g] = point[P_RATE]
            wait_s = wait_seconds(law, places, point, point[P_RATE]) if law.load[RATE] > 0.0 else 0.0
            if point[P_TTFT] + wait_s <= ttft_s and point[P_TPOT] <= tpot_s:
                edge = g
                if top < 0 or rates[g] > rates[top]:
                    top = g
        if top < 0:
            break
        if rates[top] > best:
            best, at = rates[top], grid[top]
        if turn == 1 or edge + 1 == len(grid):
            break
        low, high = grid[edge], grid[edge + 1]
        grid = np.empty(_CLOSER - 1)
        for g in range(_CLOSER - 1):
            grid[g] = low + (high - low) * (g + 1.0) / _CLOSER
    return best, at

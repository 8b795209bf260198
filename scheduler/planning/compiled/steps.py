"""What units cost on every device in the mean steps of many numbers of stages; and the parts that forecasts share.

Arrays that all kernels are given, in these orders; seconds, bytes, FLOP, tokens:

    load     [11]     prompt tokens to compute, output tokens, tokens of a full step, context of a decoding row, context of a prompt's row,
                      requests/s (0: a closed loop), (cv_arrival^2 + cv_service^2) / 2, the head's share of a round; `traffic.Pieces`
    machine  [n, 12]  of each device: the columns of `cost.Speeds`, a hop's latency, a hop's seconds per token
    kinds    [U, 4]   `Facts.kinds`
    model    [6]      `Facts.model`
    until    [L + 1, U + 1]  how many layers of each kind there are before each layer, and their bytes
"""

from typing import NamedTuple

import numpy as np
from numba import types

from scheduler.planning.compiled.build import F1, F2, F3, F4, I1, kernel, part
from scheduler.planning.convoy import slow_weight
from scheduler.planning.cost import corner, layer_amounts
from scheduler.planning.traffic import step_of

PROMPT, OUTPUT, BUDGET, CONTEXT, PROMPT_CONTEXT, RATE, VARIABILITY, HEAD_S, EVEN, FIXED, CORNER = range(11)
(
    STEP_S,
    LAYER_S,
    WEIGHTS_S,
    PRODUCTS_S,
    KV_S,
    SCORES_S,
    HEAD_BYTE_S,
    HEAD_FLOP_S,
    SAMPLE_S,
    SHARPNESS,
    HOP_S,
    HOP_TOKEN_S,
) = range(12)


class Law(NamedTuple):
    """The arrays of this module's docstring."""

    load: np.ndarray
    machine: np.ndarray
    kinds: np.ndarray
    model: np.ndarray
    until: np.ndarray


LAW = types.NamedTuple([F1, F2, F2, F1, F2], Law)


@part
def fill_amounts(law, decode_rows, prefill_tokens, samples, layers, head):
    """What a step asks of each kind of layer, into ``layers [U, 4]``, and of the LM head, into ``head [4]``: the share of steps that
    read it, FLOP, rows times vocabulary; and the step's tokens."""
    load, kinds, model = law.load, law.kinds, law.model
    for u in range(len(kinds)):
        layers[u, 0], layers[u, 1], layers[u, 2], layers[u, 3] = layer_amounts(
            kinds[u, 0], kinds[u, 1], kinds[u, 2], kinds[u, 3], model[0], model[1], model[2],
            decode_rows, load[CONTEXT], prefill_tokens, load[PROMPT_CONTEXT],
        )  # fmt: skip
    head[0], head[1] = min(samples, 1.0), model[4] * max(samples, 1.0)
    head[2], head[3] = samples * model[5], decode_rows + prefill_tokens


@part
def layer_seconds(law, device, amounts):
    row = law.machine[device]
    sharpness = row[SHARPNESS]
    return (
        row[LAYER_S]
        + corner(amounts[0] * row[WEIGHTS_S], amounts[1] * row[PRODUCTS_S], sharpness)
        + corner(amounts[2] * row[KV_S], amounts[3] * row[SCORES_S], sharpness)
    )


@part
def head_seconds(law, device, head):
    row = law.machine[device]
    reading = corner(law.model[3] * row[HEAD_BYTE_S], head[1] * row[HEAD_FLOP_S], row[SHARPNESS])
    return head[0] * reading + head[2] * row[SAMPLE_S]


@part
def fill_step(law, stages, microbatches, in_service, layers, head):
    """The mean steps of this operating point: what they ask for, into ``layers [2, U, 4]`` and ``head [2, 4]``, fast and slow. Returns
    steps in flight, requests a step, steps to read a prompt, the share of slow steps; a slow step's decoding rows, and its room for prompts in tokens."""
    load = law.load
    in_flight, requests, chunks, share, decoding, decode_rows, chunk, room = step_of(
        load[PROMPT],
        load[OUTPUT],
        load[BUDGET],
        load[EVEN],
        load[FIXED],
        load[CORNER],
        float(stages),
        microbatches,
        in_service,
    )
    fill_amounts(law, decoding, 0.0, decoding, layers[0], head[0])
    fill_amounts(law, decode_rows, chunk, decode_rows + chunk / load[PROMPT], layers[1], head[1])
    return in_flight, requests, chunks, share, decode_rows, room


@kernel(LAW, I1, F1, F1, F2, F3, F4, F3)
def unit_rows(law, ks, microbatches, in_service, steps, stage, layers, last):
    """Of R operating points, ``ks [R]`` stages, ``microbatches [R]`` and ``in_service [R]``: seconds of a stage before its layers, hop included, into ``stage [4, R, n]``,
    of each kind of layer into ``layers [4, R, n, U]``, of the LM head into ``last [4, R, n]``; in fast, slow and mean steps, and in *even*
    ones, whose busiest stage times the steps in flight is the convoy's round if stages are even.
    Into ``steps [3, R]``: steps in flight, requests that a step finishes, the share of slow steps."""
    machine, num_kinds = law.machine, len(law.kinds)
    amounts, head = np.empty((2, num_kinds, 4)), np.empty((2, 4))
    for r in range(len(in_service)):
        in_flight, requests, _, share, _, _ = fill_step(law, ks[r], microbatches[r], in_service[r], amounts, head)
        steps[0, r], steps[1, r], steps[2, r] = in_flight, requests, share
        weight = slow_weight(share, in_flight, min(1.0, in_flight / ks[r]))
        for d in range(len(machine)):
            row = machine[d]
            for kind in range(2):
                stage[kind, r, d] = row[STEP_S] + row[HOP_S] + head[kind, 3] * row[HOP_TOKEN_S]
                for u in range(num_kinds):
                    layers[kind, r, d, u] = layer_seconds(law, d, amounts[kind, u])
                last[kind, r, d] = head_seconds(law, d, head[kind])
            for kind, part_slow in ((2, share), (3, weight)):
                stage[kind, r, d] = (1.0 - part_slow) * stage[0, r, d] + part_slow * stage[1, r, d]
                last[kind, r, d] = (1.0 - part_slow) * last[0, r, d] + part_slow * last[1, r, d]
                for u in range(num_kinds):
                    layers[kind, r, d, u] = (1.0 - part_slow) * layers[0, r, d, u] + part_slow * layers[1, r, d, u]

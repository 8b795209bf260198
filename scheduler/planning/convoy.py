"""How much steps that carry a prompt hold up the others: the round of a pipeline whose steps are not alike. Pure.

M steps go round a pipeline in their order, and no stage can overtake. A step with a prompt chunk is slow at every stage, so those
behind it queue up and follow at its pace; those before it run ahead, come back, and queue up behind it as well: a convoy. Mean
stage times know nothing of this. When step i ends at a stage follows from when step i - 1 ended there and step i at the stage
before (the recursion of queues in tandem; Glynn and Whitt, *Departures from many queues in series*, Annals of Applied
Probability 1(4), 1991). So in the long run a step takes the mean weight, per step, of the heaviest path through the grid
of (step, stage), where the last stage of step i is followed by the first one of step i + M. Any path gives a lower bound:

    stay at the busiest stage                                            mean time of the busiest stage
    stay with a step, then with the one that follows its return          mean sum of stages / M
    go through with a slow step, then along to the next slow one         (slow sum + gap * fast) / (M + gap)

`fast` is what a step costs along the way to the next slow one, max(busiest stage, sum / M) of steps that only decode, and `gap`
how many of those there are. When each step is slow with probability f, it is (1 - f) / f for a path that takes the first
slow step it meets. The heaviest path chooses among places to leave off, and meets fewer; it can choose less where fewer steps
are in flight than keep the busiest stage busy. Fitted to simulated pipelines of 2 to 24 stages:

    gap = (1 - f)^(1 + 1.5 (1 - 1/M) c) / f          c = 2 M fast busiest / fast sum - 1, within [0, 1]

With even stages and as many steps in flight, the time per step is that of a share M / (M + gap) of slow steps instead of
f: with 16 stages and a prompt in every eighth step, three quarters of the difference between a fast and a slow step.

Never true: this is exact. docs/planner.md compares it with simulated pipelines.
"""

from typing import Any

import numpy as np

_CHOICE = 1.5


def slow_weight(share: Any, in_flight: Any, busy: Any = 1.0) -> Any:
    """M / (M + gap), in [0, 1], for a share f of slow steps, in [0, 1], and M steps in flight; numbers, or arrays of one shape.

    `busy` is M fast busiest / fast sum: 1 for even stages and as many steps in flight.
    """
    choice = np.minimum(np.maximum(2.0 * busy - 1.0, 0.0), 1.0)
    scarce = (1.0 - share) ** (1.0 + _CHOICE * (1.0 - 1.0 / in_flight) * choice)
    return in_flight * share / (in_flight * share + scarce)


def weighted(share: Any, fast: Any, slow: Any) -> Any:
    """The mean of steps of which a share is slow."""
    return (1.0 - share) * fast + share * slow


def round_seconds(
    share: Any, in_flight: Any, mean_sum: Any, mean_busiest: Any, slow_sum: Any, fast_sum: Any, fast_busiest: Any
) -> Any:
    """In which `in_flight` steps go once around, a share of them slow. Numbers, or arrays of one shape.

    Seconds: sums over the stages, and of the busiest worker, for a step in mean, a slow and a fast one.
    """
    along = in_flight * fast_busiest
    weight = slow_weight(share, in_flight, along / np.maximum(fast_sum, 1e-300))
    convoy = weighted(weight, np.maximum(along, fast_sum), slow_sum)
    return np.maximum(np.maximum(mean_sum, in_flight * mean_busiest), convoy)

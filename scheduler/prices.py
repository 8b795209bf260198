"""What the batcher needs of the cost model: the price of a step as a line, drawn at the load at hand. Pure.

The model is a roofline with a rounded corner: a few decoding rows are nearly free while the weights are read anyway, many cost
what their arithmetic costs. The batcher asks two things of it for every step (do these rows cost an even share; how many
prompt tokens fit beside them), so it gets a line instead: through the predicted time at the present number of rows, with the slope from
there to twice as many, and the slopes by context and by prompt tokens. (How a prompt is cut best depends on the corner, so where there is one to be read it
has points instead of a line.) It is drawn anew when the load has changed, for the worker that is
the slowest with a chunk of a prompt in the step, since that one sets the pace of the pipeline.

Never true: a row is free, any price is negative, or the line lies above the model for fewer rows than it was drawn at.
"""

from collections.abc import Sequence

import numpy as np

from kvstore.ids import WorkerName
from runtime.layout import Layout
from scheduler.lanes import BatchLoad, StepPrices
from scheduler.planning.cost import Facts, Speed, Work, unit_times

_PIECES = tuple(1 << exponent for exponent in range(4, 14))
"""Tokens of prompts at which steps are priced as a whole."""
_CHUNK_TOKENS = 64
"""The one of them that gives the line its slope."""
_LEAST_S = 1e-8
"""Of a row: an even share of nothing would be nothing."""


def step_prices(facts: Facts, layout: Layout, speeds: dict[WorkerName, Speed], load: BatchLoad) -> StepPrices:
    """Prices for steps of about `load` in `layout`; `speeds` has every worker of it."""
    rows, context = max(load.decode_rows, 1.0), max(load.decode_context, 1.0)
    works = [
        Work(rows, context, 0.0, 0.0, rows),
        Work(2 * rows, context, 0.0, 0.0, 2 * rows),
        Work(rows, 2 * context, 0.0, 0.0, rows),
        *(Work(rows, context, float(n), max(load.prefill_context, n / 2), rows) for n in _PIECES),
    ]
    seconds = _worker_seconds(facts, layout, speeds, works)
    with_prompt = seconds[-len(_PIECES) :]
    chunks = with_prompt[_PIECES.index(_CHUNK_TOKENS)]
    slowest = int(chunks.argmax())
    base, twice, longer = (float(x) for x in seconds[: -len(_PIECES), slowest])
    context_s = max(0.0, longer - base) / (rows * context)
    row_s = max(_LEAST_S, (twice - base) / rows - context * context_s)
    return StepPrices(
        step_s=max(0.0, base - rows * (row_s + context * context_s)),
        row_s=row_s,
        context_s=context_s,
        prefill_s=max(0.0, float(chunks[slowest]) - base) / _CHUNK_TOKENS,
        with_prompt=tuple(zip(_PIECES, with_prompt.max(axis=1).tolist(), strict=True)),
    )


def _worker_seconds(facts: Facts, layout: Layout, speeds: dict[WorkerName, Speed], works: Sequence[Work]) -> np.ndarray:
    """``[works, workers]``: what each work takes a worker, in all of its segments."""
    names = list(dict.fromkeys(segment.worker for segment in layout.segments))
    times = unit_times(facts, [speeds[name] for name in names], works)
    seconds = np.zeros((len(works), len(names)))
    for segment in layout.segments:
        index = names.index(segment.worker)
        kinds = facts.kind_of_layer[segment.layers.start : segment.layers.stop]
        seconds[:, index] += times.fixed[index] + times.layers[:, index, kinds].sum(axis=1)
    seconds[:, names.index(layout.segments[-1].worker)] += times.last[:, names.index(layout.segments[-1].worker)]
    return seconds

"""A short profile of this device: what a few shapes of work cost the units that are loaded. For the head's cost model.

It runs once, on the compute thread, when a worker has loaded units for the first time and before it says so: never while it
serves. Like the warm-up it has pages of its own. A budget bounds it: each shape goes through as many layers as its
share of the time allows, one at least, so a large model is measured on a few of its layers.

Decode shapes tell what reading weights and KV costs, a chunk what arithmetic does, and the sampled rows what the LM head
and a draw do. The first pass over a shape is thrown away when there is time: it pays for cold caches and lazy set-up.

On a device whose work is queued whole segments run as they do in steps (`measure_queued`), by graphs where there are some: a layer that is given to the
device piece by piece may keep the host ten times as long as the device.

Never true: something is measured while a step could run.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from kvstore.ids import LayerRange
from kvstore.page_pool import PagePool
from runtime.batch import LayerKV, StepBatch
from runtime.cuda.runner import Runner
from runtime.messages import ProfilePoint, Sampling, StepPlan
from runtime.model.spec import ModelSpec
from runtime.sampling import SamplingRow, sample
from runtime.stage import Units
from runtime.stage_state import PlannedBatch

BUDGET_S = 0.8
BLOCK_SIZE = 16
SHAPES = ((1, 1, 16), (8, 1, 256), (32, 1, 64), (1, 16, 16), (1, 128, 128))
"""Rows, tokens in each, and positions that the last of them attends to."""
SAMPLED_ROWS = (1, 8, 32)


def measure(
    units: Units,
    spec: ModelSpec,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> list[ProfilePoint]:
    """Seconds of each shape over the layers that are held, on a processor, and of sampling if the LM head is."""
    layers = sorted(units.layers)
    num_shapes = len(SHAPES) * bool(layers) + len(SAMPLED_ROWS) * (units.lm_head is not None)
    share_s = BUDGET_S / max(1, num_shapes)
    points: list[ProfilePoint] = []
    with torch.inference_mode():
        run = _run_of(layers)
        for shape in SHAPES if layers else ():
            points.append(_time_layers(units, run, spec, device, shape, share_s, clock))
        if units.lm_head is not None:
            points += [_time_head(units, spec, device, rows, share_s, clock) for rows in SAMPLED_ROWS]
    return points


def measure_queued(
    units: Units,
    spec: ModelSpec,
    device: torch.device,
    runner: Runner,
    segments: Sequence[LayerRange],
    pool: PagePool,
    clock: Callable[[], float] = time.perf_counter,
) -> list[ProfilePoint]:
    """As `measure`, for what `runner` would run over `segments`; `pool` is empty, before and after. Shapes for which it has no pages are left out."""
    points: list[ProfilePoint] = []
    with torch.inference_mode():
        segment = max(segments, key=len, default=LayerRange(0, 0))
        if len(segment):
            pool.hold(segment)
            for shape in SHAPES:
                if (point := _time_segment(units, spec, device, runner, segment, pool, shape, clock)) is not None:
                    points.append(point)
            pool.drop(segment)
        if units.lm_head is not None:
            points += [_time_head(units, spec, device, rows, BUDGET_S, clock, runner) for rows in SAMPLED_ROWS]
    return points


def _time_segment(
    units: Units,
    spec: ModelSpec,
    device: torch.device,
    runner: Runner,
    segment: LayerRange,
    pool: PagePool,
    shape: tuple[int, int, int],
    clock: Callable[[], float],
) -> ProfilePoint | None:
    """The second of two passes of the shape through the whole segment."""
    rows, tokens, context = _within(spec, shape)
    blocks = -(-context // pool.block_size)
    if rows * blocks * len(segment) > pool.num_free:
        return None
    tables = np.arange(rows * blocks, dtype=np.int32).reshape(rows, blocks)
    pool.ensure(tables.ravel())
    planned = PlannedBatch(
        plan=StepPlan(0, 0, 0, [], []),
        positions=np.tile(np.arange(context - tokens, context, dtype=np.int64), rows),
        query_starts=np.arange(rows + 1, dtype=np.int32) * tokens,
        context_lens=np.full(rows, context, np.int32),
        block_tables=tables,
        prompt_lens=np.full(rows, context if tokens > 1 else 0, np.int32),
        tokens=np.zeros(rows * tokens, np.int64),
        sequences=[],
    )
    hidden = torch.zeros(rows * tokens, spec.hidden_size, dtype=getattr(torch, spec.dtype), device=device)
    seconds = 0.0
    for _ in range(2):
        began_s = clock()
        runner.run(segment, units.layers, planned, pool, hidden, None)
        runner.wait()
        seconds = clock() - began_s
    pool.release_blocks(tables.ravel())
    return _point((rows, tokens, context), segment, seconds)


def _run_of(layers: Sequence[int]) -> list[int]:
    """The longest run of consecutive layers (a point names a range)."""
    best: list[int] = []
    run: list[int] = []
    for layer in layers:
        run = [*run, layer] if run and run[-1] + 1 == layer else [layer]
        best = max(best, run, key=len)
    return best


def _time_layers(
    units: Units,
    layers: Sequence[int],
    spec: ModelSpec,
    device: torch.device,
    shape: tuple[int, int, int],
    share_s: float,
    clock: Callable[[], float],
) -> ProfilePoint:
    """The shape through as many of `layers` as half of its share allows; then once more through the same."""
    rows, tokens, context = _within(spec, shape)
    blocks = -(-context // BLOCK_SIZE)
    dtype = getattr(torch, spec.dtype)
    pool = PagePool(rows * blocks, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim, dtype, device)
    tables = np.arange(rows * blocks, dtype=np.int32).reshape(rows, blocks)
    positions = torch.arange(context - tokens, context, device=device).repeat(rows)
    batch = StepBatch(
        positions=positions,
        query_starts=np.arange(rows + 1, dtype=np.int32) * tokens,
        context_lens=np.full(rows, context, dtype=np.int32),
        block_tables=tables,
    )
    hidden = torch.zeros(rows * tokens, spec.hidden_size, dtype=dtype, device=device)

    def through(chosen: Sequence[int], until_s: float) -> tuple[int, float]:
        """How many layers it went through, and for how long; pages are made ready outside of that time."""
        spent_s = 0.0
        for count, layer in enumerate(chosen):
            pool.hold([layer])
            pool.ensure(tables.ravel())
            began_s = clock()
            units.layers[layer](hidden, batch, LayerKV(layer, pool.data, pool.page_of(layer)))
            spent_s += clock() - began_s
            pool.drop([layer])
            if spent_s > until_s:
                return count + 1, spent_s
        return len(chosen), spent_s

    count, seconds = through(layers, share_s / 2)
    if seconds < share_s / 2:
        count, seconds = through(layers[:count], share_s)
    return _point((rows, tokens, context), LayerRange(layers[0], layers[0] + count), seconds)


def _within(spec: ModelSpec, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """The shape, or as much of it as the model has positions for."""
    rows, tokens, context = shape
    context = min(context, spec.max_context)
    return rows, min(tokens, context), context


def _point(shape: tuple[int, int, int], layers: LayerRange, seconds: float) -> ProfilePoint:
    rows, tokens, context = shape
    is_decode = tokens == 1
    return ProfilePoint(
        decode_rows=rows if is_decode else 0,
        decode_context=context if is_decode else 0,
        prefill_tokens=0 if is_decode else rows * tokens,
        samples=0,
        layers=layers,
        seconds=seconds,
    )


def _time_head(
    units: Units,
    spec: ModelSpec,
    device: torch.device,
    rows: int,
    share_s: float,
    clock: Callable[[], float],
    runner: Runner | None = None,
) -> ProfilePoint:
    """Logits of so many rows and a token for each: half of them drawn, half the likeliest, as requests are."""
    assert units.lm_head is not None
    hidden = torch.zeros(rows, spec.hidden_size, dtype=getattr(torch, spec.dtype), device=device)
    draws = [SamplingRow(Sampling(temperature=float(row % 2 == 0)), 0) for row in range(rows)]
    seconds = 0.0
    for _ in range(2):
        began_s = clock()
        found = runner.read(units.lm_head, hidden) if runner is not None else None
        logits, first = found if found is not None else (units.lm_head(hidden), None)
        sample(logits, draws, first)
        seconds = clock() - began_s
        if seconds > share_s / 2:
            break
    return ProfilePoint(rows, 1, 0, rows, LayerRange(0, 0), seconds)

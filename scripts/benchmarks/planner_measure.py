"""How far the cost model is from this device: stages of a real model, run step by step in this process.

A stage holds real units and real pages, as in a worker, and is timed as a worker times a step (`HopTiming`). Steps of many
compositions are measured on two stages (layers only; layers and the LM head). Coefficients are fitted to one half of
them, and the error is stated for the other half, which the fit has not seen.
"""

import itertools
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch

from kvstore.ids import LayerRange
from kvstore.page_pool import PagePool
from runtime.device import choose_device
from runtime.layout import layout_from_counts
from runtime.messages import Row, Sampling, SequenceStart, StepPlan
from runtime.model.builder import UnitBuilder
from runtime.model.spec import ModelSpec
from runtime.stage import Stage, Units
from scheduler.planning.calibration import Measurement, Profile, correct, prediction_error
from scheduler.planning.cost import Facts, Speed, work_of_rows
from scheduler.planning.devices import kind_of_worker

BLOCK = 16
REPEATS = 5


@dataclass(frozen=True, slots=True)
class Shape:
    """`decodes` sequences decode at `context`; with `chunk`, one more reads so many prompt tokens from position `start` on."""

    decodes: int
    context: int
    chunk: int = 0
    start: int = 0


SHAPES = (
    *(Shape(rows, context) for rows, context in itertools.product((1, 2, 4, 8, 16, 32, 64), (32, 192, 512, 1024))),
    *(Shape(0, 0, chunk, start) for chunk, start in itertools.product((32, 64, 128, 256, 448), (0, 256, 768))),
    *(Shape(rows, 192, chunk, start) for rows, chunk, start in itertools.product((4, 16, 48), (64, 256), (0, 256))),
)


def measure_device(spec: ModelSpec, *, num_layers: int = 10, device: str = "cpu", threads: int = 1) -> dict:
    """Measures and fits; the figures for the report, times in milliseconds."""
    info = choose_device(device, threads)
    described = info.describe()
    speed = Speed(kind_of_worker(info.device.type, described["device_name"], threads))
    facts = Facts(spec)
    builder = UnitBuilder(spec, device=str(info.device))
    layers = {index: builder.layer(index) for index in range(num_layers)}
    units = Units(layers, builder.embedding(), builder.lm_head())
    by_shape = [_measure(spec, units, shape, info.device) for shape in SHAPES]
    fit = [m for pair in by_shape[0::2] for m in pair]
    test = [m for pair in by_shape[1::2] for m in pair]
    fitted = correct(facts, speed, Profile(described["device_name"], spec.name, tuple(fit)))
    kinds = {
        "decode": [m for m in test if not m.work.prefill_tokens and not m.with_head],
        "prefill": [m for m in test if m.work.prefill_tokens and not m.work.decode_rows and not m.with_head],
        "mixed": [m for m in test if m.work.prefill_tokens and m.work.decode_rows and not m.with_head],
        "LM head": [m for m in test if m.with_head],
        "all": test,
    }
    return {
        "device": described["device_name"],
        "layers": num_layers,
        "fitted_to": len(fit),
        "scale": [round(value, 3) for value in fitted.scale],
        "errors": {
            name: {
                who: {"count": e.count, "mape": round(e.mape, 4), "bias": round(e.bias, 4)}
                for who, e in (
                    ("table", prediction_error(facts, speed, some)),
                    ("fitted", prediction_error(facts, fitted, some)),
                )
            }
            for name, some in kinds.items()
        },
        "measurements": [
            {"work": [round(x, 1) for x in _fields(m)], "head": m.with_head, "ms": round(1e3 * m.seconds, 3)}
            for pair in by_shape
            for m in pair
        ],
    }


def _fields(m: Measurement) -> tuple[float, ...]:
    w = m.work
    return w.decode_rows, w.decode_context, w.prefill_tokens, w.prefill_context, w.samples


def _measure(spec: ModelSpec, units: Units, shape: Shape, device: torch.device) -> list[Measurement]:
    """The median time of a step of this shape: of its layers, and of its LM head with sampling."""
    num_layers = len(units.layers)
    layout = layout_from_counts(1, ["w"], [num_layers])
    longest = max(shape.context, shape.start + shape.chunk) + 4 * BLOCK
    per_sequence = -(-longest // BLOCK) + 1
    num_blocks = (shape.decodes + REPEATS + 1) * per_sequence
    pool = PagePool(
        num_blocks * num_layers, BLOCK, spec.num_kv_heads, spec.head_dim, getattr(torch, spec.dtype), device
    )
    pool.hold(range(num_layers))
    stage = Stage(layout, "w", units, pool, device)
    sampling, ordinals = Sampling(temperature=0.0), itertools.count()

    def begin(sequence: int, position: int) -> Row:
        blocks = list(range(sequence * per_sequence, (sequence + 1) * per_sequence))
        return Row(sequence, position, [1], [], True, SequenceStart(position + 1, sampling, blocks, []))

    def run(rows: list[Row]) -> tuple[float, float]:
        with torch.inference_mode():
            begun_s = time.perf_counter()
            hidden = stage.run(StepPlan(1, next(ordinals), 0, rows, []), 0, None)
            computed_s = time.perf_counter()
            stage.sample(hidden)
            return computed_s - begun_s, time.perf_counter() - computed_s

    decoding = list(range(shape.decodes))
    start = max(shape.start, 1)
    readers = [shape.decodes + i for i in range(REPEATS + 1)] if shape.chunk else []
    for sequence, position in [*((s, shape.context - 1) for s in decoding), *((s, start - 1) for s in readers)]:
        run([begin(sequence, position)])
    computes, samples, rows = [], [], []
    prompt = np.random.default_rng(0).integers(1, spec.vocab_size, shape.chunk).tolist()
    for repeat in range(REPEATS + 1):
        rows = [Row(s, shape.context + repeat, [2], [], True) for s in decoding]
        if shape.chunk:
            rows.append(Row(readers[repeat], start, prompt, [], True))
        compute_s, sample_s = run(rows)
        if repeat:
            computes.append(compute_s)
            samples.append(sample_s)
    work = work_of_rows((row.start, len(row.tokens), row.sample) for row in rows)
    return [
        Measurement(work, LayerRange(0, num_layers), statistics.median(computes), with_step=True),
        Measurement(work, LayerRange(0, 0), statistics.median(samples), with_head=True),
    ]

"""A worker's step without its process: random weights, a real `Stage`, plans made by hand, and a clock around it."""

import time
from pathlib import Path

import torch

from kvstore.ids import LayerRange
from kvstore.page_pool import PagePool
from runtime.layout import Layout, Segment
from runtime.loading import warm_up
from runtime.messages import Row, Sampling, SequenceStart, StepPlan
from runtime.model.builder import UnitBuilder
from runtime.model.config import inspect_model
from runtime.stage import Stage, Units

BLOCK_SIZE = 16
_GREEDY = Sampling(temperature=0.0)
_REPEATS = 12


class StepTimer:
    """The first `num_layers` layers of a model with both ends, as one worker that holds everything."""

    def __init__(self, folder: Path, dtype: str, num_layers: int, max_context: int, quantize: str = "") -> None:
        self._spec = spec = inspect_model(folder, dtype=dtype, load_format="dummy", quantize=quantize)
        builder = UnitBuilder(spec, device="cpu")
        layers = {index: builder.layer(index) for index in range(num_layers)}
        self._units = Units(layers, builder.embedding(), builder.lm_head())
        self._layout = Layout(1, num_layers, (Segment("w0", LayerRange(0, num_layers)),))
        self._max_context = max_context
        self._device = torch.device("cpu")
        warm_up(self._units, ["embedding", *layers, "lm_head"], spec, self._device)

    def decode(self, num_rows: int, context: int, limit_s: float) -> float:
        """Seconds of a step of so many rows that attend to so much and are all sampled."""
        return self._time([1] * num_rows, context, limit_s)

    def chunk(self, num_tokens: int, context: int, limit_s: float) -> float:
        """Seconds of a step of one prompt's chunk that ends at that context."""
        return self._time([num_tokens], context, limit_s)

    def _time(self, counts: list[int], context: int, limit_s: float) -> float:
        """The least of some repeats of a step, each time with fresh sequences at the same depth: a step goes on by its tokens."""
        spec = self._spec
        blocks_each = -(-context // BLOCK_SIZE)
        num_blocks = blocks_each * len(counts)
        pages = num_blocks * len(self._units.layers)
        dtype = getattr(torch, spec.dtype)
        pool = PagePool(pages, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim, dtype, self._device)
        pool.hold(self._units.layers)
        pool.ensure(list(range(num_blocks)))
        stage = Stage(self._layout, "w0", self._units, pool, self._device)
        best_s, ordinal, until_s = float("inf"), 0, time.perf_counter() + limit_s
        with torch.inference_mode():
            for _ in range(_REPEATS):
                rows = [
                    Row(
                        ordinal * len(counts) + index,
                        context - count,
                        [7 + index % 1000] * count,
                        [],
                        True,
                        SequenceStart(
                            context, _GREEDY, list(range(index * blocks_each, (index + 1) * blocks_each)), []
                        ),
                    )
                    for index, count in enumerate(counts)
                ]
                released = [(ordinal - 1) * len(counts) + index for index in range(len(counts))] if ordinal else []
                plan = StepPlan(1, ordinal, 0, rows, released)
                begun_s = time.perf_counter()
                stage.sample(stage.run(plan, 0, None))
                best_s = min(best_s, time.perf_counter() - begun_s)
                ordinal += 1
                if time.perf_counter() > until_s:
                    break
        return best_s

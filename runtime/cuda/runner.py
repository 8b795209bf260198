"""Runs the layers of a hop on a device whose work is queued: by graphs where a step allows it, else layer by layer.

How it works: `run` takes what the host planned and the hidden state wherever it is, uploads the step's numbers, and queues everything on the
current stream. A step whose bucket has been captured is replayed; longer ones, and layers that cannot be captured, run eagerly. `finish` brings the hidden state that leaves this worker to pinned
memory and waits for it, which is the step's one wait (on the last hop that wait is the sampler's).

It works on any device, without graphs on all but CUDA; the tests run it on the CPU.

What is never true: `run` waits for the device; the tensor that `run` returns stays as it is after the next `run`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from kvstore.ids import LayerRange
from kvstore.page_pool import PagePool
from runtime.batch import LayerKV, StepBatch, run_layers
from runtime.cuda.graphs import Graphs
from runtime.cuda.spans import Bucket
from runtime.cuda.step import HostStep, attach, host_step, upload
from runtime.stage import make_batch
from runtime.stage_state import PlannedBatch

DEVICE_TENSOR_BYTES = 1 << 20
"""Smaller hidden states are faster by way of the host: channels between devices take several messages for each tensor."""
Layer = Callable[[torch.Tensor, StepBatch, LayerKV], torch.Tensor]


class Runner:
    """One per worker; the compute thread's, but for `graphs`, which the loader's thread may fill meanwhile."""

    def __init__(self, device: torch.device, graphs: Graphs | None = None) -> None:
        self.graphs = graphs
        self.sends_device = False
        """Whether the door takes tensors on the device; large hidden states then leave as they are."""
        self.num_replayed = 0
        self.num_eager = 0
        self._device = device
        self._marks: tuple[Any, Any] | None = None
        if device.type == "cuda":
            self._marks = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))

    def run(
        self,
        layers: LayerRange,
        units: Mapping[int, Layer],
        planned: PlannedBatch,
        pool: PagePool,
        hidden: torch.Tensor | None,
        embedding: Callable[[torch.Tensor], torch.Tensor] | None,
        before_eager: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """The hidden state after `layers`, ``[T, hidden]`` on the device, until the next call.

        `hidden` is what came from the hop before, anywhere; None at the first, which has the `embedding`. `before_eager` is called first
        where no graph does it.
        """
        with self._timed():
            if hidden is not None and (arrived := getattr(hidden, "arrived", None)) is not None:
                current = torch.cuda.current_stream(self._device)
                current.wait_event(arrived)
                hidden.record_stream(current)
            if not len(layers):  # an end of the model may have none
                return self._enter(hidden, embedding, planned)
            if self.graphs is not None and not self.graphs.why_not:
                lens, tokens = planned.context_lens, len(planned.positions)
                bucket = self.graphs.find(layers, len(lens), int(lens.max(initial=1)), tokens, units, pool.data)
                if bucket is not None:
                    self.num_replayed += 1
                    return self._replay(layers, bucket, planned, pool, hidden, embedding)
            self.num_eager += 1
            before_eager()
            step = make_batch(planned, torch.device("cpu"))
            return self._eager(layers, units, step, planned, pool, hidden, embedding)

    def prepare(self, layers: LayerRange, planned: PlannedBatch, pool: PagePool) -> None:
        """Find out what `run` over `layers` will ask of the host, but for the tokens."""
        if len(layers):
            planned.numbers = (pool.num_moves, layers), self._numbers(layers, planned, pool)

    def read(self, lm_head: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """As `Graphs.read`; None without graphs."""
        if self.graphs is None or self.graphs.why_not:
            return None
        return self.graphs.read(lm_head, hidden)

    def wait(self) -> None:
        """Wait for what was queued."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def seconds(self) -> float | None:
        """How long the last `run` took on the device, which has been waited for since; None where the caller's clock says it."""
        return self._marks[0].elapsed_time(self._marks[1]) / 1e3 if self._marks is not None else None

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """What is queued meanwhile is what `seconds` tells of."""
        if self._marks is None:
            yield
            return
        begun, ended = self._marks
        begun.record(torch.cuda.current_stream(self._device))
        yield
        ended.record(torch.cuda.current_stream(self._device))

    def finish(self, hidden: torch.Tensor, meanwhile: Callable[[], None] = lambda: None) -> torch.Tensor:
        """A copy of `hidden`, there when this returns: on the host, or where it is if the door can take it there. `meanwhile` is called when
        all is queued."""
        if hidden.is_cpu:
            return hidden.clone()
        if self.sends_device and hidden.nbytes >= DEVICE_TENSOR_BYTES:
            out = hidden.clone()
            meanwhile()
            self.wait()
            return out
        out = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
        out.copy_(hidden, non_blocking=True)
        meanwhile()
        self.wait()
        return out

    def _enter(
        self,
        hidden: torch.Tensor | None,
        embedding: Callable[[torch.Tensor], torch.Tensor] | None,
        planned: PlannedBatch,
        tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The hidden state before the first layer; `tokens` are those of the step, if they are on the device already."""
        if hidden is not None:
            return hidden.to(self._device)
        assert embedding is not None, "the first hop holds the embedding"
        return embedding(upload(planned.tokens, self._device) if tokens is None else tokens)

    def _replay(
        self,
        layers: LayerRange,
        bucket: Bucket,
        planned: PlannedBatch,
        pool: PagePool,
        hidden: torch.Tensor | None,
        embedding: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        assert self.graphs is not None
        inputs, count = self.graphs.inputs(bucket), len(planned.positions)
        source = inputs.fill(layers, self._numbers(layers, planned, pool), planned.tokens)
        if hidden is None:
            assert embedding is not None, "the first hop holds the embedding"
            inputs.hidden.copy_(embedding(inputs.tokens))
        else:
            inputs.hidden[:count].copy_(hidden)
            if source is not None and count < bucket.rows:
                inputs.hidden[count:].copy_(inputs.hidden[int(source[-1])].expand(bucket.rows - count, -1))
        return self.graphs.replay(layers, bucket)[:count]

    def _numbers(self, layers: LayerRange, planned: PlannedBatch, pool: PagePool) -> HostStep:
        if planned.numbers is not None and planned.numbers[0] == (pool.num_moves, layers):
            return planned.numbers[1]
        return host_step(make_batch(planned, torch.device("cpu")), planned.positions, pool, tuple(layers))

    def _eager(
        self,
        layers: LayerRange,
        units: Mapping[int, Layer],
        step: StepBatch,
        planned: PlannedBatch,
        pool: PagePool,
        hidden: torch.Tensor | None,
        embedding: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        tokens = attach(step, pool, tuple(layers), self._device, planned.tokens)
        hidden = self._enter(hidden, embedding, planned, tokens)
        kvs = [LayerKV(layer, pool.data, pool.page_of(layer)) for layer in layers]
        return run_layers([units[layer] for layer in layers], hidden, step, kvs)

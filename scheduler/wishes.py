"""What an operator writes about a layout, turned into a `Layout`. Pure.

Two forms: ``{"layers": [11, 19]}``, counts for the present workers in their order (more counts than stages take in idle
workers, fewer leave the last ones out), and ``{"stages": [{"worker": "w1", "layers": [0, 12]}, ...]}``, which says it all.
"""

from collections.abc import Sequence
from typing import Any

from kvstore.ids import LayerRange, WorkerName
from runtime.layout import Layout, Segment, layout_from_counts


class LayoutError(ValueError):
    """What was written is not a layout of this model over these workers; the message says what would be."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


def read_layout(wish: dict[str, Any], present: Layout, workers: Sequence[WorkerName]) -> Layout:
    """The layout that `wish` asks for; its epoch is 0 until a transition takes it up.

    Raises:
        LayoutError: with what is wrong, and the numbers that would be right.
    """
    counts, stages = wish.get("layers"), wish.get("stages")
    if (counts is None) == (stages is None):
        raise LayoutError(
            'say either "layers" (counts, such as [11, 19]) or "stages" (worker and layers each)', "layers"
        )
    if counts is not None:
        return _from_counts(counts, present, workers)
    return _from_stages(stages, present, workers)


def without_worker(present: Layout, name: WorkerName, workers: Sequence[WorkerName], counts: Sequence[int]) -> Layout:
    """A layout over the other workers of `present`, or over idle ones when there is no other."""
    rest = [worker for worker in present.workers if worker != name]
    rest = rest or [worker for worker in workers if worker != name][:1]
    return layout_from_counts(0, rest[: len(counts)], counts)


def _from_counts(counts: Any, present: Layout, workers: Sequence[WorkerName]) -> Layout:
    if not isinstance(counts, list) or not counts or not all(_is_count(count) for count in counts):
        raise LayoutError(f"layers: {counts!r} is not a list of layer counts, such as [11, 19]", "layers")
    if sum(counts) != present.num_layers:
        raise LayoutError(
            f"layers: {counts} adds up to {sum(counts)}, the model has {present.num_layers} layers", "layers"
        )
    chain = [*present.workers, *(name for name in workers if name not in present.workers)]
    if len(counts) > len(chain):
        raise LayoutError(
            f"layers: {len(counts)} stages are asked for, {len(chain)} workers are here ({', '.join(chain)})", "layers"
        )
    if any(count == 0 for count in counts[1:-1]):
        raise LayoutError(f"layers: {counts} leaves a stage in the middle without layers", "layers")
    return layout_from_counts(0, chain[: len(counts)], counts)


def _from_stages(stages: Any, present: Layout, workers: Sequence[WorkerName]) -> Layout:
    if not isinstance(stages, list) or not stages:
        raise LayoutError('stages: a list of {"worker": NAME, "layers": [START, STOP]} is wanted', "stages")
    segments = []
    for index, stage in enumerate(stages):
        where = f"stages[{index}]"
        if not isinstance(stage, dict):
            raise LayoutError(f'{where}: {{"worker": NAME, "layers": [START, STOP]}} is wanted', "stages")
        name, layers = stage.get("worker"), stage.get("layers")
        if name not in workers:
            raise LayoutError(f"{where}.worker: there is no worker {name!r}; there are {', '.join(workers)}", "stages")
        if not (isinstance(layers, list) and len(layers) == 2 and all(_is_count(bound) for bound in layers)):
            raise LayoutError(f"{where}.layers: {layers!r} is not [START, STOP]", "stages")
        try:
            segments.append(Segment(str(name), LayerRange(*layers)))
        except ValueError as error:
            raise LayoutError(f"{where}.layers: {error}", "stages") from None
    try:
        return Layout(0, present.num_layers, tuple(segments))
    except ValueError as error:
        raise LayoutError(f"stages: {error}", "stages") from None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0

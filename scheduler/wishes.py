"""What an operator wants of a layout: read into a `Wish`, and turned into a `Layout`. Pure.

Two forms are written: ``{"layers": [11, 19]}``, counts for the present workers in their order (more counts than stages take
in idle workers, fewer leave the last ones out), and ``{"stages": [{"worker": "w1", "layers": [0, 12]}, ...]}``, which says it
all. A third wish is that a worker be drained.

What counts and drains mean depends on the layout that they change. So a wish is kept as it is while it waits behind
another change, and is resolved against the layout that it finds when its turn comes.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, assert_never

from kvstore.ids import LayerRange, WorkerName
from runtime.layout import Layout, Segment, layout_from_counts
from scheduler.transition import Refused

_STAGE_FIELDS = ("worker", "layers")


class LayoutError(ValueError):
    """What was written is not a layout of this model over these workers; the message says what would be."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class Counts:
    """So many layers for each of the workers that serve, in their order, and then for idle ones that are not drained."""

    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Drained:
    """Nothing on `worker` from now on; what it had is balanced over the other ones that serve."""

    worker: WorkerName


Wish: TypeAlias = Layout | Counts | Drained


def parse_wish(wish: dict[str, Any], num_layers: int, workers: Sequence[WorkerName]) -> Layout | Counts:
    """What the body of ``POST /admin/layout`` asks for. A layout's epoch is 0 until a transition takes it up.

    Raises:
        LayoutError: it is none of a model of `num_layers` layers over `workers`, with the numbers that would be right.
    """
    counts, stages = wish.get("layers"), wish.get("stages")
    if (counts is None) == (stages is None):
        raise LayoutError(
            'say either "layers" (counts, such as [11, 19]) or "stages" (worker and layers each)', "layers"
        )
    if counts is not None:
        return _read_counts(counts, num_layers)
    return _read_stages(stages, num_layers, workers)


def resolve(
    wish: Wish,
    present: Layout,
    workers: Sequence[WorkerName],
    drained: Collection[WorkerName],
    balanced: Callable[[Sequence[WorkerName]], Sequence[int]],
) -> Layout:
    """The layout that `wish` means where `present` serves and `workers` are there, in their order, some of them drained.

    `balanced` gives the layers that keep workers equally busy.

    Raises:
        LayoutError: there are too few workers for it.
        Refused: there is no other worker.
    """
    match wish:
        case Layout():
            return wish
        case Counts():
            return _from_counts(wish.counts, present, workers, drained)
        case Drained():
            return _without(wish.worker, present, workers, drained, balanced)
        case _:
            assert_never(wish)


def _without(
    name: WorkerName,
    present: Layout,
    workers: Sequence[WorkerName],
    drained: Collection[WorkerName],
    balanced: Callable[[Sequence[WorkerName]], Sequence[int]],
) -> Layout:
    """A layout over the other workers of `present`, or over an idle one that is not drained when there is no other."""
    if name not in present.workers:
        return present
    rest = [worker for worker in present.workers if worker != name and worker in workers]
    rest = rest or [worker for worker in workers if worker != name and worker not in drained][:1]
    if not rest:
        raise Refused(
            f"{name} is the only worker that is not drained; start another one first{_drained([other for other in drained if other != name])}"
        )
    return layout_from_counts(0, rest, balanced(rest))


def _from_counts(
    counts: tuple[int, ...], present: Layout, workers: Sequence[WorkerName], drained: Collection[WorkerName]
) -> Layout:
    chain = [name for name in present.workers if name in workers]
    chain += [name for name in workers if name not in chain and name not in drained]
    if len(counts) > len(chain):
        raise LayoutError(
            f"layers: {len(counts)} stages are asked for, {len(chain)} workers are here ({', '.join(chain)})"
            f"{_drained(drained)}",
            "layers",
        )
    return layout_from_counts(0, chain[: len(counts)], counts)


def _drained(names: Collection[WorkerName]) -> str:
    return f"; {', '.join(sorted(names))} drained: resume it, or name it in a layout" if names else ""


def _read_counts(counts: Any, num_layers: int) -> Counts:
    if not isinstance(counts, list) or not counts or not all(_is_count(count) for count in counts):
        raise LayoutError(f"layers: {counts!r} is not a list of layer counts, such as [11, 19]", "layers")
    if sum(counts) != num_layers:
        raise LayoutError(f"layers: {counts} adds up to {sum(counts)}, the model has {num_layers} layers", "layers")
    if any(count == 0 for count in counts[1:-1]):
        raise LayoutError(f"layers: {counts} leaves a stage in the middle without layers", "layers")
    return Counts(tuple(counts))


def _read_stages(stages: Any, num_layers: int, workers: Sequence[WorkerName]) -> Layout:
    if not isinstance(stages, list) or not stages:
        raise LayoutError('stages: a list of {"worker": NAME, "layers": [START, STOP]} is wanted', "stages")
    segments = []
    for index, stage in enumerate(stages):
        where = f"stages[{index}]"
        if not isinstance(stage, dict):
            raise LayoutError(f'{where}: {{"worker": NAME, "layers": [START, STOP]}} is wanted', "stages")
        for key in stage:
            if key not in _STAGE_FIELDS:
                raise LayoutError(f"{where}: {key!r} is no field of a stage; there are worker, layers", "stages")
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
        return Layout(0, num_layers, tuple(segments))
    except ValueError as error:
        raise LayoutError(f"stages: {error}", "stages") from None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0

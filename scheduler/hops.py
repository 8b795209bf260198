"""A change in several transitions, when the KV of all that moves does not fit beside what stays: which layers go when. Pure.

A *hop* is a transition of its own, and while it lasts a worker has pages for what it holds and for what arrives. A layer that has
left makes room for one that arrives, so the order matters: two full workers exchange their layers a few at a time, in turn. The order is
searched for layer by layer, depth first over how many layers of each move have gone; a hop then takes as many of them as fit.

Never true: a change is refused for want of room though single layers could go in some order, unless more than `MAX_STATES` ways were tried.
"""

from collections.abc import Collection, Iterator
from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from typing import Protocol

from kvstore.ids import WorkerName
from runtime.layout import Layout, Move, layout_from_owners

MAX_STATES = 1_000
"""How many partial changes a search looks at; some 20 us each with 30 layers."""
NO_LIMIT = 1 << 62


class Room(Protocol):
    """Of one worker, the KV blocks for which it has pages while it holds these layers and ends of the model."""

    def __call__(self, worker: WorkerName, layers: Collection[int], *, embedding: bool, lm_head: bool) -> int: ...


@dataclass(frozen=True, slots=True)
class Course:
    """How far single layers can go, from an old layout towards a new one."""

    layers: tuple[int, ...]
    """In the order in which they can go."""
    reached: Layout
    """Where they lead; the new layout when nothing stands in the way."""
    blocked: WorkerName | None
    """A worker that has no room for the next layer that it should get; None when nothing stands in the way."""


def capacity(room: Room, a: Layout, b: Layout) -> int:
    """Blocks that all workers have pages for while they hold what both layouts give them."""
    ends = _ends(a), _ends(b)
    blocks = NO_LIMIT
    for worker in dict.fromkeys((*a.workers, *b.workers)):
        layers = {*a.layers_of(worker), *b.layers_of(worker)}
        if layers:
            embedding, lm_head = (any(worker == end[i] for end in ends) for i in range(2))
            blocks = min(blocks, room(worker, layers, embedding=embedding, lm_head=lm_head))
    return blocks


def split_into_hops(old: Layout, new: Layout, moves: ListOf[Move], room: Room, wanted: int) -> list[Layout]:
    """Layouts from `old` (not included) to `new`, each reachable from the one before with `wanted` blocks in use.

    One hop when the whole change fits, else as few layers at a time as fit, down to one. Empty when there is no way. Only the
    last hop keeps segments that hold no layer.
    """
    if capacity(room, old, new) >= wanted:
        return [new]
    course = find_course(old, new, moves, room, wanted)
    if course.blocked is not None:
        return []
    hops, current, order = [], old, course.layers
    targets = new.owners()
    while order:
        for count in range(len(order), 0, -1):
            after = new if count == len(order) else _changed(current, targets, order[:count])
            if capacity(room, current, after) >= wanted:
                break
        else:
            return []  # an end of the model, which goes with its layer, has no room
        hops.append(after)
        current, order = after, order[count:]
    return hops


def split_evenly(old: Layout, new: Layout, order: ListOf[int], count: int) -> list[Layout]:
    """Layouts from `old` (not included) to `new` in `count` hops of about as many layers each, which go in this order."""
    targets, hops = new.owners(), []
    stops = [len(order) * (hop + 1) // count for hop in range(count)]
    for stop in stops[:-1]:
        hops.append(_changed(old, targets, order[:stop]))
    return [*hops, new]


def roomiest(old: Layout, new: Layout, moves: ListOf[Move], room: Room) -> int:
    """The most blocks that may be in use for the change to be possible, in as many hops as it takes."""
    least, most = capacity(room, old, new), min(capacity(room, old, old), capacity(room, new, new))
    counts = sorted({blocks for blocks in _sizes(old, new, room) if least < blocks <= most})
    low, high = 0, len(counts)  # counts[:low] are possible, counts[high:] are not
    while low < high:
        middle = (low + high) // 2
        if find_course(old, new, moves, room, counts[middle]).blocked is None:
            low = middle + 1
        else:
            high = middle
    return counts[low - 1] if low else least


def find_course(
    old: Layout, new: Layout, moves: ListOf[Move], room: Room, wanted: int, most_states: int = MAX_STATES
) -> Course:
    """An order in which all layers that change owner can go one by one with `wanted` blocks in use, or as many as can."""
    targets, first = new.owners(), old.owners()
    queues = [_outward(move, first) for move in moves]
    best: tuple[int, ...] = ()
    seen: set[tuple[int, ...]] = set()
    ways: list[tuple[tuple[int, ...], tuple[int, ...], int]] = [((0,) * len(queues), (), -1)]
    while ways and len(seen) < most_states:
        gone, order, last = ways.pop()
        if gone in seen:
            continue
        seen.add(gone)
        if len(order) == sum(map(len, queues)):
            return Course(order, new, None)
        if len(order) > len(best):
            best = order
        receives = {move.target for move, queue, count in zip(moves, queues, gone, strict=True) if count < len(queue)}
        options = [index for index, queue in enumerate(queues) if gone[index] < len(queue)]
        # What was begun goes on, so that layouts between have few segments; then what makes room that somebody waits for.
        options.sort(key=lambda index: (index != last, moves[index].source not in receives, index))
        current = list(first)
        for layer in order:
            current[layer] = targets[layer]
        for index in reversed(options):
            layer = queues[index][gone[index]]
            if _fits(current, targets[layer], layer, room, wanted):
                after = (*gone[:index], gone[index] + 1, *gone[index + 1 :])
                ways.append((after, (*order, layer), index))
    reached = _changed(old, targets, best) if best else old
    here = reached.owners()
    return Course(best, reached, next(target for layer, target in enumerate(targets) if here[layer] != target))


def _fits(owners: ListOf[WorkerName], target: WorkerName, layer: int, room: Room, wanted: int) -> bool:
    """Whether one more layer has room where it belongs; no other worker holds more than before."""
    layers = {at for at, owner in enumerate(owners) if owner == target} | {layer}
    last = len(owners) - 1
    embedding, lm_head = target == owners[0] or layer == 0, target == owners[last] or layer == last
    return room(target, layers, embedding=embedding, lm_head=lm_head) >= wanted


def _outward(move: Move, owners: ListOf[WorkerName]) -> list[int]:
    """The layers of a move from the end on that touches what its target holds already."""
    layers = list(move.layers)
    after = owners[move.layers.stop] if move.layers.stop < len(owners) else None
    return layers[::-1] if after == move.target else layers


def _sizes(old: Layout, new: Layout, room: Room) -> Iterator[int]:
    """Every number of blocks that could be the limit of some worker on the way."""
    for worker in dict.fromkeys((*old.workers, *new.workers)):
        every = sorted({*old.layers_of(worker), *new.layers_of(worker)})
        for embedding in (False, True):
            for lm_head in (False, True):
                for count in range(1, len(every) + 1):
                    yield room(worker, every[:count], embedding=embedding, lm_head=lm_head)


def _ends(layout: Layout) -> tuple[WorkerName, WorkerName]:
    return layout.embedding_worker, layout.lm_head_worker


def _changed(layout: Layout, targets: ListOf[WorkerName], layers: ListOf[int]) -> Layout:
    owners = list(layout.owners())
    for layer in layers:
        owners[layer] = targets[layer]
    return layout_from_owners(layout.epoch, owners)

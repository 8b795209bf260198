"""A transition as values: how far it is, what has arrived, and the report that stays. Pure.

The phases, and what each waits for:

    reserve   room: the block pool has shrunk to what both layouts can hold; if it had to, the steps that were in flight are back
    prepare   every worker of both layouts has made room and begun to load what arrives
    shadow    the arriving units are loaded and warm
    copy      mirrors are on; what running sequences wrote before has been copied
    flip      sequences go over, each between two of its steps, as soon as its snapshot has arrived
    retire    the old layout is empty: the workers drop it and report
    committed | aborted | refused

Until the first step of the next epoch is formed a transition can be aborted and leaves no trace; from then on it only
goes forward.
"""

from collections.abc import Callable
from collections.abc import Sequence as ListOf
from typing import Any, Literal, TypeAlias

import msgspec

from kvstore.ids import BlockId, WorkerName
from runtime.layout import Layout, Move, layout_from_owners

Strategy: TypeAlias = Literal["live", "stop-copy", "drain", "recompute"]
STRATEGIES: tuple[Strategy, ...] = ("live", "stop-copy", "drain", "recompute")
Phase: TypeAlias = Literal["reserve", "prepare", "shadow", "copy", "flip", "retire", "abort", "done"]

NEXT_PHASES: dict[Phase, tuple[Phase, ...]] = {
    "reserve": ("prepare", "abort"),
    "prepare": ("shadow", "abort"),
    "shadow": ("copy", "abort"),
    "copy": ("flip", "abort"),
    "flip": ("retire", "done"),
    "retire": ("reserve", "done"),
    "abort": ("done",),
    "done": (),
}
ABORTABLE: tuple[Phase, ...] = ("reserve", "prepare", "shadow", "copy")
"""``flip -> done`` is a worker's death after the first flip; ``retire -> reserve`` the next hop of a change in place."""


class Snapshot:
    """Which of the blocks that were live when the mirrors began are at their targets (`scheduler.lanes.Arrived`)."""

    def __init__(self, blocks: ListOf[BlockId], num_moves: int) -> None:
        self.num_blocks = len(blocks)
        self._index = {block: index for index, block in enumerate(blocks)}
        self._counts = [0] * num_moves
        self._covered = 0 if num_moves else len(blocks)

    @property
    def num_arrived(self) -> int:
        """Blocks, from the first of the list on, that every move has copied."""
        return self._covered

    @property
    def is_complete(self) -> bool:
        return self._covered == self.num_blocks

    def advance(self, move: int, count: int) -> None:
        self._counts[move] = max(self._counts[move], count)
        self._covered = min(self._counts)

    def covers(self, blocks: ListOf[BlockId]) -> bool:
        if self.is_complete:
            return True
        covered, index = self._covered, self._index
        return all(index.get(block, -1) < covered for block in blocks)

    def num_covered(self, blocks: ListOf[BlockId]) -> int:
        if self.is_complete:
            return len(blocks)
        for position, block in enumerate(blocks):
            if self._index.get(block, -1) >= self._covered:
                return position
        return len(blocks)


class Report(msgspec.Struct):
    """What a transition did. Times in seconds unless named otherwise; bytes as received by the targets."""

    id: int
    strategy: Strategy
    source: list[dict[str, Any]]
    target: list[dict[str, Any]]
    source_epoch: int
    target_epoch: int
    outcome: str = "running"
    why: str = ""
    num_hops: int = 1
    phases_s: dict[str, float] = {}
    total_s: float = 0.0
    layers_moved: int = 0
    weight_bytes: int = 0
    peer_weight_bytes: int = 0
    """How much of `weight_bytes` came from the peers that held it, instead of the checkpoint."""
    paced_s: float = 0.0
    """What loading and copying needed at the limiters' pace: on the worker that took longest, summed over hops."""
    snapshot_bytes: int = 0
    mirror_bytes: int = 0
    blocks_copied: int = 0
    sequences_flipped: int = 0
    sequences_at_start: int = 0
    engine_pause_ms: dict[str, float] = {}
    fence_waits: int = 0
    fence_wait_ms: float = 0.0
    recomputed_tokens: int = 0
    """KV rows that sequences lost because the change needed their room (or flipped at once), and compute again."""
    dropped_requests: int = 0

    def add_pauses(self, pauses_us: ListOf[int], excesses_us: ListOf[int] = (), ordinary_us: ListOf[int] = ()) -> None:
        """`pauses_us` are all that any worker saw, kept as their maximum, median, 99th percentile and number.

        `excesses_us` are those of them whose sequence had run at least twice before, less its mean gap between steps;
        kept in the same way, each key with ``excess_`` before it. `ordinary_us` is the same of gaps at which nothing
        flipped, with ``ordinary_``: an excess that is no larger is one that steps of other sequences make every day.
        Without a pause there is nothing to keep.
        """
        if not pauses_us:
            return
        for prefix, values in (("", pauses_us), ("excess_", excesses_us), ("ordinary_", ordinary_us)):
            if values:
                ordered = sorted(values)
                self.engine_pause_ms[prefix + "max"] = ordered[-1] / 1e3
                self.engine_pause_ms[prefix + "p50"] = ordered[len(ordered) // 2] / 1e3
                self.engine_pause_ms[prefix + "p99"] = ordered[min(len(ordered) * 99 // 100, len(ordered) - 1)] / 1e3
                self.engine_pause_ms[prefix + "count"] = float(len(ordered))


def describe(layout: Layout) -> list[dict[str, Any]]:
    """A layout as the API shows it."""
    return [{"worker": s.worker, "layers": [s.layers.start, s.layers.stop]} for s in layout.segments]


def move_order(old: Layout, new: Layout, moves: ListOf[Move]) -> list[int]:
    """The layers that change owner, in an order in which a partial change leaves few segments.

    Each move begins at the end that touches what its target holds already.
    """
    order: list[int] = []
    owners = old.owners()
    for move in moves:
        layers = list(move.layers)
        after = owners[move.layers.stop] if move.layers.stop < len(owners) else None
        order += reversed(layers) if after == move.target else layers
    return order


def split_into_hops(
    old: Layout, new: Layout, moves: ListOf[Move], fits: Callable[[Layout, Layout], bool]
) -> list[Layout]:
    """Layouts from `old` (not included) to `new`, each reachable from the one before under `fits`.

    ``fits(a, b)`` says whether a transition from a to b has room. One hop when the whole change fits, else as few
    layers at a time as fit. Empty when even one layer has no room. Only the last hop keeps segments that hold no layer.
    """
    if not moves or fits(old, new):
        return [new]
    hops: list[Layout] = []
    current, order = old, move_order(old, new, moves)
    targets = new.owners()
    while order:
        taken = next((n for n in range(len(order), 0, -1) if fits(current, _changed(current, targets, order[:n]))), 0)
        if not taken:
            return []
        current = _changed(current, targets, order[:taken])
        order = order[taken:]
        hops.append(current)
    if hops[-1].segments != new.segments:
        hops.append(new)
    else:
        hops[-1] = new
    return hops


def _changed(layout: Layout, targets: ListOf[WorkerName], layers: ListOf[int]) -> Layout:
    owners = list(layout.owners())
    for layer in layers:
        owners[layer] = targets[layer]
    return layout_from_owners(layout.epoch, owners)

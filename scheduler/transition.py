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

from collections.abc import Sequence as ListOf
from typing import Any, Literal, TypeAlias

import msgspec

from kvstore.ids import BlockId
from runtime.layout import Layout

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


class Refused(Exception):
    """A change that cannot be made; nothing has changed. The message says why and what would work."""


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

    def skip(self, blocks: ListOf[BlockId]) -> None:
        """These have been handed out anew: all that will be read of them is written from now on, and mirrored."""
        for block in blocks:
            self._index.pop(block, None)

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
    reached: list[dict[str, Any]] = []
    """The layout that served when it ended: the target's if it committed, the source's if nothing had flipped; empty when the pipeline
    broke, and whatever the recovery finds serves next."""
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
    """Requests that ended with an error because of it: a worker was lost on the way, and no layout that can be reached holds them."""
    cached_blocks_dropped: int = 0
    """Blocks of the prefix cache that had to go because the change needed their room."""

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

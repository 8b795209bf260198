"""What holds after every event, whatever the network and the workers do, and what holds when all is quiet again.

What the head believes is held against what the workers have, whose pools and stages are real.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from kvstore.ids import WorkerName
from kvstore.page_pool import NO_PAGE, PagePool
from runtime.layout import Layout
from runtime.member import unit_keys
from runtime.messages import Audit
from scheduler.transition import describe

if TYPE_CHECKING:
    from tests.sim.cluster import SimCluster

KV_ARRIVES = ("copy", "flip", "retire")
"""Phases in which the layers that move may take pages at their targets."""
ENDED = ("committed", "aborted", "refused")


class Invariants:
    """Looks at a cluster after each event that its head has handled."""

    def __init__(self, cluster: SimCluster) -> None:
        self._cluster = cluster
        self._last_epoch = 0
        self._last_reached: list[dict[str, object]] = []
        self._ended: dict[int, tuple[str, str, str]] = {}
        self.num_checked = 0
        """How often a worker's room was compared with what may be asked of it."""

    def check(self) -> None:
        self._check_epochs()
        self._check_reports()
        self._check_room()
        layout = self._cluster.head.layout
        self._last_reached = describe(layout) if layout is not None else []

    def _check_epochs(self) -> None:
        """Epochs grow; the directory knows those whose steps may run, and their owners are those of the layouts."""
        head = self._cluster.head
        assert head.epoch >= self._last_epoch, f"epoch {head.epoch} follows {self._last_epoch}"
        self._last_epoch = head.epoch
        if head.status != "serving":
            assert not head.directory.epochs, f"{head.status}, and epochs {head.directory.epochs} are open"
            return
        assert head.directory.epochs == tuple(head.layouts), f"{head.directory.epochs} are open, not {head.layouts}"
        expected = [head.epoch]
        if (target := head.reconfiguration.target) is not None and _phase(self._cluster) == "flip":
            expected.append(target.epoch)
        assert list(head.layouts) == expected, f"layouts of {list(head.layouts)} serve, not of {expected}"
        for epoch, layout in head.layouts.items():
            owners = tuple(worker for worker, layers in head.directory.placement_of(epoch) for _ in layers)
            assert owners == layout.owners(), f"epoch {epoch} is owned by {owners}, not {layout.owners()}"

    def _check_reports(self) -> None:
        """A report that has ended stays as it is. When it ends, what it says was reached is what the workers serve."""
        head = self._cluster.head
        for change, report in head.reconfiguration.reports.items():
            if report.outcome not in ENDED:
                assert change not in self._ended, f"change {change} goes on after its end"
                continue
            end = (report.outcome, report.why, str(report.reached))
            if change in self._ended:
                assert self._ended[change] == end, f"change {change} ended as {self._ended[change]}, now as {end}"
                continue
            self._ended[change] = end
            spent_s = sum(report.phases_s.values())
            assert abs(spent_s - report.total_s) < 1e-6, (
                f"change {change}: {spent_s} s in phases, {report.total_s} s in all"
            )
            if report.outcome == "committed":
                assert report.reached == report.target, f"change {change} is committed at {report.reached}"
            if head.status != "serving" or head.layout is None:
                continue
            if report.reached == self._last_reached != describe(head.layout):
                continue  # it was taken out of the queue, and then the one before it arrived
            assert report.reached == describe(head.layout), f"change {change} says it reached {report.reached}"
            for name in head.layout.workers:
                worker = self._cluster.workers[name]
                if worker.alive:
                    served = worker.member._stages[head.epoch].layout
                    assert describe(served) == report.reached, f"{name} serves {served}, the report says otherwise"

    def _check_room(self) -> None:
        """Whatever blocks the head hands out, a page for each of their layers is there: on every worker, in either layout."""
        cluster, head = self._cluster, self._cluster.head
        if head.status != "serving" or head.layout is None:
            return
        phase, target, num_blocks = _phase(cluster), head.reconfiguration.target, head.pool.num_blocks
        arriving = target if phase in KV_ARRIVES else None
        for name in dict.fromkeys((*head.layout.workers, *(arriving.workers if arriving else ()))):
            worker = cluster.workers[name]
            pool = worker.member.pool
            if not worker.alive or name not in head.members.workers or pool is None:
                continue
            layers = set(head.layout.layers_of(name)) | set(arriving.layers_of(name) if arriving else ())
            promised = num_blocks * len(layers)
            self.num_checked += 1
            if promised + pool.num_used <= pool.num_pages:
                continue
            others = _pages_of_others(pool, layers, head.pool.retired())
            assert promised + others <= pool.num_pages, (
                f"{name} has {pool.num_pages} pages, {others} of them for what it need not hold; {num_blocks} blocks of "
                f"layers {sorted(layers)} may be wanted in phase {phase}"
            )


def _phase(cluster: SimCluster) -> str | None:
    view = cluster.head.reconfiguration.view()
    return None if view is None else str(view["phase"])


def _pages_of_others(pool: PagePool, layers: set[int], retired: list[int]) -> int:
    """Pages in use for other layers, or for blocks that nobody may use any more."""
    others = 0
    for layer in pool.layers:
        table = pool.page_of(layer)
        if layer not in layers:
            others += int(np.count_nonzero(table != NO_PAGE))
        elif retired:
            others += int(np.count_nonzero(table[[block for block in retired if block < len(table)]] != NO_PAGE))
    return others


def audit(cluster: SimCluster) -> None:
    """When everything is quiet, every worker holds exactly what the layout gives it, and nothing else."""
    head = cluster.head
    head.check_integrity()
    layout = head.layout
    for worker in cluster.workers.values():
        if not worker.alive or worker.name not in head.members.workers:
            continue
        found = worker.member.audit(Audit([], 1 << 60))
        assert not found.problems, f"{worker.name}: {found.problems}"
        if layout is not None and head.status == "serving":
            expected = set(unit_keys(layout, worker.name))
            assert worker.store.held() == expected, f"{worker.name} holds {worker.store.held()}, not {expected}"
            assert worker.member.serves() == ([layout.epoch] if expected else [])
            assert worker.member.background_wait_s() is None, f"{worker.name} has something left to do"
            _audit_pages(cluster, worker.name, layout)
    if layout is not None and head.status == "serving":
        _audit_head(cluster, layout)


def _audit_head(cluster: SimCluster, layout: Layout) -> None:
    """Nothing of a transition is left: no reservation, no hold on admission, no second epoch."""
    head, batcher = cluster.head, cluster.head.batcher
    assert batcher.num_stages == len(layout.workers)
    assert (batcher.is_held, batcher.admits, batcher.is_squeezed, batcher.flip_due_s) == (False, True, False, math.inf)
    assert head.directory.epochs == (layout.epoch,)
    holds = [
        pool.num_pages // len(pool.layers)
        for name in layout.workers
        if cluster.workers[name].alive and (pool := cluster.workers[name].member.pool) is not None and pool.layers
    ]
    if len(holds) == sum(1 for name in layout.workers if layout.layers_of(name)):
        assert head.pool.num_blocks == min(holds), f"{head.pool.num_blocks} blocks, the workers have room for {holds}"
    assert head.pool.target == head.num_blocks == head.pool.num_blocks


def _audit_pages(cluster: SimCluster, name: WorkerName, layout: Layout) -> None:
    """Every cached block has a page for every layer, on the worker that owns it now; none is there for anything else."""
    pool = cluster.workers[name].member.pool
    universe = set(cluster.head.pool.universe())
    if pool is None:
        assert not layout.layers_of(name)
        return
    assert cluster.head.members.workers[name].num_pages == pool.num_pages, (
        f"the head knows another size of {name}'s pool"
    )
    for layer in layout.layers_of(name):
        table = pool.page_of(layer)
        for block in cluster.head.pool.cached_blocks():
            assert block < len(table), f"{name} has no page for cached block {block} of layer {layer}"
            assert table[block] >= 0, f"{name} has no page for cached block {block} of layer {layer}"
        leaked = set(np.flatnonzero(table != NO_PAGE).tolist()) - universe
        assert not leaked, f"{name} has pages for blocks {leaked} of layer {layer}, which nobody may use"

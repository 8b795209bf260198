"""Changes that take several hops because there is little room, many of them in a row, and all that can go wrong on the way."""

import random
from collections import Counter

from kvstore.ids import WorkerName
from runtime.layout import Layout, layout_from_owners
from scheduler.batching import BatchingConfig
from scheduler.transition import STRATEGIES
from tests.sim import of_seeds
from tests.sim.cluster import NUM_LAYERS, SimCluster, make_request
from tests.sim.network import HEAD
from tests.sim.test_cluster import check, seeds_of

MISHAPS = (
    "a crash",
    "a crash of a later one",
    "a crash of a later one",
    "DELETE",
    "a broken link",
    "a failed load",
    "none",
)
PHASES = ("reserve", "prepare", "shadow", "copy", "flip", "retire", "abort")
BLOCK_SIZE = 4


def tight(seed: int) -> SimCluster:
    """Workers that hold two layers with what runs and have no room for a third; layouts in which nearly every one holds two."""
    rng = random.Random(f"tight {seed}")
    num_stages = rng.choice((2, 3, 3))
    batching = BatchingConfig(
        num_microbatches=rng.randint(0, num_stages + 1),
        max_step_tokens=rng.choice((8, 64)),
        max_running=rng.choice((3, 4, 6)),
        block_size=BLOCK_SIZE,
        prefix_cache=rng.random() < 0.5,
    )
    cluster = SimCluster(
        seed,
        num_stages=num_stages,
        batching=batching,
        num_blocks=rng.randint(18, 26),
        num_spares=3 - num_stages + rng.randint(0, 2),
        shadow_failures=rng.choice((0.0, 0.0, 0.1)),
        is_elastic=rng.random() < 0.3,
    )
    cluster.at(0.45, lambda: ask(cluster, deadline_s=1e9))
    prompts: list[list[int]] = []
    at = 0.6
    for sequence in range(1, rng.randint(6, 14)):
        at += rng.expovariate(30.0)
        request = make_request(rng, prompts, max_prompt=30, max_output=60)
        cluster.at(at, lambda s=sequence, r=request: cluster.submit(s, r))
        if rng.random() < 0.1:
            cluster.at(at + rng.uniform(0.0, 0.2), lambda s=sequence: cluster.cancel(s))
    for _ in range(rng.randint(2, 6)):
        deadline_s = rng.uniform(0.02, 0.6) if rng.random() < 0.2 else 1e9
        cluster.at(rng.uniform(0.6, at), lambda d=deadline_s: ask(cluster, d))
    for mishap in rng.choices(MISHAPS, k=rng.randint(0, 2)):
        lie_in_wait(cluster, mishap, rng.choice((1, 1, 2, 3)), rng.choice(PHASES), rng.uniform(0.5, at), at + 0.5)
    for _ in range(rng.choice((0, 0, 1, 2))):
        cluster.at(rng.uniform(0.6, at), lambda: cluster.crash(cluster.random.choice(sorted(cluster.workers))))
    for _ in range(rng.randint(0, 2)):
        cluster.at(rng.uniform(0.6, at), lambda: cluster.abort_change(cluster.random.randint(1, cluster.changes)))
    for index in range(1, 120):
        cluster.at(0.5 * index, cluster.tick)
    return cluster


def ask(cluster: SimCluster, deadline_s: float) -> None:
    rng, names = cluster.random, cluster.head.members.in_order()
    if not names:
        return
    strategy = "live" if rng.random() < 0.8 else rng.choice(STRATEGIES)
    cluster.change(full_layout(rng, names), strategy, queue=rng.random() < 0.9, deadline_s=deadline_s)


def full_layout(rng: random.Random, names: list[WorkerName]) -> Layout:
    """Two layers on nearly every worker, in any order: next to each other or not."""
    most = 2 if 2 * len(names) >= NUM_LAYERS and rng.random() < 0.9 else NUM_LAYERS
    places = [name for name in names for _ in range(most)]
    rng.shuffle(places)
    owners = places[:NUM_LAYERS]
    return layout_from_owners(0, sorted(owners, key=names.index) if rng.random() < 0.3 else owners)


def lie_in_wait(cluster: SimCluster, mishap: str, hop: int, phase: str, from_s: float, until_s: float) -> None:
    """From then on, look for a change of several hops that is at this one of them, in this phase; and let it happen there."""

    def look() -> None:
        view = cluster.head.reconfiguration.view()
        if view is not None and view["phase"] == phase and view["hop"] == hop and int(str(view["num_hops"])) > 1:
            happen(cluster, mishap)
        elif cluster.now < until_s:
            cluster.at(0.002, look)

    cluster.at(from_s, look)


def happen(cluster: SimCluster, mishap: str) -> None:
    rng, head = cluster.random, cluster.head
    names, target, layout = head.members.in_order(), head.reconfiguration.target, head.layout
    if target is None or layout is None:
        return
    match mishap:
        case "a crash":
            cluster.crash(rng.choice(names))
        case "a crash of a later one":
            wanted = head.reconfiguration.last_wanted
            later = {*(wanted.workers if wanted else ())} - {*target.workers, *layout.workers}
            cluster.crash(rng.choice(sorted(later) or names))
        case "DELETE":
            cluster.abort_change(int(str((head.reconfiguration.view() or {"id": 0})["id"])))
        case "a broken link":
            sender, to = rng.sample([*names, HEAD], 2)
            cluster.break_off(sender, to)
        case "a failed load":
            cluster.shadow_failures = 1.0
            cluster.at(rng.choice((0.1, 0.5)), lambda: setattr(cluster, "shadow_failures", 0.0))
        case _:
            pass


def in_tight_room(seed: int) -> Counter[str]:
    cluster = tight(seed)
    check(cluster, until=60.0)
    head = cluster.head
    reports = head.reconfiguration.reports.values()
    assert len(reports) == cluster.changes - len(cluster.refused), "a change has no report"
    for report in reports:
        assert report.outcome in ("committed", "aborted", "refused"), report
        assert report.dropped_requests == 0
        assert "KV pages are needed" not in report.why, "more blocks were handed out than fit"
    hops = sum(report.num_hops > 1 for report in reports)
    parts = sum(
        report.reached not in (report.source, report.target) and report.outcome == "aborted" for report in reports
    )
    counts = Counter({"several hops": hops, "part of the way": parts, "lost": head.members.num_lost})
    if head.members.num_lost:
        return counts
    assert all(stream.finish_reason != "error" for stream in cluster.streams.values())
    # What a change preempted may yet find its blocks cached: a report says at most too much.
    assert head.batcher.counters.recomputed_for_changes_tokens <= sum(report.recomputed_tokens for report in reports)
    return counts


def test_many_hops_and_mishaps(block: int) -> None:
    kinds = of_seeds(in_tight_room, seeds_of(5, block))
    assert kinds["several hops"], "there was always room"
    assert kinds["lost"], "nobody was ever lost"

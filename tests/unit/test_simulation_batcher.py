"""Cohorts decide what the batcher decides: the same requests, results and changes give the same steps, outputs and counts."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from kvstore.block_pool import BlockPool
from kvstore.directory import Directory
from kvstore.ids import LayerRange
from runtime.messages import Sampling, StepPlan, StepResult
from scheduler.batching import Batcher, BatchingConfig, StepPrices
from scheduler.planning.cost import work_of_rows
from scheduler.request import Request, TokenOutput
from scheduler.simulation.batcher import CohortBatcher

BLOCK = 4


class Twins:
    """A batcher, and one with cohorts, to which the same happens."""

    def __init__(self, config: BatchingConfig, num_blocks: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.plain, self.fast = Batcher(config, *self._stores(config)), CohortBatcher(config, *self._stores(config))
        for batcher in (self.plain, self.fast):
            batcher._directory.open_epoch(1, (("w0", LayerRange(0, 2)),))
            batcher.open_epoch(1, num_blocks, max_context=100)
        self.flying: list[tuple[StepPlan, StepPlan, int]] = []
        self.now_s = 0.0
        self.num_cohorts = 0
        self.tokens: tuple[Counter[int], Counter[int]] = Counter(), Counter()
        self.ends: tuple[list[tuple[int, str]], list[tuple[int, str]]] = [], []

    def _stores(self, config: BatchingConfig) -> tuple[BlockPool, Directory]:
        return BlockPool(0, config.block_size), Directory()

    def submit(self, sequence: int) -> None:
        prompt, output = [0] * self.rng.randint(1, 30), self.rng.randint(1, 60)
        request = Request("r", prompt, Sampling(temperature=0.0), output, use_prefix_cache=False)
        for batcher in (self.plain, self.fast):
            batcher.submit(sequence, request, self.now_s)

    def form(self) -> None:
        """Every step that can be formed now is, and is the same."""
        while True:
            self.fast.lists_rows = self.rng.random() < 0.3
            lists = self.fast.lists_rows
            one, two = self.plain.next_step(self.now_s), self.fast.next_step(self.now_s)
            assert self.plain.wake_s == self.fast.wake_s
            if one is None or two is None:
                assert one is two
                return
            work = self.fast.take_work(two)
            assert work == work_of_rows((row.start, len(row.tokens), row.sample) for row in one.rows)
            self.num_cohorts += one.ordinal in self.fast._aboard
            if lists:
                self._same_rows(one, two)
            for name in ("epoch", "ordinal", "microbatch", "released", "fence", "oldest", "is_ahead", "is_followed"):
                mine, yours = getattr(one, name), getattr(two, name)
                assert sorted(mine) == sorted(yours) if name == "released" else mine == yours, name
            self.flying.append((one, two, int(work.samples)))

    def _same_rows(self, one: StepPlan, two: StepPlan) -> None:
        rows = [[(r.sequence, r.start, len(r.tokens), r.sample, r.begin is None) for r in p.rows] for p in (one, two)]
        assert rows[0] == rows[1]

    def come_back(self) -> None:
        one, _, samples = self.flying.pop(0)
        for index, batcher in enumerate((self.plain, self.fast)):
            result = StepResult(one.epoch, one.ordinal, one.microbatch, [0] * samples, [], [], [])
            self._take(index, batcher.complete(result, self.now_s))

    def catch_up(self) -> None:
        for at_s, outputs in self.fast.catch_up():
            assert at_s <= self.now_s
            self._take(1, outputs)
        assert self.tokens[0] == self.tokens[1]
        assert self.ends[0] == self.ends[1]

    def _take(self, index: int, outputs: list[tuple[int, TokenOutput]]) -> None:
        for sequence, output in outputs:
            assert sequence not in dict(self.ends[index]), "an output after the last one"
            self.tokens[index][sequence] += len(output.tokens)
            if output.finish_reason is not None:
                self.ends[index].append((sequence, output.finish_reason))

    def compare(self) -> None:
        for name in ("num_waiting", "num_running", "num_unfinished", "num_in_flight", "counters"):
            assert getattr(self.plain, name) == getattr(self.fast, name), name
        assert self.plain.load() == self.fast.load()
        assert self.plain._pool.num_used == self.fast._pool.num_used
        assert self.plain._decoding_context == self.fast._decoding_context
        assert self.plain.growth(8) == self.fast.growth(8)

    def audit(self) -> None:
        """After that nothing is held back: sequences are as they would be without cohorts."""
        self.fast.check_integrity()
        self.plain.check_integrity()
        self.catch_up()
        for one, two in zip(self.plain._sequences.values(), self.fast._sequences.values(), strict=True):
            for name in ("id", "num_scheduled", "num_in_flight", "last_ordinal", "num_published", "attempt", "epoch"):
                assert getattr(one, name) == getattr(two, name), name
            assert len(one.tokens) == len(two.tokens)
            assert len(one.blocks) == len(two.blocks)
        for one, two, _ in self.flying:
            self._same_rows(one, two)


@pytest.mark.parametrize("seed", range(60))
def test_cohorts_decide_what_the_batcher_decides(seed: int) -> None:
    rng = random.Random(seed)
    config = BatchingConfig(
        num_microbatches=rng.choice([1, 2, 3, 5]),
        max_step_tokens=rng.choice([8, 24, 64]),
        max_running=rng.choice([12, 24, 48]),
        max_queue=500,
        block_size=BLOCK,
        prefix_cache=rng.random() < 0.5,
        look_ahead=rng.choice(["always", "always", "idle", "never"]),
        tpot_goal_s=rng.choice([0.0, 0.05]),
    )
    twins = Twins(config, rng.choice([25, 60, 400]), seed)
    prices = [StepPrices(), StepPrices(0.01, 0.001, rng.choice([0.0, 1e-5, 1e-3]), 1e-4)]
    num_submitted = 0
    for _ in range(1500):
        twins.now_s += rng.choice([0.0005, 0.01, 0.05])
        kind = rng.random()
        if kind < 0.12 and num_submitted < 60:
            twins.submit(num_submitted)
            num_submitted += 1
        elif kind < 0.7 and twins.flying:
            twins.come_back()
        elif kind < 0.72:
            twins.catch_up()
        elif kind < 0.73:
            twins.audit()
        elif kind < 0.735:
            twins.plain.prices = twins.fast.prices = rng.choice(prices)
        elif kind < 0.74:
            is_guarded = twins.plain._blocks.is_guarded
            for batcher in (twins.plain, twins.fast):
                batcher.unguard() if is_guarded else batcher.guard(1)
        elif kind < 0.743:
            for batcher in (twins.plain, twins.fast):
                batcher.preempt_all()
        twins.form()
        twins.compare()
    while twins.flying:
        twins.now_s += 0.05
        twins.come_back()
        twins.form()
        twins.compare()
    twins.audit()
    assert len(twins.ends[0]) == num_submitted


def test_a_cohort_goes_on_by_itself() -> None:
    """What it is for: rows that go out again and again are made only once."""
    config = BatchingConfig(num_microbatches=1, max_step_tokens=64, block_size=BLOCK, prefix_cache=False)
    twins = Twins(replace(config, max_running=8), 400, 0)
    for sequence in range(8):
        twins.submit(sequence)
    for _ in range(100):
        twins.form()
        if not twins.flying:
            break
        twins.now_s += 0.05
        twins.come_back()
    assert twins.num_cohorts > 20
    twins.audit()

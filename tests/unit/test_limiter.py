"""The limiter: the busier a worker is, the less of its time goes to a change of layout, and never none."""

import pytest

from runtime.limiter import (
    ACCELERATOR_CREDIT_S,
    ACCELERATOR_SHARE,
    CREDIT_S,
    IDLE_AFTER_S,
    LOADING,
    MIN_SHARE,
    PASSES,
    SHARE_OF_FREE,
    Accelerator,
    Limiter,
)

GPU = Accelerator(memory_bytes_per_s=2e12, link_bytes_per_s=20e9)


def after_steps(
    busy: float, *, seconds: float = 5.0, step_s: float = 0.01, accelerator: Accelerator | None = None
) -> tuple[Limiter, float]:
    """A limiter that has seen steps of `step_s`, which took the share `busy` of the time; and the time."""
    limiter, now_s = Limiter(accelerator), 100.0
    while now_s < 100.0 + seconds:
        limiter.ran(now_s, now_s + step_s)
        now_s += step_s / busy
    return limiter, now_s - step_s / busy + step_s


def test_an_idle_worker_gives_all_its_time() -> None:
    limiter = Limiter()
    assert limiter.share(5.0) == 1.0
    assert limiter.rest_s(5.0, 0.01, 1 << 20, 1e6) == 0.0
    limiter, now_s = after_steps(0.9)
    assert limiter.share(now_s + 2 * IDLE_AFTER_S) == 1.0


def test_a_worker_is_not_idle_while_a_step_lasts() -> None:
    limiter, now_s = after_steps(0.9)
    limiter.begins()
    later_s = now_s + 2 * IDLE_AFTER_S
    assert limiter.share(later_s) == limiter.share(now_s) < 0.05
    assert not limiter.is_idle(later_s)
    limiter.ran(now_s, later_s)
    assert limiter.is_idle(later_s + 2 * IDLE_AFTER_S)


def test_the_share_falls_with_the_load() -> None:
    shares = []
    for busy in (0.2, 0.5, 0.7, 0.9, 0.999):
        limiter, now_s = after_steps(busy)
        shares.append(limiter.share(now_s))
    assert shares[2] == pytest.approx(SHARE_OF_FREE * 0.3, rel=0.05)
    assert shares[-1] == MIN_SHARE
    assert shares == sorted(shares, reverse=True)


def test_it_follows_a_change_of_load() -> None:
    limiter, now_s = after_steps(0.95)
    low = limiter.share(now_s)
    for _ in range(100):
        now_s += 0.03
        limiter.ran(now_s, now_s + 0.003)
    assert limiter.share(now_s + 0.003) > 4 * low


def test_rests_keep_the_share_and_the_rate() -> None:
    limiter, now_s = after_steps(0.7)
    share = limiter.share(now_s)
    assert 0.001 / (0.001 + limiter.rest_s(now_s, 0.001)) == pytest.approx(share)
    slow = limiter.rest_s(now_s, 0.001, num_bytes=1_000_000, bytes_per_s=10e6)
    assert 0.001 + slow == pytest.approx(0.1)


# -- accelerators -----------------------------------------------------------------------------------------------


def test_a_processor_is_charged_for_its_time_alone() -> None:
    limiter, now_s = after_steps(0.9)
    assert limiter.taken_s(0.004, 1 << 30) == 0.004
    assert limiter.loading_share(now_s) == max(MIN_SHARE, LOADING * limiter.share(now_s))
    assert limiter.loading_share(now_s + 2 * IDLE_AFTER_S) == 1.0


def test_an_accelerator_is_charged_for_bandwidth() -> None:
    """A saturated device gives its share of the memory's bandwidth, not of the time that the link needs."""
    limiter, now_s = after_steps(0.999, accelerator=GPU)
    assert limiter.share(now_s) == MIN_SHARE
    num_bytes, queued_s = 64 << 20, 100e-6
    taken_s = queued_s + PASSES * num_bytes / GPU.memory_bytes_per_s
    assert limiter.taken_s(queued_s, num_bytes) == pytest.approx(taken_s)
    period_s = queued_s + limiter.rest_s(now_s, queued_s, num_bytes)
    assert taken_s / period_s == pytest.approx(MIN_SHARE, rel=0.02)
    by_time_s = num_bytes / GPU.link_bytes_per_s / MIN_SHARE
    assert period_s < by_time_s / 10


def test_a_loader_beside_an_accelerator_works_while_steps_wait_for_it() -> None:
    for busy in (0.2, 0.999):
        here, now_s = after_steps(busy)
        assert here.working_share(now_s) == here.share(now_s)
        there, now_s = after_steps(busy, accelerator=GPU)
        assert there.working_share(now_s) == max(ACCELERATOR_SHARE, there.share(now_s)) < 1.0
        assert there.working_share(now_s + 1.0) == 1.0


def test_the_link_bounds_what_a_loader_brings() -> None:
    fast, now_s = after_steps(0.999, accelerator=GPU)
    assert PASSES * GPU.link_bytes_per_s / GPU.memory_bytes_per_s > MIN_SHARE
    assert fast.loading_share(now_s) == pytest.approx(MIN_SHARE * 2e12 / (PASSES * 20e9))
    free, now_s = after_steps(0.2, accelerator=GPU)
    assert free.loading_share(now_s) == 1.0, "all the time, where a share of the bandwidth is more than the link brings"


@pytest.mark.parametrize(("accelerator", "credit_s"), [(None, CREDIT_S), (GPU, ACCELERATOR_CREDIT_S)])
def test_slices_that_waited_for_a_step_are_made_up_for(accelerator: Accelerator | None, credit_s: float) -> None:
    limiter, now_s = after_steps(0.999, accelerator=accelerator)
    rest_s = limiter.rest_s(now_s, 0.001)
    late_s = 0.1
    assert limiter.due_s(now_s, now_s - 0.001 - late_s, 0.001) == pytest.approx(now_s - late_s + rest_s)
    long_ago = limiter.due_s(now_s, now_s - 100.0, 0.001)
    assert long_ago == pytest.approx(now_s - credit_s + rest_s), "but not for more than that"
    due_s = now_s - 0.2
    for _ in range(100):  # slices of a millisecond after a step of 0.2 s: what was due meanwhile, and no more
        due_s = limiter.due_s(now_s, due_s, 0.001)
        now_s += 0.001
        if due_s > now_s:
            break
    assert due_s - now_s <= 0.001 / MIN_SHARE
    assert due_s > now_s

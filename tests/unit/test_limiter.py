"""The limiter: the busier a worker is, the less of its time goes to a change of layout, and never none."""

import pytest

from runtime.limiter import IDLE_AFTER_S, MIN_SHARE, SHARE_OF_FREE, Limiter


def after_steps(busy: float, *, seconds: float = 5.0, step_s: float = 0.01) -> tuple[Limiter, float]:
    """A limiter that has seen steps of `step_s`, which took the share `busy` of the time; and the time."""
    limiter, now_s = Limiter(), 100.0
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

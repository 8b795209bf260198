"""Acknowledgements in batches: every message is answered exactly once, and who is never answered is told."""

import torch

from runtime import wire
from runtime.acks import BATCH, Awaited, Owed


def test_a_batch_is_answered_at_its_last_message() -> None:
    owed = Owed()
    answers = [owed.owe() for _ in range(BATCH - 1)]
    assert not any(answer.done() for answer in answers)
    answers.append(owed.owe())
    assert all(answer.done() and answer.value() == wire.ACK for answer in answers)
    assert not owed.owe().done(), "the next batch has an answer of its own"


def test_a_flush_gives_what_is_owed_and_nothing_twice() -> None:
    owed = Owed()
    owed.flush()
    first = owed.owe()
    answered: list[int] = []
    first.add_done_callback(lambda _: answered.append(1))
    owed.flush()
    owed.flush()
    assert answered == [1]
    later = owed.owe()
    assert not later.done()
    owed.flush()
    assert later.done()


def test_answers_are_taken_in_order_and_only_those_that_are_there() -> None:
    awaited, errors = Awaited(), []
    futures = [torch.futures.Future() for _ in range(3)]
    for future in futures:
        awaited.add(0.0, future, errors.append)
    futures[0].set_result(wire.ACK)
    futures[2].set_result(wire.ACK)
    assert [answer for _, answer in awaited.take(1.0, 30.0)] == [futures[0]]
    futures[1].set_result(wire.ACK)
    assert [answer for _, answer in awaited.take(1.0, 30.0)] == futures[1:]
    assert not awaited.take(1.0, 30.0)


def test_what_is_never_answered_ends_without_an_answer() -> None:
    awaited, errors = Awaited(), []
    awaited.add(0.0, torch.futures.Future(), errors.append)
    awaited.add(20.0, torch.futures.Future(), errors.append)
    assert not awaited.take(30.0, 30.0)
    assert [answer for _, answer in awaited.take(31.0, 30.0)] == [None]
    assert [answer for _, answer in awaited.take(51.0, 30.0)] == [None]


def test_a_long_line_asks_to_be_looked_at() -> None:
    awaited = Awaited()
    asks = [awaited.add(0.0, torch.futures.Future(), print) for _ in range(4 * BATCH)]
    assert asks.count(True) == 2

"""The order in which a worker does what has arrived."""

import threading
import time

from runtime.inbox import Inbox


def test_what_is_short_goes_before_steps_and_both_keep_their_order() -> None:
    inbox: Inbox[str] = Inbox()
    for item in ("step 1", "prepare", "step 2", "copy", "step 3"):
        inbox.put(item, "step" if item.startswith("step") else "short")
    assert [inbox.take(0.0) for _ in range(2)] == ["prepare", "copy"]
    assert inbox.take(0.0) == "step 1"
    inbox.put("open", "short")
    assert [inbox.take(0.0) for _ in range(4)] == ["open", "step 2", "step 3", None]


def test_a_step_waits_for_one_piece_at_most_and_pieces_get_on() -> None:
    inbox: Inbox[str] = Inbox()
    for number in range(1, 6):
        inbox.put(f"piece {number}", "piece")
    assert inbox.take(0.0) == "piece 1", "nothing else is here"
    inbox.put("step 1", "step")
    inbox.put("step 2", "step")
    inbox.put("open", "short")
    assert [inbox.take(0.0) for _ in range(5)] == ["open", "step 1", "piece 2", "step 2", "piece 3"]
    inbox.put("step 3", "step")
    assert [inbox.take(0.0) for _ in range(4)] == ["step 3", "piece 4", "piece 5", None]


def test_it_waits_no_longer_than_asked_and_for_ever_when_asked() -> None:
    inbox: Inbox[str] = Inbox()
    began = time.monotonic()
    assert inbox.take(0.05) is None
    assert time.monotonic() - began >= 0.05
    sender = threading.Timer(0.05, lambda: inbox.put("late", "step"))
    sender.start()
    assert inbox.take(None) == "late"
    sender.join()


def test_it_does_not_wait_while_a_step_is_here() -> None:
    inbox: Inbox[str] = Inbox()
    inbox.put("step", "step")
    assert inbox.take(None) == "step"

"""The order in which a worker does what has arrived."""

import threading
import time

from runtime.inbox import Inbox


def test_steps_go_last_and_both_kinds_keep_their_order():
    inbox = Inbox()
    for item in ("step 1", "prepare", "step 2", "copy", "step 3"):
        inbox.put(item, is_step=item.startswith("step"))
    assert [inbox.take(0.0) for _ in range(2)] == ["prepare", "copy"]
    assert inbox.take(0.0) == "step 1"
    inbox.put("open", is_step=False)
    assert [inbox.take(0.0) for _ in range(4)] == ["open", "step 2", "step 3", None]


def test_it_waits_no_longer_than_asked_and_for_ever_when_asked():
    inbox = Inbox()
    began = time.monotonic()
    assert inbox.take(0.05) is None
    assert time.monotonic() - began >= 0.05
    sender = threading.Timer(0.05, lambda: inbox.put("late", is_step=True))
    sender.start()
    assert inbox.take(None) == "late"
    sender.join()


def test_it_does_not_wait_while_a_step_is_here():
    inbox = Inbox()
    inbox.put("step", is_step=True)
    assert inbox.take(None) == "step"


def test_a_step_that_was_looked_at_is_the_one_that_is_taken():
    """Whatever comes between the look and the taking."""
    inbox = Inbox()
    assert inbox.is_empty
    assert inbox.next_step is None
    inbox.put("step 1", is_step=True)
    inbox.put("step 2", is_step=True)
    assert not inbox.is_empty
    assert inbox.next_step == "step 1"
    inbox.put("prepare", is_step=False)
    inbox.take_step()
    assert inbox.next_step is None, "something else goes first"
    assert [inbox.take(0.0) for _ in range(3)] == ["prepare", "step 2", None]

"""A worker stands behind others, and beside them again: read back from the kernel."""

import errno
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime import priority
from runtime.priority import BEHIND, GROUP, Priority

needs_groups = pytest.mark.skipif(not GROUP.exists(), reason="this kernel groups no sessions")

SAY = """
from pathlib import Path
from runtime.priority import GROUP, Priority
import time
standing = Priority()
for gives_way in (True, True, False):
    standing.give_way(gives_way=gives_way)
    time.sleep(0.3)
    print(GROUP.read_text().strip() or "no group")
"""


@needs_groups
@pytest.mark.parametrize("leads", [True, False])
def test_a_process_with_its_own_session_gives_way_and_comes_back(leads: bool) -> None:
    root = Path(__file__).parents[2]
    code = f"import os; os.setsid(); import runpy\n{SAY}" if leads else SAY
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=True
    ).stdout.splitlines()
    mine = (
        GROUP.read_text().strip() or "no group"
    )  # what runs without a session since boot, as in a container, has none
    if leads:
        assert [line.split()[-1] for line in said] == [str(BEHIND), str(BEHIND), "0"]
    else:
        assert said == [mine] * 3, "others share the group of this one"


class Busy:
    """The kernel's file, which takes a change only now and then."""

    def __init__(self, refusals: int, code: int = errno.EAGAIN) -> None:
        self.written: list[str] = []
        self._refusals, self._code = refusals, code

    def read_text(self) -> str:
        return "/autogroup-7 nice 0\n"

    def write_text(self, text: str) -> None:
        self._refusals -= 1
        if self._refusals >= 0:
            raise OSError(self._code, "not now")
        self.written.append(text)


def standing(file: Busy, monkeypatch: pytest.MonkeyPatch) -> Priority:
    monkeypatch.setattr(priority.os, "getsid", lambda _: priority.os.getpid())
    return Priority(file)  # type: ignore[arg-type]


def test_a_change_that_comes_too_soon_is_made_later(monkeypatch: pytest.MonkeyPatch) -> None:
    file = Busy(2)
    each = standing(file, monkeypatch)
    each.give_way(gives_way=True)
    deadline = time.monotonic() + 5.0
    while not file.written and time.monotonic() < deadline:
        time.sleep(0.01)
    assert file.written == [str(BEHIND)]
    each.give_way(gives_way=False)
    assert file.written == [str(BEHIND), "0"]


def test_where_it_is_forbidden_it_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    file = Busy(1, errno.EACCES)
    each = standing(file, monkeypatch)
    each.give_way(gives_way=True)
    each.give_way(gives_way=False)
    assert file.written == []


@pytest.mark.parametrize("exists", [True, False])
def test_where_sessions_are_not_grouped_nothing_is_tried(
    exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "autogroup"
    if exists:
        file.touch()
    monkeypatch.setattr(priority.os, "getsid", lambda _: priority.os.getpid())
    with caplog.at_level("INFO"):
        Priority(file).give_way(gives_way=True)
    assert not caplog.records
    assert not exists or file.read_text() == "", "an empty file is a process that is in no group"

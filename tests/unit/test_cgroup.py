"""The memory that control groups leave: on made-up files of both versions, and what a worker makes of it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from runtime import device
from runtime.cgroup import Allowance, allowance
from runtime.device import DeviceInfo

GB = 1 << 30
V1_NO_LIMIT = 9223372036854771712


def process(tmp_path: Path, groups: str, mounts: str) -> Path:
    folder = tmp_path / "proc"
    folder.mkdir()
    (folder / "cgroup").write_text(groups)
    (folder / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + mounts)
    return folder


def v2_group(folder: Path, limit: object, used: int, inactive_file: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - inactive_file}\nactive_file 77\ninactive_file {inactive_file}\n")


def v1_group(folder: Path, limit: int, used: int, inactive_file: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"inactive_file 5\ntotal_inactive_file {inactive_file}\n")


V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


def test_in_a_container_of_version_2(tmp_path: Path) -> None:
    """A namespace of its own: the group seems to be the root. Pages of files that nobody uses are as good as free."""
    here = process(tmp_path, "0::/\n", V2_MOUNT)
    v2_group(tmp_path / "sys/fs/cgroup", 8 * GB, 3 * GB, GB)
    assert allowance(here, tmp_path) == Allowance(8 * GB, 6 * GB)


def test_the_groups_above_count_too(tmp_path: Path) -> None:
    here = process(tmp_path, "0::/a.slice/b.service\n", V2_MOUNT)
    top = tmp_path / "sys/fs/cgroup"
    v2_group(top / "a.slice/b.service", 8 * GB, GB)
    v2_group(top / "a.slice", 16 * GB, 12 * GB)
    assert allowance(here, tmp_path) == Allowance(16 * GB, 4 * GB), "others in the slice have the rest"
    v2_group(top / "a.slice", "max", 12 * GB)
    assert allowance(here, tmp_path) == Allowance(8 * GB, 7 * GB)
    v2_group(top / "a.slice/b.service", "max", GB)
    assert allowance(here, tmp_path) is None


@pytest.mark.parametrize("mounted", ["/", "/docker/4711"])
def test_version_1(tmp_path: Path, mounted: str) -> None:
    """In a container without a namespace of groups its own is mounted where the host has the root."""
    mounts = (
        f"35 31 0:32 {mounted} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "36 31 0:33 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 none rw\n"
    )
    here = process(tmp_path, "9:name=systemd:/\n4:memory:/docker/4711\n1:cpu:/x\n0::/\n", mounts)
    top = tmp_path / "sys/fs/cgroup/memory"
    v1_group(top, V1_NO_LIMIT, 20 * GB)
    v1_group(top / "docker/4711" if mounted == "/" else top, 4 * GB, 3 * GB, 2 * GB)
    assert allowance(here, tmp_path) == Allowance(4 * GB, 3 * GB)


def test_more_in_use_than_the_limit_is_nothing_free(tmp_path: Path) -> None:
    here = process(tmp_path, "0::/\n", V2_MOUNT)
    v2_group(tmp_path / "sys/fs/cgroup", GB, 2 * GB)
    assert allowance(here, tmp_path) == Allowance(GB, 0), "it was lowered"


@pytest.mark.parametrize(
    ("groups", "mounts"),
    [("", ""), ("0::/\n", ""), ("nonsense\n::\n", "x\n"), ("0::/../../b\n", V2_MOUNT), ("4:memory:/\n", V2_MOUNT)],
)
def test_where_nothing_is_to_be_read_nothing_limits(tmp_path: Path, groups: str, mounts: str) -> None:
    assert allowance(process(tmp_path, groups, mounts), tmp_path) is None
    assert allowance(tmp_path / "none", tmp_path) is None


def test_a_worker_has_what_its_group_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    host = SimpleNamespace(total=64 * GB, available=40 * GB)
    monkeypatch.setattr(device.psutil, "virtual_memory", lambda: host)
    info = DeviceInfo(torch.device("cpu"), 1)
    for limit, expected in (
        (None, (64 * GB, 40 * GB)),
        (Allowance(8 * GB, 6 * GB), (8 * GB, 6 * GB)),
        (Allowance(80 * GB, 70 * GB), (64 * GB, 40 * GB)),
        (Allowance(60 * GB, 50 * GB), (60 * GB, 40 * GB)),
    ):
        monkeypatch.setattr(device, "allowance", lambda limit=limit: limit)
        assert info.memory() == expected

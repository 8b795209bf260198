"""The memory and the cores that control groups leave: on made-up files of both versions, and what becomes of it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from runtime import cores, device
from runtime.cgroup import Allowance, allowance, core_allowance
from runtime.cores import count_cores, usable_cores
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


def v2_cores(folder: Path, limit: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.max").write_text(f"{limit}\n")


def test_cores_of_version_2(tmp_path: Path) -> None:
    here = process(tmp_path, "0::/a.slice/b.service\n", V2_MOUNT)
    top = tmp_path / "sys/fs/cgroup"
    assert core_allowance(here, tmp_path) is None
    v2_cores(top / "a.slice/b.service", "max 100000")
    assert core_allowance(here, tmp_path) is None
    v2_cores(top / "a.slice/b.service", "350000 100000")
    assert core_allowance(here, tmp_path) == 3.5
    v2_cores(top / "a.slice", "50000 25000")
    assert core_allowance(here, tmp_path) == 2.0, "the groups above count too"
    v2_cores(top / "a.slice", "nonsense")
    assert core_allowance(here, tmp_path) == 3.5


@pytest.mark.parametrize(("quota", "expected"), [("-1", None), ("150000", 1.5)])
def test_cores_of_version_1(quota: str, expected: float | None, tmp_path: Path) -> None:
    mounts = (
        "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "36 31 0:33 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    )
    here = process(tmp_path, "4:memory:/other\n1:cpu,cpuacct:/x\n", mounts)
    folder = tmp_path / "sys/fs/cgroup/cpu,cpuacct/x"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert core_allowance(here, tmp_path) == expected


def test_threads_of_a_core_are_one(tmp_path: Path) -> None:
    for number in range(8):
        folder = tmp_path / f"cpu{number}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{number % 4},{number % 4 + 4}\n")
    assert count_cores(range(8), tmp_path) == 4
    assert count_cores([0, 4, 1], tmp_path) == 2
    assert count_cores([0, 4, 9, 10], tmp_path) == 3, "of these nothing is known"


@pytest.mark.parametrize(("limit", "expected"), [(None, 3), (2.9, 2), (0.5, 1), (40.0, 3)])
def test_usable_cores(limit: float | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    monkeypatch.setattr(cores, "count_cores", len)
    monkeypatch.setattr(cores, "core_allowance", lambda: limit)
    assert usable_cores() == expected

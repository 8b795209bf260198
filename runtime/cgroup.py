"""What the control groups around this process leave it of a host's memory and cores. Pure, but for reading the kernel's files.

A container's limit (`docker run -m`, `--cpus`, a slice of systemd) is that of a group, and every group above counts too: what is free is the least that any of
them leaves. What the kernel takes back without harm (files read a while ago, `inactive_file`) is free.

Never true: a limit is an error. Where there are no groups, or none has a limit, or a file is not to be read, there is none.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_NO_LIMIT = 1 << 60
"""Version 1 writes a number near the largest there is."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """Bytes, of the group that leaves the least."""

    total: int
    free: int


@dataclass(frozen=True, slots=True)
class _Version:
    limit: str
    used: str
    reclaimable: str
    """In ``memory.stat``, of the group with those below it."""


_V1 = _Version("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Version("memory.max", "memory.current", "inactive_file")


def allowance(process: Path = Path("/proc/self"), root: Path = Path("/")) -> Allowance | None:
    """None where nothing limits `process`. Mounts are looked for under `root`."""
    found = None
    for version, folder in _groups(process, root, "memory"):
        here = _allowance_of(folder, version)
        if here is not None and (found is None or here.free < found.free):
            found = here
    return found


def core_allowance(process: Path = Path("/proc/self"), root: Path = Path("/")) -> float | None:
    """Cores' worth of time; None where nothing limits `process`. Mounts are looked for under `root`."""
    found = [_cores_of(folder, version) for version, folder in _groups(process, root, "cpu")]
    return min((cores for cores in found if cores is not None), default=None)


def _groups(process: Path, root: Path, controller: str) -> Iterator[tuple[_Version, Path]]:
    """The folders of the process's groups of a controller and of all above them, as far as they are mounted."""
    paths = {}
    for line in _read(process / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths[_V2] = path
        elif controller in controllers.split(","):
            paths[_V1] = path
    for version, mounted, mount_point in _mounts(process, controller):
        if version not in paths:
            continue
        group, top = PurePosixPath(paths[version]), root / mount_point.lstrip("/")
        # Where only a part of the tree is mounted, as in a container, that part is the process's own or one above it.
        inside = group.relative_to(mounted) if group.is_relative_to(mounted) else PurePosixPath()
        if ".." in inside.parts:
            inside = PurePosixPath()
        folder = top / inside
        yield version, folder
        while folder != top:
            folder = folder.parent
            yield version, folder


def _mounts(process: Path, controller: str) -> Iterator[tuple[_Version, str, str]]:
    """Version, what of the tree is mounted, and where."""
    for line in _read(process / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, *more) = before.split(), after.split() or [""]
        if len(fields) < 5:
            continue
        if kind == "cgroup2":
            yield _V2, fields[3], fields[4]
        elif kind == "cgroup" and more and controller in more[-1].split(","):
            yield _V1, fields[3], fields[4]


def _allowance_of(folder: Path, version: _Version) -> Allowance | None:
    limit, used = _read(folder / version.limit).strip(), _read(folder / version.used).strip()
    if not (limit.isdigit() and used.isdigit()) or int(limit) >= _NO_LIMIT:
        return None
    stat = dict(line.split()[:2] for line in _read(folder / "memory.stat").splitlines() if len(line.split()) > 1)
    reclaimable = stat.get(version.reclaimable, "0")
    taken = int(used) - min(int(used), int(reclaimable) if reclaimable.isdigit() else 0)
    return Allowance(int(limit), max(0, int(limit) - taken))


def _cores_of(folder: Path, version: _Version) -> float | None:
    if version is _V2:
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
    else:
        quota, period = (_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    if not (quota.isdigit() and period.isdigit() and int(quota) and int(period)):  # "max" or -1 for no limit
        return None
    return int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""

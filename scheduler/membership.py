"""Who is there, and how a layout comes up: workers join, load, are ready, are lost. Pure.

A worker's life is a table (`_NEXT`): what is not in it raises, because it is our bug. A name belongs to one incarnation
of a worker; a restarted worker joins under another name and says whom it replaces.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from kvstore.ids import Epoch, WorkerName
from runtime.layout import Layout
from runtime.messages import MIN_FREE_BYTES, Join
from runtime.model.spec import ModelSpec

WorkerStatus: TypeAlias = Literal["idle", "loading", "ready"]
Place: TypeAlias = tuple[str, str]
"""A host and a device of it, whose memory some workers share."""

_NEXT: dict[tuple[WorkerStatus, str], WorkerStatus] = {
    ("idle", "load"): "loading",
    ("ready", "load"): "loading",
    ("loading", "load"): "loading",
    ("loading", "loaded"): "ready",
    ("ready", "free"): "idle",
    ("loading", "free"): "idle",
    ("idle", "free"): "idle",
    ("idle", "adopt"): "ready",
    ("ready", "adopt"): "ready",
}


@dataclass(slots=True)
class Worker:
    """One live incarnation of a worker. Times are the driver's seconds."""

    info: Join
    status: WorkerStatus
    last_seen_s: float
    epoch: Epoch = 0
    units_loaded: int = 0
    units_total: int = 0
    phase: str = ""
    weight_bytes: int = 0
    num_pages: int = 0
    """Of its page pool, or of the last one it had; 0 before the first."""
    page_bytes: int = 0
    room_bytes: int = 0
    """What its weights and pages share; 0 when the number of pages is fixed."""
    implementation: str = ""
    rss: int = 0
    pages_used: int = 0
    num_sequences: int = 0
    drained: bool = False
    """An operator has taken everything off it; it gets layers again when one says so, or when there is no other worker."""

    @property
    def place(self) -> Place:
        return self.info.host, self.info.device

    @property
    def claimed_bytes(self) -> int:
        """What its weights and pages may come to, by what it was given; 0 before it was given anything."""
        return self.room_bytes or self.num_pages * self.page_bytes + self.weight_bytes * bool(self.num_pages)

    def advance(self, action: str) -> None:
        following = _NEXT.get((self.status, action))
        assert following is not None, f"worker {self.info.name} is {self.status} and cannot {action}"
        self.status = following
        if following == "idle":
            self.units_loaded = self.units_total = 0


@dataclass(slots=True)
class Membership:
    """The workers by name. Dead ones are removed, not kept."""

    workers: dict[WorkerName, Worker] = field(default_factory=dict)
    num_lost: int = 0
    first_selves: dict[WorkerName, WorkerName] = field(default_factory=dict)
    """By the name of a restarted worker, dead or not, the name it was first started under."""
    free_bytes: dict[Place, int] = field(default_factory=dict)
    """The most that was free when a worker joined there, as long as any is left: the first found none of the others' weights and pages."""

    def join(self, info: Join, now_s: float) -> None:
        assert info.name not in self.workers, f"worker {info.name} joined twice"
        self.workers[info.name] = worker = Worker(info, "idle", now_s)
        if info.replaces:
            self.first_selves[info.name] = self.first_self(info.replaces)
        self.free_bytes[worker.place] = max(self.free_bytes.get(worker.place, 0), info.memory_available)

    def first_self(self, name: WorkerName) -> WorkerName:
        return self.first_selves.get(name, name)

    def lose(self, name: WorkerName) -> Worker | None:
        worker = self.workers.pop(name, None)
        if worker is not None:
            self.num_lost += 1
            if not self._at(worker.place):
                del self.free_bytes[worker.place]
        return worker

    def seen(self, name: WorkerName, now_s: float) -> Worker | None:
        worker = self.workers.get(name)
        if worker is not None:
            worker.last_seen_s = now_s
        return worker

    def seen_later(self, by_s: float, now_s: float) -> None:
        """For so long nobody could be heard. Who has been heard since then was seen now at the latest."""
        for worker in self.workers.values():
            worker.last_seen_s = min(worker.last_seen_s + by_s, now_s)

    def silent(self, now_s: float, timeout_s: float) -> list[WorkerName]:
        return [name for name, worker in self.workers.items() if now_s - worker.last_seen_s > timeout_s]

    def in_order(self) -> list[WorkerName]:
        """The order in which workers become stages: by name, numbers by value (w2 before w10)."""
        return sorted(self.workers, key=_natural)

    def listed(self) -> str:
        """Their names, for people."""
        return ", ".join(self.in_order()) or "none"

    def drain(self, name: WorkerName) -> None:
        if name in self.workers:
            self.workers[name].drained = True

    def resume(self, names: Iterable[WorkerName]) -> None:
        for name in names:
            self.workers[name].drained = False

    def drained(self) -> set[WorkerName]:
        return {name for name, worker in self.workers.items() if worker.drained}

    def all_ready(self, names: tuple[WorkerName, ...], epoch: Epoch) -> bool:
        return all(
            (worker := self.workers.get(name)) is not None and worker.status == "ready" and worker.epoch == epoch
            for name in names
        )

    def forget_rooms(self) -> None:
        """All pools are made anew: what each was given is void."""
        for worker in self.workers.values():
            worker.num_pages = worker.page_bytes = worker.room_bytes = 0

    def memory_for_pages(self, name: WorkerName, weights: Mapping[WorkerName, int], fraction: float) -> int:
        """Bytes that `name` may have for KV pages when pools are made for the workers in `weights`, which will hold so many bytes of
        those: `fraction` of what is free, where it is, beside what was given before (to workers that serve or not) and these weights,
        in equal parts. What was given stays given, so that nothing is promised twice and a worker that comes back finds what it had."""
        place = self.workers[name].place
        there = self._at(place)
        free = self.free_bytes[place] - MIN_FREE_BYTES
        given = sum(w.claimed_bytes for n, w in there.items() if n != name)
        new = [n for n, w in there.items() if n == name or (n in weights and not w.claimed_bytes)]
        left = free - given - sum(weights.get(n, 0) for n in new)
        return max(0, int(fraction * left)) // len(new)

    def shortage(self, kv_bytes: int, weights: Mapping[WorkerName, int], others: Collection[WorkerName] = ()) -> str:
        """What is wrong when the workers in `weights`, which will hold so many bytes of those, each have pools of `kv_bytes`, and so have
        `others` for a while; empty when all of it is there. Looked at where a worker in `weights` is that is not one of `others`.

        Tiny pools need no more left free than they take themselves, so that small machines can be told to be content with those.
        """
        places = {self.workers[name].place for name in weights if name not in others}
        for host, device in sorted(places):
            there = self._at((host, device))
            names = [name for name in self.in_order() if name in there and (name in weights or name in others)]
            weight_bytes = sum(weights.get(name, 0) for name in names)
            free = self.free_bytes[host, device] - min(MIN_FREE_BYTES, len(names) * kv_bytes)
            if len(names) * kv_bytes + weight_bytes > free:
                most = max(0, free - weight_bytes) // len(names)
                return (
                    f"--kv-memory {_mib(kv_bytes)} does not fit on {host} ({device}), where {_mib(free)} can be had: {', '.join(names)} would "
                    f"have so much each, beside {_mib(weight_bytes)} of weights; {_mib(most)} each would fit. Start again with a smaller --kv-memory "
                    f"or without it, or use fewer workers there"
                )
        return ""

    def _at(self, place: Place) -> dict[WorkerName, Worker]:
        return {name: worker for name, worker in self.workers.items() if worker.place == place}

    def same_host(self) -> dict[WorkerName, int]:
        """How many workers share the memory of each (itself included): the same host and kind of device."""
        places = {name: worker.place for name, worker in self.workers.items()}
        counts = Counter(places.values())
        return {name: counts[place] for name, place in places.items()}


def weights_of(layout: Layout, spec: ModelSpec) -> dict[WorkerName, int]:
    """Bytes that each worker of `layout` holds of the model."""
    embedding, lm_head = layout.embedding_worker, layout.lm_head_worker
    return {
        name: spec.weight_bytes(layout.layers_of(name), embedding=name == embedding, lm_head=name == lm_head)
        for name in layout.workers
    }


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    parts: list[tuple[int, int | str]] = []
    digits = ""
    for char in name + "\0":
        if char.isdigit():
            digits += char
            continue
        if digits:
            parts.append((0, int(digits)))
            digits = ""
        parts.append((1, char))
    return tuple(parts)

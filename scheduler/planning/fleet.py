"""The workers as the planner sees them: what each is, how fast it has proved to be, and how far predictions were off. Pure.

A worker begins as its kind in the table (`planning.devices`), is corrected by the profile that it sends when it has loaded its
first units, and refined by the steps that it reports. One that never loaded anything (a spare) is taken to be as fast
as the mean of those of its make; so are restarts of a worker.

Never true: a worker's speed depends on the layout that it serves in.
"""

from collections.abc import Sequence
from typing import TypeAlias

import msgspec
import numpy as np

from kvstore.ids import LayerRange, WorkerName
from runtime.messages import Join, ProfilePoint
from scheduler.planning.calibration import Measurement, PredictionError, Profile, Refiner, correct
from scheduler.planning.cost import TERMS, Facts, Speed, Work
from scheduler.planning.emulation import speed_of_make

_Make: TypeAlias = tuple[str, str, int, tuple[float, float] | None, tuple[float, float] | None]
"""Device, its name, threads, and the pace or roofline of one that is emulated."""


_LEAST, _UNSEEN, _MOST = 0.02, 0.05, 0.15
_SEEN_FROM = 50


class StageError(msgspec.Struct, frozen=True):
    """How well a worker's steps were predicted before they were learned from: relative errors, over about 200 steps."""

    worker: WorkerName
    num_steps: int
    mape: float
    bias: float


class Fleet:
    """Every worker that is there. `joined` and `lost` keep it so."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._make: dict[WorkerName, _Make] = {}
        self._refiners: dict[WorkerName, Refiner] = {}
        self._of_make: dict[_Make, Speed] = {}
        """The last known speed of each make: a restarted worker begins with it."""

    def joined(self, info: Join) -> None:
        self._make[info.name] = info.device, info.device_name, info.num_threads, info.pace, info.roofline

    def lost(self, worker: WorkerName) -> None:
        if worker in self._refiners:
            self._of_make[self._make[worker]] = self._refiners.pop(worker).speed
        self._make.pop(worker, None)

    def profiled(self, worker: WorkerName, points: Sequence[ProfilePoint]) -> None:
        """What the worker measured on itself; refinement begins there."""
        measurements = tuple(_measurement(point) for point in points)
        profile = Profile(self._make[worker][1], self._facts.spec.name, measurements)
        self._refiners[worker] = Refiner(self._facts, correct(self._facts, self.speed(worker), profile))

    def ran(
        self, worker: WorkerName, work: Work, layers: LayerRange, *, is_last: bool, compute_s: float, sample_s: float
    ) -> None:
        """A step's timing at one hop."""
        if worker not in self._make:
            return
        refiner = self._refiners.get(worker)
        if refiner is None:
            refiner = self._refiners[worker] = Refiner(self._facts, self.speed(worker))
        refiner.observe(work, layers, is_last=is_last, compute_s=compute_s, sample_s=sample_s)

    def speed(self, worker: WorkerName) -> Speed:
        """As it was measured, else as its like, else by the table."""
        refiner = self._refiners.get(worker)
        if refiner is not None:
            return refiner.speed
        make = self._make[worker]
        alike = [
            self._refiners[other].speed for other, its in self._make.items() if its == make and other in self._refiners
        ]
        if alike:
            scale = np.exp(np.log([speed.scale for speed in alike]).mean(axis=0))
            return Speed(alike[0].kind, tuple(float(value) for value in scale))
        return self._of_make.get(make) or speed_of_make(self._facts.spec, *make)

    def errors(self) -> list[StageError]:
        found = []
        for worker, refiner in sorted(self._refiners.items()):
            error: PredictionError = refiner.error
            found.append(StageError(worker, error.count, error.mape, error.bias))
        return found

    def error(self) -> float:
        """By how much, relatively, a comparison of two layouts may be off: the largest lasting error of any worker.

        That is the bias of the predictions of its steps, since what is random in them averages out. A worker of which little
        has been seen is taken to be off by `_UNSEEN`, all others by `_LEAST` at least; `_MOST` bounds it, or a model that
        is far off would never again propose anything.
        """
        found = _LEAST
        for worker in self._make:
            refiner = self._refiners.get(worker)
            error = refiner.error if refiner is not None else None
            seen = error is not None and error.count >= _SEEN_FROM
            found = max(found, abs(error.bias) if seen and error is not None else _UNSEEN)
        return min(found, _MOST)

    def coefficients(self, worker: WorkerName) -> dict[str, float]:
        return {term: round(value, 4) for term, value in zip(TERMS, self.speed(worker).scale, strict=True)}


def _measurement(point: ProfilePoint) -> Measurement:
    work = Work(
        float(point.decode_rows),
        float(point.decode_context),
        float(point.prefill_tokens),
        (point.prefill_tokens + 1) / 2,
        float(point.samples),
    )
    return Measurement(work, point.layers, point.seconds, with_head=point.samples > 0)

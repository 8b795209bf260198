"""From the table's device to the one at hand: coefficients fitted to a profile, then refined by every step. Pure.

A stage's time is a sum of terms (`cost.TERMS`), each with a coefficient. In logarithms the derivative of the predicted
time by a coefficient is that term's share of it (the time is homogeneous of degree one in the terms, rounded corner
included), so shares are all that fitting needs, errors count relative to their size, and coefficients stay positive.

`correct` fits a `Profile`, a handful of measured times: Gauss-Newton, with outliers weighted down (Huber) and each
coefficient drawn towards 1 where the profile says nothing about it. `Refiner` goes on from there with every step that
a worker reports: recursive least squares on the linearised model, that is an extended Kalman filter, which forgets
slowly, clips what one step may change, and keeps every coefficient within bounds. It states its error, always of
predictions made before the measurement was learned from.

Never true: a measurement changes a coefficient that it does not depend on, or moves one beyond `_BOUND`.
"""

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from kvstore.ids import LayerRange
from scheduler.planning.cost import TERMS, Facts, Speed, Work, stage_terms

_BOUND = math.log(32.0)
_NUM_COMPUTE = TERMS.index("head")
"""The terms before this one make up a hop's `compute_us`, the others its `sample_us`."""


class Measurement(msgspec.Struct, frozen=True):
    """Part of a stage ran `work` in `seconds`: so many layers from `layers`, the start of a step, and/or the LM head."""

    work: Work
    layers: LayerRange
    seconds: float
    with_step: bool = False
    with_head: bool = False


class Profile(msgspec.Struct, frozen=True):
    """What was measured on a device when it joined, for one model."""

    device_name: str
    model: str
    measurements: tuple[Measurement, ...]


class PredictionError(msgspec.Struct, frozen=True):
    """Predicted against measured: mean absolute and mean signed relative error (positive: predicted too slow)."""

    count: int
    mape: float
    bias: float


def predict(facts: Facts, speed: Speed, measurement: Measurement) -> float:
    """Seconds."""
    return float(_terms(facts, speed, measurement).sum())


def prediction_error(facts: Facts, speed: Speed, measurements: Sequence[Measurement]) -> PredictionError:
    """How well `speed` predicts these."""
    if not measurements:
        return PredictionError(0, 0.0, 0.0)
    off = np.array([predict(facts, speed, m) / m.seconds - 1.0 for m in measurements])
    return PredictionError(len(off), float(np.abs(off).mean()), float(off.mean()))


def correct(facts: Facts, speed: Speed, profile: Profile, *, prior_std: float = 1.5, noise_std: float = 0.05) -> Speed:
    """`speed` with coefficients fitted to `profile`; the coefficients that it had are where the fit begins and leans to.

    `prior_std` is how far, as a logarithm, a coefficient may be expected to lie from there, `noise_std` the relative error of
    a measurement. Measurements of no time at all are left out.
    """
    measured = [m for m in profile.measurements if m.seconds > 0]
    if not measured:
        return speed
    start = np.log(np.array(speed.scale))
    x = start.copy()
    observed = np.log([m.seconds for m in measured])
    for _ in range(30):
        terms = np.stack([_terms(facts, _scaled(speed, x), m) for m in measured])
        total = terms.sum(axis=1)
        shares = terms / total[:, None]
        residual = (observed - np.log(total)) / noise_std
        weight = 1.0 / np.maximum(1.0, np.abs(residual) / 2.0)
        jacobian = shares / noise_std
        information = (jacobian * weight[:, None]).T @ jacobian + np.eye(len(x)) / prior_std**2
        gradient = (jacobian * weight[:, None]).T @ residual - (x - start) / prior_std**2
        change = np.clip(np.linalg.solve(information, gradient), -1.0, 1.0)
        x = np.clip(x + change, -_BOUND, _BOUND)
        if np.abs(change).max() < 1e-6:
            break
    return _scaled(speed, x)


class Refiner:
    """One worker's coefficients, refined by the steps that it reports."""

    def __init__(
        self,
        facts: Facts,
        speed: Speed,
        *,
        prior_std: float = 0.5,
        noise_std: float = 0.2,
        memory_steps: float = 500.0,
        limit: float = 8.0,
    ) -> None:
        self._facts, self._start = facts, speed
        self._x = np.log(np.array(speed.scale))
        self._low, self._high = self._x - math.log(limit), self._x + math.log(limit)
        self._prior = prior_std**2
        self._covariance = np.eye(len(TERMS)) * self._prior
        self._noise, self._keep = noise_std**2, 1.0 - 1.0 / memory_steps
        self._count = 0
        self._absolute = self._signed = 0.0
        self._errors_keep = 1.0 - 1.0 / 200.0

    @property
    def speed(self) -> Speed:
        return _scaled(self._start, self._x)

    @property
    def error(self) -> PredictionError:
        """Over about the last 200 steps."""
        known = 1.0 - self._errors_keep**self._count if self._count else 1.0
        return PredictionError(self._count, self._absolute / known, self._signed / known)

    def observe(
        self, work: Work, layers: LayerRange, *, is_last: bool, compute_s: float, sample_s: float = 0.0
    ) -> None:
        """Learn from a hop's `HopTiming` (in seconds). `layers` are the hop's; `is_last`, whether it sampled."""
        if compute_s <= 0 or work.num_tokens <= 0:
            return
        sampled = is_last and sample_s > 0 and work.samples > 0
        terms = stage_terms(self._facts, self.speed, work, layers, with_step=True, with_head=sampled)
        measured = compute_s + (sample_s if sampled else 0.0)
        off = float(terms.sum()) / measured - 1.0
        self._count += 1
        self._absolute += (1 - self._errors_keep) * (abs(off) - self._absolute)
        self._signed += (1 - self._errors_keep) * (off - self._signed)
        compute, sample = terms.copy(), terms.copy()
        compute[_NUM_COMPUTE:], sample[:_NUM_COMPUTE] = 0.0, 0.0
        self._learn(compute, compute_s)
        if sampled:
            self._learn(sample, sample_s)

    def _learn(self, terms: np.ndarray, seconds: float) -> None:
        total = float(terms.sum())
        shares = terms / total
        spread = self._covariance @ shares
        variance = float(shares @ spread) + self._noise
        limit = 3.0 * math.sqrt(variance)
        surprise = min(max(math.log(seconds / total), -limit), limit)
        self._x = np.minimum(np.maximum(self._x + spread * (surprise / variance), self._low), self._high)
        covariance = (self._covariance - spread[:, None] * spread / variance) / self._keep
        excess = covariance.diagonal() / self._prior
        if excess.max() > 1.0:
            excess = np.sqrt(np.maximum(excess, 1.0))
            covariance /= excess[:, None] * excess
        self._covariance = covariance


def _terms(facts: Facts, speed: Speed, m: Measurement) -> np.ndarray:
    return stage_terms(facts, speed, m.work, m.layers, with_step=m.with_step, with_head=m.with_head)


def _scaled(speed: Speed, x: np.ndarray) -> Speed:
    return Speed(speed.kind, tuple(np.exp(x).tolist()))

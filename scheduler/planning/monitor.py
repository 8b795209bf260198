"""What is asked of the server, seen as it happens: rates, lengths, queue, and when they have changed. Pure.

Everything is summed in buckets of a second. The *window* is the run of the last buckets over which the load looked the same,
at most `window_s`: as in ADWIN (Bifet and Gavaldà, "Learning from time-changing data with adaptive windowing", SIAM Data
Mining 2007) it is cut at every point where what came after differs from what came before by more than chance explains, and
by enough to matter. So it forgets a load that is over at once, and noise never: a steady load is averaged over minutes.

Five things are compared on both sides of a cut (Welch's test, many cuts, hence the high threshold): the logarithms of
prompt and output lengths and of expected outputs, in an open loop the arrivals per second, in a closed loop the number of clients. A loop is taken
for closed when the number of requests in the system hardly varies while all of them are served and come again, twice: then the rate is
the server's doing, not the clients'. For a moment the number of an open loop hardly varies either, so what was found last holds until so many have come.

An output's length is known when it ends, so right after a shift only short ones are. Those still running stand in with
what they have put out, or with the mean of those that ended when that is more; requests that came before the shift do not
count. While hardly any have ended they stand in with twice what they have put out: with nothing else known, one may expect
a thing to go on for as long again as it has (Gott, Nature 363, 1993).

Unless outputs keep to their *limits*: where those that ended lately all took about the same share of the limit that their
clients had set (all of it, say), the limit tells the length when a request arrives. Then running requests stand in with that
share of theirs, and what is expected of those that arrive is compared as prompts are. A few that end early are enough to make limits say nothing again.

Never true: a layout or a device has a part in this. Time is an argument; it only grows.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from scheduler.planning.traffic import Traffic

_FEW_ENDED = 4
_FEW_SHARES, _MANY_SHARES = 8, 64
"""How many of the outputs that ended last are looked at to see whether they keep to their limits."""
_STEADY_SHARE = 0.25
"""The standard deviation of the logarithm of an output's share of its limit up to which the limit tells its length."""


class Running(NamedTuple):
    """A request in service: when it arrived, the tokens that it has put out, and how many it may (0: not known)."""

    arrived_s: float
    tokens: int
    max_tokens: int = 0


class MonitorSettings(msgspec.Struct, frozen=True):
    """`z` is how many standard errors a difference must be, `effect` how large (0.25: by a quarter); counts are requests.
    A pause longer than `idle_s` ends a load.
    """

    bucket_s: float = 1.0
    window_s: float = 180.0
    z: float = 4.5
    effect: float = 0.25
    min_recent: int = 6
    min_before: int = 8
    forget_shifts_s: float = 1800.0
    idle_s: float = 15.0


class Shift(msgspec.Struct, frozen=True):
    """The load changed: `what` went from `before` to `after` (per second, tokens, or clients), noticed at `now_s`."""

    now_s: float
    began_s: float
    what: str
    before: float
    after: float

    def continues(self, before: "Shift") -> bool:
        """Whether it may be the same event: of something else, or the same further on."""
        return self.what != before.what or (self.after > self.before) == (before.after > before.before)

    def text(self) -> str:
        return f"the load has changed: {self.what} from {self.before:.3g} to {self.after:.3g}"


class Load(msgspec.Struct, frozen=True):
    """The load over the window, for the planner (`traffic`) and to be compared with what the planner predicts.

    `in_service` and `waiting` are mean numbers of requests. `service_s_per_token` is the time that a request in service
    spends per token it puts out, prefill included (by Little's law: running over tokens per second). `remaining_s` is how
    long this load may be expected to go on; inf when it never changed.
    """

    traffic: Traffic
    age_s: float
    num_requests: int
    is_closed: bool
    in_service: float
    waiting: float
    requests_per_s: float
    tokens_per_s: float
    ttft_s: float
    tpot_s: float
    prefix_hit_ratio: float
    remaining_s: float
    is_idle: bool = False
    """Nothing has been asked for `age_s`; `traffic` has the lengths of the load before, at a rate of next to nothing."""

    @property
    def service_s_per_token(self) -> float:
        return self.in_service / self.tokens_per_s if self.tokens_per_s > 0 else 0.0


class Measured(msgspec.Struct, frozen=True):
    """What was served in `seconds`: `service_s` is the time that requests in service spent, added up."""

    seconds: float
    service_s: float
    tokens: float

    @property
    def service_s_per_token(self) -> float:
        return self.service_s / self.tokens if self.tokens > 0 else 0.0


class _Bucket(msgspec.Struct):
    """Sums over a stretch of time; ``_x2`` are sums of squares, ``log_`` of natural logarithms."""

    start_s: float = 0.0
    seconds: float = 0.0
    arrivals: float = 0.0
    prompt: float = 0.0
    log_prompt: float = 0.0
    log_prompt_x2: float = 0.0
    expected: float = 0.0
    log_expected: float = 0.0
    log_expected_x2: float = 0.0
    gap: float = 0.0
    gap_x2: float = 0.0
    ended: float = 0.0
    ended_prompt: float = 0.0
    cached: float = 0.0
    output: float = 0.0
    output_x2: float = 0.0
    log_output: float = 0.0
    log_output_x2: float = 0.0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    decode_tokens: float = 0.0
    running_s: float = 0.0
    waiting_s: float = 0.0
    system_x2_s: float = 0.0
    tokens: float = 0.0
    refused: float = 0.0


_NAMES = _Bucket.__struct_fields__
_AT = {name: index for index, name in enumerate(_NAMES)}
_TURNS = 2.0
"""Requests must have come this many times as often as there are in the system, for it to be told whether their number varies."""
_LATEST = 3
_CLOSED_BELOW = 0.2
"""Variance over mean of the number in the system: 0 in a closed loop, about 1 when arrivals are independent."""
_MAX_OUTPUTS = 512
_ECHO_S = 20.0
"""Lengths of outputs are known later than those of prompts: a shift so soon after another may be the same event."""
_ALIKE = 0.05
"""Standard deviation of a logarithm that is assumed at least, or lengths that are all equal would prove anything."""


class Monitor:
    """Tell it of every request that arrives and ends, and `sample` it a few times a second."""

    def __init__(self, settings: MonitorSettings | None = None) -> None:
        self.settings = settings or MonitorSettings()
        self.shifts: deque[Shift] = deque(maxlen=16)
        self._buckets: deque[_Bucket] = deque()
        """The window; `_all` is what it would be without cuts."""
        self._all: deque[_Bucket] = deque()
        self._now = _Bucket()
        self._last_arrival_s: float | None = None
        self._sampled_s: float | None = None
        self._num_tokens = 0
        self._since_s: float | None = None
        self._idle_s = math.inf
        self._running: Sequence[Running] = ()
        self._outputs: deque[tuple[float, float, int]] = deque(maxlen=_MAX_OUTPUTS)
        """When a request ended, when it had arrived, and its output tokens."""
        self._log_shares: deque[float] = deque(maxlen=_MANY_SHARES)
        self._is_closed = False
        self._share = 0.0
        """The share of its limit that an output takes, where all of them took about the same; 0 where limits say nothing."""
        self._output = 128.0
        self._prompt = 128.0

    # -- what happens -----------------------------------------------------------------------------------------

    def arrived(self, now_s: float, prompt_tokens: int, max_tokens: int = 0) -> None:
        """`max_tokens` is the limit of its output; 0 when it is not known."""
        bucket, log_prompt = self._now, math.log(max(prompt_tokens, 1))
        bucket.arrivals += 1
        bucket.prompt += prompt_tokens
        bucket.log_prompt += log_prompt
        bucket.log_prompt_x2 += log_prompt**2
        if max_tokens and self._share:
            log_expected = math.log(max(self._share * max_tokens, 1.0))
            bucket.expected += 1
            bucket.log_expected += log_expected
            bucket.log_expected_x2 += log_expected**2
        if self._last_arrival_s is not None and self._idle_s <= self.settings.idle_s:  # a pause is no gap of any load
            gap = now_s - self._last_arrival_s
            bucket.gap += gap
            bucket.gap_x2 += gap**2
        self._last_arrival_s = now_s

    def refused(self) -> None:
        """A request found the queue full. Those in the system hardly vary in number then, and yet the loop is no closed one."""
        self._now.refused += 1

    def ended(
        self,
        now_s: float,
        arrived_s: float,
        prompt_tokens: int,
        output_tokens: int,
        cached_tokens: int,
        *,
        ttft_s: float,
        decode_s: float,
        max_tokens: int = 0,
    ) -> None:
        """A request was served to its end. `decode_s` is from its first to its last token."""
        bucket, log_output = self._now, math.log(max(output_tokens, 1))
        self._outputs.append((now_s, arrived_s, output_tokens))
        if max_tokens:
            self._log_shares.append(log_output - math.log(max_tokens))
        bucket.ended += 1
        bucket.ended_prompt += prompt_tokens
        bucket.cached += cached_tokens
        bucket.output += output_tokens
        bucket.output_x2 += output_tokens**2
        bucket.log_output += log_output
        bucket.log_output_x2 += log_output**2
        bucket.ttft_s += ttft_s
        bucket.decode_s += decode_s
        bucket.decode_tokens += max(0, output_tokens - 1)

    def sample(self, now_s: float, running: Sequence[Running], waiting: int, generated_tokens: int) -> Shift | None:
        """What there is now: the requests in service, the queue, and the tokens put out by all requests since the start.

        Returns the change of load that this has brought to light, if any.
        """
        if self._sampled_s is None:
            self._sampled_s = self._since_s = self._now.start_s = now_s
            self._num_tokens = generated_tokens
        elapsed_s = max(0.0, now_s - self._sampled_s)
        bucket, system = self._now, len(running) + waiting
        bucket.seconds += elapsed_s
        bucket.running_s += elapsed_s * len(running)
        bucket.waiting_s += elapsed_s * waiting
        bucket.system_x2_s += elapsed_s * system**2
        bucket.tokens += generated_tokens - self._num_tokens
        self._sampled_s, self._num_tokens, self._running = now_s, generated_tokens, running
        if bucket.seconds < self.settings.bucket_s:
            return None
        self._now, self._share = _Bucket(start_s=now_s), self._share_of_limit()
        if self._is_idle(bucket):
            return None
        for buckets in (self._buckets, self._all):
            buckets.append(bucket)
            while len(buckets) > 1 and buckets[0].start_s < now_s - self.settings.window_s:
                buckets.popleft()  # a single one may be as long, when nobody sampled
        rows = _rows(self._buckets)
        shift = self._shift(now_s, rows)
        if shift is not None:
            self.shifts.append(shift)
            while self._buckets and self._buckets[0].start_s < shift.began_s:
                self._buckets.popleft()
            self._since_s = shift.began_s
        self._look_at_loop(rows[len(rows) - len(self._buckets) :])
        return shift

    def _is_idle(self, bucket: _Bucket) -> bool:
        """Whether nothing is going on, and has not for a while: such a time is no part of any load."""
        if bucket.arrivals or bucket.ended or bucket.tokens or bucket.running_s + bucket.waiting_s > 0:
            if self._idle_s > self.settings.idle_s:
                self._buckets.clear()
                self._all.clear()
                self._since_s, self._is_closed = bucket.start_s, False
            self._idle_s = 0.0
        else:
            self._idle_s += bucket.seconds
        return self._idle_s > self.settings.idle_s

    # -- what it comes to ---------------------------------------------------------------------------------------

    def load(self, *, mixed: bool = False) -> Load | None:
        """The load over the window, or what is left of it in a pause; None when nothing was asked in it, and nothing runs.

        `mixed`: over the last `window_s` whatever happened in it, the mean of loads that take turns.
        """
        buckets = self._all if mixed else self._buckets
        if not buckets:
            return None
        rows = _rows(buckets)
        total = _total(rows)
        system = (total.running_s + total.waiting_s) / total.seconds
        is_idle = self.settings.idle_s < self._idle_s < math.inf
        if not total.arrivals and system <= 0 and not is_idle:
            return None
        prompt = total.prompt / total.arrivals if total.arrivals else self._prompt
        since_s = -math.inf if mixed else (self._since_s or 0.0) + self.settings.bucket_s * bool(self.shifts)
        output = self._mean_output(since_s, buckets[0].start_s)
        if not mixed:
            self._prompt, self._output = prompt, output
        if is_idle:
            return self._pause(prompt, output)
        is_closed = self._is_closed
        rate = total.arrivals / total.seconds
        peak = float(np.percentile((rows[:, _AT["running_s"]] + rows[:, _AT["waiting_s"]]) / _seconds(rows), 95))
        traffic = Traffic(
            requests_per_s=0.0 if is_closed else rate,
            prompt_tokens=max(1.0, prompt),
            output_tokens=max(1.0, output),
            cached_tokens=min(total.cached / total.ended, prompt) if total.ended else 0.0,
            concurrency=max(1.0, system) if is_closed else max(4.0, 2 * peak),
            arrival_cv=_cv(total.gap, total.gap_x2, total.arrivals),
            service_cv=_cv(total.output, total.output_x2, total.ended),
        )
        return Load(
            traffic=traffic,
            age_s=total.seconds,
            num_requests=int(total.arrivals),
            is_closed=is_closed,
            in_service=total.running_s / total.seconds,
            waiting=total.waiting_s / total.seconds,
            requests_per_s=total.ended / total.seconds,
            tokens_per_s=total.tokens / total.seconds,
            ttft_s=total.ttft_s / total.ended if total.ended else 0.0,
            tpot_s=total.decode_s / total.decode_tokens if total.decode_tokens else 0.0,
            prefix_hit_ratio=total.cached / total.ended_prompt if total.ended_prompt else 0.0,
            remaining_s=math.inf if mixed else self._remaining_s(),
        )

    def _pause(self, prompt: float, output: float) -> Load:
        """For who must know how many workers it takes to do nothing."""
        traffic = Traffic(1.0 / self._idle_s, max(1.0, prompt), max(1.0, output), concurrency=4.0)
        return Load(
            traffic, self._idle_s, 0, is_closed=False, in_service=0.0, waiting=0.0, requests_per_s=0.0, tokens_per_s=0.0,
            ttft_s=0.0, tpot_s=0.0, prefix_hit_ratio=0.0, remaining_s=math.inf, is_idle=True,
        )  # fmt: skip

    def measured(self, since_s: float) -> Measured:
        """What was served since then (whole buckets), as far back as the window goes."""
        buckets = [bucket for bucket in self._buckets if bucket.start_s >= since_s]
        return Measured(
            sum(bucket.seconds for bucket in buckets),
            sum(bucket.running_s for bucket in buckets),
            sum(bucket.tokens for bucket in buckets),
        )

    def _mean_output(self, since_s: float, first_s: float) -> float:
        """Of requests that arrived since then and ended from `first_s` on, or still run. (After a shift, from the second bucket on: in the first one
        requests of the load before may have come, and those that are long count for many.)"""
        ended = [o for ended_s, arrived_s, o in self._outputs if ended_s >= first_s and arrived_s >= since_s]
        mean = sum(ended) / len(ended) if ended else min(self._output, 16.0)
        again = 2 if len(ended) < _FEW_ENDED else 1
        running = [
            max(tokens, self._share * limit) if self._share and limit else max(again * tokens, mean)
            for arrived_s, tokens, limit in self._running
            if arrived_s >= since_s
        ]
        count = len(ended) + len(running)
        return (sum(ended) + sum(running)) / count if count else self._output

    def _share_of_limit(self) -> float:
        if len(self._log_shares) < _FEW_SHARES:
            return 0.0
        shares = np.array(self._log_shares)
        return math.exp(shares.mean()) if shares.std() <= _STEADY_SHARE else 0.0

    def _remaining_s(self) -> float:
        """As long as the loads before it lasted, or as long again as this one has, if that is longer."""
        assert self._sampled_s is not None
        assert self._since_s is not None
        age_s = self._sampled_s - self._since_s
        known: list[float] = []
        before: Shift | None = None
        for shift in self.shifts:
            same = before is not None and shift.began_s < before.now_s + _ECHO_S and shift.continues(before)
            if not same and self._sampled_s - shift.began_s < self.settings.forget_shifts_s:
                known.append(shift.began_s)
            before = shift
        if len(known) < 2:
            return math.inf
        mean_s = (known[-1] - known[0]) / (len(known) - 1)
        return max(mean_s - age_s, age_s)

    # -- changes of load ----------------------------------------------------------------------------------------

    def _shift(self, now_s: float, rows: np.ndarray) -> Shift | None:
        """The strongest of the differences that are beyond doubt in the window's `rows`; the latest cut among equals."""
        n = len(rows)
        sums = np.concatenate([np.zeros((1, rows.shape[1])), np.cumsum(rows, axis=0)])
        best: tuple[float, int, str, float, float] | None = None
        for recent in sorted({2, 3, 5, 8, 12, 18, 27, 40, 60, 90}):
            if recent > n - 2:
                break
            cut = n - recent
            before, after = _Bucket(*sums[cut].tolist()), _Bucket(*(sums[n] - sums[cut]).tolist())
            after.start_s = float(rows[cut, _AT["start_s"]])
            until = _Bucket(*sums[cut - 1].tolist())
            for what, z, a, b in self._differences(before, until, after, rows[:cut], rows[cut:]):
                if z > self.settings.z and (best is None or z > best[0]):
                    best = z, cut, what, a, b
        if best is None:
            return None
        _, cut, what, a, b = best
        return Shift(now_s, float(rows[cut, _AT["start_s"]]), what, a, b)

    def _differences(
        self, before: _Bucket, until: _Bucket, after: _Bucket, rows_before: np.ndarray, rows_after: np.ndarray
    ) -> list[tuple[str, float, float, float]]:
        """What differs by enough to matter: its name, by how many standard errors, before and after. `until` is `before` without its last
        bucket: the number of clients may change within it."""
        assert self._since_s is not None
        settings, found = self.settings, []
        needed = math.log1p(settings.effect)
        for what, n0, n1, x0, x1, s0, s1 in (
            ("prompt tokens", before.arrivals, after.arrivals, before.log_prompt, after.log_prompt,
             before.log_prompt_x2, after.log_prompt_x2),
            ("output tokens", before.ended, after.ended, before.log_output, after.log_output,
             before.log_output_x2, after.log_output_x2),
            ("expected output tokens", before.expected, after.expected, before.log_expected, after.log_expected,
             before.log_expected_x2, after.log_expected_x2),
        ):  # fmt: skip
            if n0 < settings.min_before or n1 < settings.min_recent:
                continue
            if what == "output tokens" and after.start_s - self._since_s < 3 * before.running_s / n0:
                continue  # it has not gone on for long: only the short ones have ended
            mean0, mean1 = x0 / n0, x1 / n1
            variance = max(s0 / n0 - mean0**2, s1 / n1 - mean1**2, _ALIKE**2)  # a few in a row may be alike by chance
            z = abs(mean1 - mean0) / math.sqrt(variance / n0 + variance / n1)
            if abs(mean1 - mean0) > needed:
                found.append((what, z, math.exp(mean0), math.exp(mean1)))
        if not self._is_closed:
            found += self._arrivals(rows_before, rows_after)
        elif _is_constant(until) and _is_constant(after):
            found += self._clients(until, after)
        return found

    def _look_at_loop(self, rows: np.ndarray) -> None:
        """Whether the loop is closed, once enough requests have come to tell. The last seconds are left out: their clients may be more or fewer,
        which is a shift."""
        total = _total(rows[:-_LATEST])
        if total.seconds > 0 and total.arrivals * total.seconds >= _TURNS * (total.running_s + total.waiting_s):
            self._is_closed = _is_constant(total)

    def _clients(self, before: _Bucket, after: _Bucket) -> list[tuple[str, float, float, float]]:
        """In a closed loop the number of clients is known, not estimated: a second or two of it is enough."""
        n0 = (before.running_s + before.waiting_s) / before.seconds
        n1 = (after.running_s + after.waiting_s) / after.seconds
        if min(n0, n1) <= 0 or abs(math.log(n1 / n0)) <= math.log1p(self.settings.effect):
            return []
        z = abs(n1 - n0) / (math.sqrt(_CLOSED_BELOW * max(n0, n1)) / math.sqrt(min(before.seconds, after.seconds)))
        return [("clients", z, n0, n1)]

    def _arrivals(self, before: np.ndarray, after: np.ndarray) -> list[tuple[str, float, float, float]]:
        """Arrivals per second; bursts widen the standard error, as neighbouring seconds are alike then."""
        n0, n1 = len(before), len(after)
        if n0 < 10 or n1 < 5:
            return []
        a, b = before[:, _AT["arrivals"]] / _seconds(before), after[:, _AT["arrivals"]] / _seconds(after)
        r0, r1 = float(a.mean()), float(b.mean())
        if max(r0 * n0, r1 * n1) < self.settings.min_before:
            return []
        if abs(math.log(max(r1, 1e-3) / max(r0, 1e-3))) <= 1.5 * math.log1p(self.settings.effect):
            return []
        variance = max(max(float(x.var()), r, 1.0 / len(x)) * _burst(x) for x, r in ((a, r0), (b, r1)))
        z = abs(r1 - r0) / math.sqrt(variance / n0 + variance / n1)
        return [("requests/s", z, r0, r1)]


def _burst(counts: np.ndarray) -> float:
    """By how much correlation between neighbours inflates the variance of a mean, from the first lag (AR(1)); 1 to 9."""
    if len(counts) < 10:
        return 1.0
    centred = counts - counts.mean()
    power = float(centred @ centred)
    rho = min(max(float(centred[1:] @ centred[:-1]) / power, 0.0), 0.8) if power > 0 else 0.0
    return (1 + rho) / (1 - rho)


def _rows(buckets: Iterable[_Bucket]) -> np.ndarray:
    """``[number of buckets, number of fields]``"""
    return np.array([msgspec.structs.astuple(bucket) for bucket in buckets])


def _total(rows: np.ndarray) -> _Bucket:
    return _Bucket(*map(float, rows.sum(axis=0)))


def _seconds(rows: np.ndarray) -> np.ndarray:
    return np.maximum(rows[:, _AT["seconds"]], 1e-9)


def _is_constant(total: _Bucket) -> bool:
    """Whether the number of requests in the system hardly varied, and none was turned away."""
    if total.seconds <= 0 or total.refused:
        return False
    mean = (total.running_s + total.waiting_s) / total.seconds
    variance = total.system_x2_s / total.seconds - mean**2
    return mean >= 0.95 and variance < _CLOSED_BELOW * mean


def _cv(total: float, squares: float, count: float) -> float:
    """Coefficient of variation, within what a model can make something of; 1 when there is too little to say."""
    if count < 4 or total <= 0:
        return 1.0
    mean = total / count
    return min(max(math.sqrt(max(squares / count - mean**2, 0.0)) / mean, 0.1), 5.0)

"""What is asked of the simulated server, and when: traces from files, and made-up ones. Pure; randomness comes by a seed.

A file is CSV with a header: ``TIMESTAMP,ContextTokens,GeneratedTokens`` (the Azure LLM inference traces of 2023; Patel et al.,
Splitwise, ISCA 2024) or ``arrival_s,prompt_tokens,output_tokens``. A made-up trace is a list of phases, joined by ``+``:

    poisson:rate=2,prompt=512,output=16,duration=300+poisson:rate=2,prompt=128,output=512,duration=300

with Poisson arrivals (`rate` per second) and lengths that are fixed, or with `cv` lognormal with that coefficient of
variation.

Never true: arrivals are out of order, or a length is below 1.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from scheduler.planning.traffic import Traffic

_COLUMNS = (("TIMESTAMP", "ContextTokens", "GeneratedTokens"), ("arrival_s", "prompt_tokens", "output_tokens"))
_MOST_TOKENS, _MOST_REQUESTS = 10**9, 10**7


@dataclass(frozen=True, slots=True)
class Trace:
    """N requests: when they arrive (seconds from the trace's start, ascending), their prompts and outputs (tokens), ``[N]``."""

    name: str
    arrival_s: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def duration_s(self) -> float:
        """To the last arrival."""
        return float(self.arrival_s[-1]) if len(self) else 0.0

    def window(self, start_s: float, stop_s: float) -> "Trace":
        """The requests that arrive in ``[start_s, stop_s)``."""
        keep = (self.arrival_s >= start_s) & (self.arrival_s < stop_s)
        return Trace(self.name, self.arrival_s[keep], self.prompt_tokens[keep], self.output_tokens[keep])

    def first(self, num_requests: int) -> "Trace":
        n = num_requests
        return Trace(self.name, self.arrival_s[:n], self.prompt_tokens[:n], self.output_tokens[:n])

    def scaled(self, rate: float) -> "Trace":
        """The same requests, `rate` times as fast."""
        return Trace(self.name, self.arrival_s / rate, self.prompt_tokens, self.output_tokens)

    def traffic(self, seconds: float | None = None, *, clients: int = 0) -> Traffic:
        """The load in means over `seconds` (default: the whole trace), as the planner wants it; or that of so many clients, who ask for these requests
        one after the other.

        Raises:
            ValueError: when there are no requests.
        """
        if not len(self):
            raise ValueError(f"trace {self.name} has no request to plan for")
        seconds = max(seconds or self.duration_s, 1e-3)
        gaps = np.diff(self.arrival_s)
        return Traffic(
            requests_per_s=0.0 if clients else len(self) / seconds,
            prompt_tokens=float(self.prompt_tokens.mean()),
            output_tokens=float(self.output_tokens.mean()),
            concurrency=float(clients),
            arrival_cv=_cv(gaps),
            service_cv=_cv(self.output_tokens),
        )


def read_trace(path: Path) -> Trace:
    """The trace in a CSV file.

    Raises:
        ValueError: it is no trace; the message names the line.
    """
    with path.open(newline="", encoding="utf-8-sig") as lines:
        rows = csv.reader(lines)
        header = next(rows, [])
        columns = next((names for names in _COLUMNS if set(names) <= set(header)), None)
        if columns is None:
            expected = " or ".join(",".join(names) for names in _COLUMNS)
            raise ValueError(f"{path} begins with {','.join(header)!r}; a trace begins with {expected}")
        at, prompt, output = (header.index(name) for name in columns)
        arrivals, prompts, outputs = [], [], []
        for number, row in enumerate(rows, start=2):
            if not row:
                continue
            try:
                arrivals.append(_seconds(row[at]))
                prompts.append(_tokens(row[prompt]))
                outputs.append(_tokens(row[output]))
            except (ValueError, IndexError) as error:
                raise ValueError(f"{path}, line {number}: {','.join(row)!r} is no request: {error}") from error
    first_s = min(arrivals, default=0.0)
    return _trace(path.stem, [at_s - first_s for at_s in arrivals], prompts, outputs)


def make_trace(text: str, seed: int) -> Trace:
    """The made-up trace that `text` describes (see above).

    Raises:
        ValueError: what is wrong with the description.
    """
    rng = np.random.default_rng(seed)
    start_s = 0.0
    parts: list[Trace] = []
    for phase in text.split("+"):
        kind, _, rest = phase.partition(":")
        if kind.strip() != "poisson":
            raise ValueError(
                f"trace: {phase!r} is no phase; it looks like poisson:rate=2,prompt=512,output=128,duration=300"
            )
        part, duration_s = _phase(_fields(rest), rng)
        parts.append(Trace("", part.arrival_s + start_s, part.prompt_tokens, part.output_tokens))
        start_s += duration_s
    return _trace(
        "synthetic",
        np.concatenate([part.arrival_s for part in parts]),
        np.concatenate([part.prompt_tokens for part in parts]),
        np.concatenate([part.output_tokens for part in parts]),
    )


def _fields(text: str) -> dict[str, float]:
    fields = {"rate": 1.0, "prompt": 512.0, "output": 128.0, "duration": 300.0, "cv": 0.0}
    for part in filter(None, text.split(",")):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in fields:
            raise ValueError(f"trace: a phase has no {key!r}; it has {', '.join(fields)}")
        try:
            fields[key] = float(value)
        except ValueError:
            raise ValueError(f"trace: {key}={value} is no number") from None
        if not 0 <= fields[key] < 1e9 or (key != "cv" and not fields[key]):
            raise ValueError(f"trace: {key}={value} is out of range")
    return fields


def _phase(fields: dict[str, float], rng: np.random.Generator) -> tuple[Trace, float]:
    rate, duration_s = fields["rate"], fields["duration"]
    if rate * duration_s > _MOST_REQUESTS:
        raise ValueError(
            f"trace: {rate:g} requests/s for {duration_s:g} s; a phase has {_MOST_REQUESTS:,} requests at most"
        )
    count = int(rng.poisson(rate * duration_s))
    arrivals = np.sort(rng.uniform(0.0, duration_s, count))

    def lengths(mean: float) -> np.ndarray:
        variance = math.log1p(fields["cv"] ** 2)
        drawn = rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), count)
        return np.maximum(1, np.rint(drawn)).astype(np.int64)

    return Trace("", arrivals, lengths(fields["prompt"]), lengths(fields["output"])), duration_s


def _trace(
    name: str,
    arrivals: Sequence[float] | np.ndarray,
    prompts: Sequence[int] | np.ndarray,
    outputs: Sequence[int] | np.ndarray,
) -> Trace:
    at = np.asarray(arrivals, dtype=float)
    order = np.argsort(at, kind="stable")
    prompt, output = np.asarray(prompts, dtype=np.int64)[order], np.asarray(outputs, dtype=np.int64)[order]
    return Trace(name, at[order], np.maximum(prompt, 1), np.maximum(output, 1))


def _tokens(text: str) -> int:
    if (tokens := int(text)) > _MOST_TOKENS:
        raise ValueError(f"no request has more than {_MOST_TOKENS:,} tokens")
    return tokens


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        return datetime.fromisoformat(text[:26]).replace(tzinfo=UTC).timestamp()
    if not math.isfinite(seconds):
        raise ValueError(f"{text} is no time")
    return seconds


def _cv(values: np.ndarray) -> float:
    mean = float(values.mean()) if len(values) else 0.0
    return float(values.std()) / mean if len(values) > 1 and mean > 0 else 1.0

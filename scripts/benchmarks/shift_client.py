"""Plays a seeded trace against a server and, while it plays, changes the server again and again.

The loop is open: requests start when the trace says so, whatever the server is doing, and all times count from when a
request was due. Unlike `loadgen`, a stream keeps the moment of each token, and a client may retry: then it sends the
whole request again and counts only tokens that it had not got before, as a user would see it.

What is never true: that the two sides of a pair differ in their prompts (but for the first token, where a prefix cache is on: nothing
of an earlier play may be a hit), lengths or arrivals.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
from loadgen import split_events
from shift_metrics import AFTER_COMMIT_S, Stream, Window

RETRY_EVERY_S = 0.1
REST_S = 1.0
"""Between the end of one window and the next change."""


@dataclass(frozen=True)
class Arrival:
    """One request of a trace; `at_s` counts from the trace's start."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Change:
    """Something that was done to the server while a trace played; times are the trace's."""

    window: Window
    report: dict[str, Any]

    @property
    def commit_s(self) -> float:
        return self.window.end_s - AFTER_COMMIT_S


@dataclass(frozen=True)
class Acting:
    """What to do while a trace plays: await ``act()``, whose result is the report and whose end is the commit, at `first_s`
    and again `REST_S` after each window, as long as it would begin before `until_s` (once, when that is not later)."""

    act: Callable[[], Awaitable[dict[str, Any]]]
    first_s: float
    until_s: float = 0.0


@dataclass
class Run:
    """One play of a trace, and what was done meanwhile."""

    streams: list[Stream]
    duration_s: float
    changes: list[Change] = field(default_factory=list)
    client_cpu_s: float = 0.0

    @property
    def errors(self) -> list[str]:
        return [stream.error for stream in self.streams if stream.error is not None]


def poisson(rate: float, duration_s: float, prompt_tokens: int, output_tokens: int, seed: int) -> list[Arrival]:
    """Arrivals at `rate` per second over ``[0, duration_s)``; the same for the same arguments."""
    draw, at_s, arrivals = random.Random(f"trace/{seed}"), 0.0, []
    while (at_s := at_s + draw.expovariate(rate)) < duration_s:
        arrivals.append(Arrival(at_s, prompt_tokens, output_tokens))
    return arrivals


def excerpt(text: Sequence[int], num_tokens: int, seed: int, index: int) -> list[int]:
    """`num_tokens` token ids of `text`, read as a ring, from a place that (seed, index) decides.

    Prompts are real text, because what follows random tokens is often half a character, and such a token is an event
    that no client sees.
    """
    start = random.Random(f"{seed}/{index}").randrange(len(text))
    return [text[(start + offset) % len(text)] for offset in range(num_tokens)]


async def play(
    url_of: Callable[[], str],
    model: str,
    text: Sequence[int],
    arrivals: Sequence[Arrival],
    *,
    seed: int,
    first_token: int | None = None,
    acting: Acting | None = None,
    retry_for_s: float = 0.0,
    timeout_s: float = 600.0,
) -> Run:
    """Play `arrivals` with prompts out of `text` (token ids) that begin with `first_token`, if any, and meanwhile do what `acting` says.

    `url_of` is asked for each attempt, since a server that is started anew has another address. `retry_for_s` is how
    long after its first failure a request is tried again; with 0.0 a failure is an error of the run.
    """
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    cpu_before, began_s = time.process_time(), time.perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        caller = _Caller(session, url_of, model, text, seed, first_token, began_s, retry_for_s)
        changing = asyncio.create_task(_act(acting, began_s)) if acting is not None else None
        tasks = []
        for index, arrival in enumerate(arrivals):
            await asyncio.sleep(max(0.0, began_s + arrival.at_s - time.perf_counter()))
            tasks.append(asyncio.create_task(caller.request(index, arrival)))
        streams = await asyncio.gather(*tasks)
        changes = await changing if changing is not None else []
    duration_s = time.perf_counter() - began_s
    return Run(list(streams), duration_s, changes, time.process_time() - cpu_before)


async def _act(acting: Acting, began_s: float) -> list[Change]:
    changes: list[Change] = []
    at_s = acting.first_s
    while not changes or at_s < acting.until_s:
        await asyncio.sleep(max(0.0, began_s + at_s - time.perf_counter()))
        trigger_s = time.perf_counter() - began_s
        report = await acting.act()
        changes.append(Change(Window(trigger_s, time.perf_counter() - began_s + AFTER_COMMIT_S), report))
        at_s = changes[-1].window.end_s + REST_S
    return changes


@dataclass
class _Caller:
    """What all requests of a run share."""

    session: aiohttp.ClientSession
    url_of: Callable[[], str]
    model: str
    text: Sequence[int]
    seed: int
    first_token: int | None
    began_s: float
    retry_for_s: float

    async def request(self, index: int, arrival: Arrival) -> Stream:
        stream = Stream(index=index, due_s=arrival.at_s)
        prompt = excerpt(self.text, arrival.prompt_tokens, self.seed, index)
        if self.first_token is not None:
            prompt[0] = self.first_token
        # Special tokens are shown, because with `ignore_eos` a model that has ended goes on with nothing else.
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": arrival.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        give_up_s: float | None = None
        while True:
            stream.error = await self._attempt(stream, body)
            if stream.error is None and stream.num_output != arrival.output_tokens:
                stream.error = f"{stream.num_output} of {arrival.output_tokens} tokens"
            now_s = time.perf_counter()
            give_up_s = now_s + self.retry_for_s if give_up_s is None else give_up_s
            if stream.error is None or now_s >= give_up_s:
                return stream
            stream.num_retries += 1
            await asyncio.sleep(RETRY_EVERY_S)

    async def _attempt(self, stream: Stream, body: dict[str, Any]) -> str | None:
        """One try; what went wrong, or None."""
        try:
            async with self.session.post(f"{self.url_of()}/v1/completions", json=body) as response:
                if response.status != 200:
                    return f"{response.status}: {(await response.text())[:200]}"
                return await self._read(response.content, stream)
        except (aiohttp.ClientError, TimeoutError, ConnectionError, msgspec.DecodeError) as error:
            return f"{type(error).__name__}: {error}"

    async def _read(self, content: aiohttp.StreamReader, stream: Stream) -> str | None:
        rest, to_skip, error = b"", len(stream.times_s), None
        stream.num_output = 0
        async for chunk in content.iter_any():
            now_s = time.perf_counter() - self.began_s
            events, rest = split_events(rest + chunk)
            for event in events:
                if event.error is not None:
                    error = f"in the stream: {event.error}"
                if event.usage is not None:
                    stream.num_output = event.usage.completion_tokens
                if event.choices and event.choices[0].finish_reason is None and not event.choices[0].text:
                    continue
                if event.choices:
                    to_skip -= 1
                    if to_skip < 0:
                        stream.times_s.append(now_s)
        return error

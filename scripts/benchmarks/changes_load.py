"""The load of `changes`: jobs with known answers, streams that repeat them, and the comparison bit by bit.

A *job* is a prompt with its parameters; every stream of it must give the tokens and log-probabilities of the run on a server
that nobody changed, to the last bit, whatever happens under it and whatever else is in its batches. A quarter of the jobs is sampled with a seed, the rest is greedy. Half of the prompts begin
alike. A few jobs read a long prompt with its log-probabilities, so that flips fall between its chunks.
"""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from arms import note

REQUEST_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Job:
    """A request. `reads` asks for the log-probabilities of the prompt, without a stream."""

    prompt: tuple[int, ...]
    num_tokens: int
    temperature: float
    seed: int
    reads: bool = False

    def body(self) -> dict[str, Any]:
        common = {"prompt": list(self.prompt), "max_tokens": self.num_tokens, "logprobs": 0, "return_token_ids": True}
        if self.reads:
            return {**common, "temperature": 0, "echo": True, "ignore_eos": True}
        return {**common, "temperature": self.temperature, "seed": self.seed, "ignore_eos": True, "stream": True}


@dataclass
class Told:
    """What a stream said, and when: ``arrivals_s[i]`` is when token ``i`` came."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)


@dataclass
class Ledger:
    """What was checked, and what was wrong."""

    num_streams: int = 0
    num_tokens: int = 0
    num_crossings: int = 0
    """Commits that fell between the first and the last token of a stream, summed over the streams."""
    max_logprob_gap: float = 0.0
    stalls_s: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        if len(self.problems) < 100:
            note(f"  PROBLEM {text}")
            self.problems.append(text)


def make_jobs(count: int, vocab_size: int, max_tokens: int, seed: int) -> list[Job]:
    """Prompts of 3 to 200 random tokens, outputs of a quarter of `max_tokens` up to all of it; the same for the same arguments."""
    draw = random.Random(f"{seed}/jobs")
    alike = [draw.randrange(3, vocab_size) for _ in range(120)]
    jobs = []
    for index in range(count):
        own = [draw.randrange(3, vocab_size) for _ in range(draw.choice((3, 20, 60, 90)))]
        prompt = [*alike[: draw.randint(16, len(alike))], *own] if index % 2 else own
        reads = index % 8 == 6
        if reads:
            prompt += [draw.randrange(3, vocab_size) for _ in range(150)]
        num_tokens = draw.randint(max_tokens // 4, max_tokens)
        jobs.append(Job(tuple(prompt), 1 if reads else num_tokens, float(index % 4 == 1), index, reads))
    return jobs


class Load:
    """Streams against one server. `expected` is what each job says, filled by `learn`."""

    def __init__(self, session: aiohttp.ClientSession, url: str, jobs: Sequence[Job], ledger: Ledger) -> None:
        self.url = url
        self.jobs = jobs
        self.ledger = ledger
        self.expected: list[Told] = []
        self.commits_s: list[float] = []
        self.is_over = False
        self._session = session

    async def learn(self, concurrency: int) -> list[Told]:
        """Every job once."""
        gate = asyncio.Semaphore(concurrency)

        async def one(job: Job) -> Told:
            async with gate:
                return await self.tell(job)

        return list(await asyncio.gather(*(one(job) for job in self.jobs)))

    async def repeat(self, number: int, seed: int) -> None:
        """Job after job, each compared with what is expected, until `is_over`."""
        draw = random.Random(f"{seed}/stream/{number}")
        while not self.is_over:
            index = draw.randrange(len(self.jobs))
            try:
                told = await self.tell(self.jobs[index])
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                self.ledger.problem(f"job {index}: {type(error).__name__}: {error}")
                await asyncio.sleep(0.2)
                continue
            self.compare(index, told)

    async def tell(self, job: Job) -> Told:
        """Run a job.

        Raises:
            ValueError: an answer that is no success, or an error inside the stream.
            aiohttp.ClientError, TimeoutError: from the connection.
        """
        told = Told()
        async with self._session.post(f"{self.url}/v1/completions", json=job.body()) as response:
            if response.status != 200:
                raise ValueError(f"answered {response.status}: {(await response.text())[:300]}")
            if job.reads:
                _take(told, (await response.json())["choices"][0], skip=1)
                return told
            async for line in response.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise ValueError(f"an error in the stream: {event['error']}")
                for choice in event["choices"]:
                    _take(told, choice)
        if len(told.tokens) != job.num_tokens:
            raise ValueError(f"{len(told.tokens)} tokens instead of {job.num_tokens}")
        return told

    def compare(self, index: int, told: Told) -> None:
        """Book one stream."""
        ledger, expected = self.ledger, self.expected[index]
        ledger.num_streams += 1
        if told.arrivals_s:
            begun_s, ended_s = told.arrivals_s[0], told.arrivals_s[-1]
            ledger.num_crossings += sum(begun_s < at_s < ended_s for at_s in self.commits_s[-200:])
            pairs = zip(told.arrivals_s, told.arrivals_s[1:], strict=False)
            ledger.stalls_s.append(max((b - a for a, b in pairs), default=0.0))
        count = len(expected.tokens)
        if told.tokens != expected.tokens:
            count = next(i for i, (a, b) in enumerate(zip(told.tokens, expected.tokens, strict=True)) if a != b)
            ledger.problem(
                f"job {index}: token {count} of {len(expected.tokens)} is {told.tokens[count]} instead of "
                f"{expected.tokens[count]} (log-probabilities {told.logprobs[count]:.6f} and "
                f"{expected.logprobs[count]:.6f}); {len(self.commits_s)} changes so far"
            )
        ledger.num_tokens += count
        pairs = zip(told.logprobs, expected.logprobs, strict=True)
        if not self.jobs[index].reads:
            pairs = list(pairs)[:count]
        gaps = [abs(a - b) for a, b in pairs]
        worst = max(gaps, default=0.0)
        ledger.max_logprob_gap = max(ledger.max_logprob_gap, worst)
        if worst > 0.0:
            first = next(i for i, gap in enumerate(gaps) if gap > 0.0)
            ledger.problem(
                f"job {index} ({'reading' if self.jobs[index].reads else 'stream'}, prompt of "
                f"{len(self.jobs[index].prompt)}): log-probability {first} of {len(gaps)} is {gaps[first]:.2e} off, the worst "
                f"{worst:.2e}; {len(self.commits_s)} changes so far"
            )


def _take(told: Told, choice: dict[str, Any], skip: int = 0) -> None:
    now_s = time.monotonic()
    tokens = choice.get("token_ids") or []
    told.tokens += tokens
    told.arrivals_s += [now_s] * len(tokens)
    if choice["logprobs"] is not None:
        told.logprobs += choice["logprobs"]["token_logprobs"][skip:]

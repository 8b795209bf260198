"""The clients of a soak: some behave, most do not. Each is a coroutine that does its thing once.

A client that behaves checks what it gets; whatever is not as promised goes into `Tally.problems`. One that misbehaves
checks only that the server answers it decently, or not at all where it hung up first. A refusal with 429 is decent
for everybody. What is never true: that a client waits without a deadline.
"""

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import aiohttp

REQUEST_TIMEOUT_S = 180.0
_MAX_PROBLEMS = 50
_SYSTEM_PROMPTS = tuple(f"You are assistant number {n}. " + "Answer briefly and kindly. " * 12 for n in range(4))


@dataclass
class Tally:
    """What happened, by kind, and what should not have."""

    counts: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(text)
        self.counts["problems"] += 1


@dataclass
class Target:
    """The server, as the clients see it."""

    host: str
    port: int
    model: str
    session: aiohttp.ClientSession
    tally: Tally

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


Client: TypeAlias = Callable[[Target, random.Random], Awaitable[None]]


async def stream_to_the_end(target: Target, draw: random.Random) -> None:
    """A streamed completion with a shared prefix: exactly the tokens asked for, a finish reason, and [DONE]."""
    num_tokens = draw.randint(8, 160)
    body = _completion(target, draw, max_tokens=num_tokens, ignore_eos=True, stream=True)
    body["stream_options"] = {"include_usage": True}
    async with target.session.post(f"{target.url}/v1/completions", json=body) as response:
        if await _refused(target, response, "stream"):
            return
        events = [line async for line in _data_lines(response)]
    if not events or events[-1] != "[DONE]":
        return target.tally.problem(f"stream without [DONE], last event {events[-1:]}")
    chunks = [json.loads(event) for event in events[:-1]]
    usage = next((chunk["usage"] for chunk in reversed(chunks) if chunk.get("usage")), None)
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk.get("choices", ())]
    if usage is None or usage["completion_tokens"] != num_tokens or [r for r in reasons if r] != ["length"]:
        return target.tally.problem(f"stream of {num_tokens} tokens ended with usage {usage}, reasons {reasons[-3:]}")
    target.tally.counts["tokens"] += num_tokens


async def chat(target: Target, draw: random.Random) -> None:
    """A chat without streaming, sampled, with penalties and several choices now and then."""
    messages = [{"role": "system", "content": draw.choice(_SYSTEM_PROMPTS)}, {"role": "user", "content": _words(draw)}]
    body = {"model": target.model, "messages": messages, "max_tokens": draw.randint(1, 64), "temperature": 0.8}
    body |= draw.choice([{}, {"n": 2}, {"stop": ["."]}, {"seed": 7, "top_p": 0.9}, {"frequency_penalty": 0.5}])
    async with target.session.post(f"{target.url}/v1/chat/completions", json=body) as response:
        if await _refused(target, response, "chat"):
            return
        answer = await response.json()
    if len(answer["choices"]) != body.get("n", 1) or any(not c["finish_reason"] for c in answer["choices"]):
        target.tally.problem(f"chat answered {json.dumps(answer)[:300]}")


async def leave_in_the_middle(target: Target, draw: random.Random) -> None:
    """Reads a few events of a long stream and hangs up; sometimes before the first."""
    body = _completion(target, draw, max_tokens=400, ignore_eos=True, stream=True)
    async with target.session.post(f"{target.url}/v1/completions", json=body) as response:
        if await _refused(target, response, "leave"):
            return
        left = draw.randint(0, 12)
        async for _ in _data_lines(response):
            left -= 1
            if left < 0:
                break
        response.close()


async def leave_before_the_answer(target: Target, draw: random.Random) -> None:
    """Asks for a long answer without streaming and gives up while it is made."""
    body = _completion(target, draw, max_tokens=600, ignore_eos=True, n=draw.choice([1, 3]))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(draw.uniform(0.01, 1.5)):
            async with target.session.post(f"{target.url}/v1/completions", json=body) as response:
                await _refused(target, response, "impatient")


async def leave_in_the_body(target: Target, draw: random.Random) -> None:
    """Promises a body, sends a part of it, and closes or lingers."""
    async with _socket(target) as (_, writer):
        writer.write(_head(1000) + b'{"prompt": "half a')
        await writer.drain()
        await asyncio.sleep(draw.choice([0.0, 2.0]))


async def never_read(target: Target, draw: random.Random) -> None:
    """Starts a long stream, never reads it, and hangs up after a while."""
    body = json.dumps(_completion(target, draw, max_tokens=500, ignore_eos=True, stream=True)).encode()
    async with _socket(target) as (_, writer):
        writer.write(_head(len(body)) + body)
        await writer.drain()
        await asyncio.sleep(draw.uniform(3.0, 10.0))


async def send_garbage(target: Target, draw: random.Random) -> None:
    """Bytes that are no HTTP."""
    async with _socket(target) as (reader, writer):
        writer.write(draw.randbytes(draw.randint(1, 4096)) + b"\r\n\r\n")
        await writer.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5.0):
                await reader.read(4096)
    await asyncio.sleep(draw.uniform(0.0, 0.3))


async def hold_connections(target: Target, draw: random.Random) -> None:
    """Many connections that say nothing."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(150):
            await stack.enter_async_context(_socket(target))
        await asyncio.sleep(draw.uniform(0.5, 3.0))


async def burst(target: Target, draw: random.Random) -> None:
    """More requests at one moment than the queue holds: each is served or refused with 429."""

    async def one(seed: int) -> None:
        await stream_to_the_end(target, random.Random(seed))

    await asyncio.gather(*(one(draw.getrandbits(32)) for _ in range(48)))
    await asyncio.sleep(10.0)


async def send_a_huge_body(target: Target, draw: random.Random) -> None:
    """64 MB of JSON: refused with a 4xx, or the connection is closed while we send."""
    size = 64 << 20
    with contextlib.suppress(ConnectionError, aiohttp.ClientConnectionError):
        body = b'{"prompt": "' + b"a" * size + b'"}'
        async with target.session.post(f"{target.url}/v1/completions", data=body) as response:
            await _expect_4xx(target, response, "huge body")
    await asyncio.sleep(draw.uniform(2.0, 8.0))


async def ask_nonsense(target: Target, draw: random.Random) -> None:
    """Bad JSON, wrong types, absurd values: a 4xx in OpenAI's error shape, never a 500."""
    name, path, body = draw.choice(_nonsense(target.model))
    async with target.session.post(f"{target.url}{path}", data=body) as response:
        await _expect_4xx(target, response, name)
    await asyncio.sleep(draw.uniform(0.0, 0.3))


async def look_around(target: Target, draw: random.Random) -> None:
    """What a monitoring system and a curious user read."""
    path = draw.choice(["/health", "/metrics", "/v1/models", "/admin/layout", "/admin/workers"])
    async with target.session.get(f"{target.url}{path}") as response:
        await response.read()
        if response.status != 200:
            target.tally.problem(f"GET {path} answered {response.status}")
    await asyncio.sleep(draw.uniform(0.0, 0.3))


CLIENTS: dict[Client, int] = {
    stream_to_the_end: 16,
    chat: 3,
    leave_in_the_middle: 4,
    leave_before_the_answer: 2,
    leave_in_the_body: 2,
    never_read: 2,
    send_garbage: 1,
    hold_connections: 1,
    burst: 1,
    send_a_huge_body: 1,
    ask_nonsense: 1,
    look_around: 1,
}
"""How many of each are at it at any time."""


def _nonsense(model: str) -> list[tuple[str, str, bytes]]:
    good = {"model": model, "prompt": "Hello", "max_tokens": 4}
    chat_good = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    changes = (
        *({"prompt": value} for value in (None, 5, {}, [], [-1], [10**9], ["a", 1], "word " * 40_000)),
        *({"max_tokens": value} for value in (-1, "many", 10**12, 1.5)),
        *({"temperature": value} for value in (-1, 1e9, "hot")),
        *({"top_p": value} for value in (-0.1, 1.1)),
        *({"n": value} for value in (0, -3, 100_000)),
        *({"stop": value} for value in (5, ["x"] * 1000)),
        *({"model": "no-such-model"}, {"logit_bias": {"a": 1}}, {"logprobs": -7}, {"seed": "x"}, {"top_k": -5}),
    )
    cases = [(f"completion with {str(change)[:60]}", "/v1/completions", good | change) for change in changes]
    chat_changes = (
        *({"messages": value} for value in ([], "hi", [{}], [{"role": "user"}], [{"role": 3, "content": "x"}])),
        *({"top_logprobs": 10_000, "logprobs": True}, {"max_tokens": -1}),
    )
    cases += [(f"chat with {str(change)[:60]}", "/v1/chat/completions", chat_good | change) for change in chat_changes]
    encoded = [(name, path, json.dumps(body).encode()) for name, path, body in cases]
    broken = (b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"prompt": "\xc3("}', b"[" * 100_000)
    return encoded + [(f"body {body[:12]!r}", "/v1/completions", body) for body in broken]


def _completion(target: Target, draw: random.Random, **parameters: object) -> dict:
    prompt = draw.choice(_SYSTEM_PROMPTS) + _words(draw)
    return {"model": target.model, "prompt": prompt, "temperature": draw.choice([0, 1.0]), **parameters}


def _words(draw: random.Random) -> str:
    words = ("river", "stone", "seven", "quickly", "über", "naïve", "雨", "🙂", "walks", "under", "a", "bridge")
    return " ".join(draw.choice(words) for _ in range(draw.randint(1, 60)))


async def _data_lines(response: aiohttp.ClientResponse):
    async for line in response.content:
        if line.startswith(b"data: "):
            yield line[6:].decode().strip()


async def _refused(target: Target, response: aiohttp.ClientResponse, what: str) -> bool:
    if response.status == 200:
        return False
    text = await response.text()
    if response.status == 429 and "Retry-After" in response.headers:
        target.tally.counts["refused_429"] += 1
        await asyncio.sleep(1.0)
    else:
        target.tally.problem(f"{what}: {response.status} {text[:300]}")
    return True


async def _expect_4xx(target: Target, response: aiohttp.ClientResponse, what: str) -> None:
    text = await response.text()
    try:
        shaped = isinstance(json.loads(text)["error"]["message"], str)
    except (ValueError, KeyError, TypeError):
        shaped = False
    if not 400 <= response.status < 500 or not shaped:
        target.tally.problem(f"{what}: {response.status} {text[:300]}")


def _head(num_bytes: int) -> bytes:
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: soak\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % num_bytes
    )


@contextlib.asynccontextmanager
async def _socket(target: Target):
    async with asyncio.timeout(30.0):
        reader, writer = await asyncio.open_connection(target.host, target.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()

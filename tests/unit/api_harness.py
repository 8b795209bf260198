"""A scripted engine and a real HTTP server around it, for tests of the API alone.

The engine is the API's lower boundary: it plays given tokens to every sequence, one per turn of the loop, and notes what it
was asked. What real workers bring is tested in `tests/integration`.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from api.app import build_app, make_runner
from api.context import CONTEXT, ApiSettings
from api.text import Text
from kvstore.ids import SequenceId
from runtime.messages import TokenLogprobs
from scheduler.request import (
    AdmissionError,
    EngineStats,
    Health,
    Limits,
    PilotStats,
    Request,
    Sink,
    StageStats,
    TokenOutput,
    TraceRun,
)
from scheduler.transition import Report

LIMITS = Limits(max_context=256, model_max_context=512, kv_tokens=4096, vocab_size=320, max_queue=8, max_running=4)
MODEL = "tiny"


class ScriptedEngine:
    """Plays `script` to every sequence, then again from its start until `max_tokens`; `held` sequences get nothing."""

    def __init__(self, script: list[int]):
        self.script = script
        self.held = False
        self.failure: TokenOutput | None = None
        self.status = "serving"
        self.num_workers = 2
        self.requests: list[Request] = []
        self.sinks: dict[SequenceId, Sink] = {}
        self.aborted: list[SequenceId] = []
        self.finished: list[SequenceId] = []
        self.room = 1000
        self.wishes: list[dict[str, Any]] = []
        self.refusal: Exception | None = None
        self.first_outcome = "running"
        """Of every change that is asked for."""
        self.traces: list[TraceRun] = []
        self.reports: dict[int, dict[str, Any]] = {}
        self.mode = "off"
        self.staff = {"present": 3, "used": 2, "wanted": 2, "spare": 1}
        self.listeners: set[Callable[[dict[str, Any]], None]] = set()
        self._ended = asyncio.Event()

    def submit(self, request: Request, sink: Sink) -> SequenceId:
        if len(self.sinks) >= self.room:
            raise AdmissionError("the queue is full", status=429, code="queue_full", retry_after_s=3)
        sequence = len(self.requests)
        self.requests.append(request)
        self.sinks[sequence] = sink
        if not self.held:
            asyncio.get_running_loop().call_soon(self._play, sequence, 0)
        return sequence

    def send(self, sequence: SequenceId, output: TokenOutput) -> None:
        """One output by hand."""
        sink = self.sinks.pop(sequence) if output.finish_reason else self.sinks[sequence]
        sink(output)

    def _play(self, sequence: SequenceId, position: int) -> None:
        if sequence not in self.sinks:
            return
        request = self.requests[sequence]
        prompt_logprobs = None
        if position == 0 and request.prompt_logprobs >= 0:
            prompt_logprobs = [self.logprob(token, request.prompt_logprobs) for token in request.prompt[1:]]
        if self.failure is not None and position == 2:
            self.send(sequence, self.failure)
            return
        if request.max_tokens == 0:
            self.send(sequence, TokenOutput([], finish_reason="length", prompt_logprobs=prompt_logprobs))
            return
        token = self.script[position % len(self.script)]
        stopped = token in request.stop_token_ids
        last = position == request.max_tokens - 1
        output = TokenOutput(
            tokens=[token],
            logprobs=[self.logprob(token, request.sampling.logprobs)] if request.sampling.logprobs >= 0 else None,
            finish_reason="stop" if stopped else "length" if last else None,
            stopped_by=token if stopped else None,
            num_cached_tokens=2 if position == 0 else 0,
            prompt_logprobs=prompt_logprobs,
        )
        self.send(sequence, output)
        asyncio.get_running_loop().call_soon(self._play, sequence, position + 1)

    @staticmethod
    def logprob(token: int, num_top: int) -> TokenLogprobs:
        top = [(token, -0.25), (10, -2.0), (11, float("-inf"))][: max(0, num_top)]
        return TokenLogprobs(token, -0.25, 0, top)

    def abort(self, sequence: SequenceId) -> None:
        if self.sinks.pop(sequence, None) is not None:
            self.aborted.append(sequence)

    def finish(self, sequence: SequenceId) -> None:
        if self.sinks.pop(sequence, None) is not None:
            self.finished.append(sequence)

    def limits(self) -> Limits:
        if self.status != "serving":
            raise AdmissionError(f"not serving yet: {self.status}", status=503, code="not_ready", retry_after_s=1)
        return LIMITS

    def health(self) -> Health:
        return Health(self.status, "", self.num_workers, 2, 3, 8)

    def stats(self) -> EngineStats:
        stages = [StageStats("w0", 0, 7, 0.5, 0.25, 2.0, 0.0)]
        return EngineStats(1, len(self.sinks), 64, 5, 3, 20, 10, 99, 42, 7, 6, 3, 1, {"stop": 2}, 4, 0, 0, stages)

    def layout_view(self) -> dict[str, Any]:
        stages = [
            {"worker": "w0", "layers": [0, 3], "device": "cpu"},
            {"worker": "w1", "layers": [3, 4], "device": "cpu"},
        ]
        return {"epoch": 1, "model": MODEL, "num_layers": 4, "stages": stages, "transition": None}

    async def plan_view(self) -> dict[str, Any]:
        return {"mode": self.mode}

    def pilot_stats(self) -> PilotStats:
        return PilotStats(
            self.mode, 0.25, 0.9, 1.5, {"shift": 2}, [("w0", 40, 0.05, -0.01)], [("present", 0, "w0", 0.012)],
            {"tpot": (0.02, 0.021)}, self.staff,
        )  # fmt: skip

    def set_autopilot(self, mode: str) -> None:
        self.mode = mode

    def workers_view(self) -> list[dict[str, Any]]:
        return [{"name": "w0", "host": "127.0.0.1", "layers": [0, 3]}]

    # -- changes: each runs until the test ends it ---------------------------------------------------------------

    def change_layout(self, wish: dict[str, Any]) -> int:
        if self.refusal is not None:
            raise self.refusal
        self.wishes.append(wish)
        change = len(self.wishes)
        self.reports[change] = {**make_report(change, wish.get("strategy", "live")), "outcome": self.first_outcome}
        return change

    def drain_worker(self, name: str, wish: dict[str, Any]) -> int:
        return self.change_layout({"drain": name, **wish})

    def resume_worker(self, name: str) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.wishes.append({"resume": name})

    def abort_change(self, change: int) -> bool:
        report = self.reports.get(change)
        if report is None or report["outcome"] != "running" or report["phases_s"].get("flip"):
            return False
        self.end_change(change, "aborted", why="the operator aborted it")
        return True

    def end_change(self, change: int, outcome: str, **fields: Any) -> None:
        self.reports[change].update(outcome=outcome, **fields)
        self.tell({"type": "report", "report": self.reports[change]})
        self._ended.set()

    def change_view(self, change: int) -> dict[str, Any] | None:
        report = self.reports.get(change)
        return None if report is None else {**report, "progress": None}

    def changes_view(self) -> list[dict[str, Any]]:
        return list(self.reports.values())

    async def wait_change(self, change: int) -> dict[str, Any]:
        while self.reports[change]["outcome"] == "running":
            self._ended.clear()
            await self._ended.wait()
        return self.reports[change]

    def listen(self, listener: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        self.listeners.add(listener)
        return lambda: self.listeners.discard(listener)

    def tell(self, event: dict[str, Any]) -> None:
        for listener in list(self.listeners):
            listener(event)

    async def audit(self) -> dict[str, Any]:
        return {"problems": []}

    async def trace(self, seconds: float) -> TraceRun:
        if self.refusal is not None:
            raise self.refusal
        return self.traces.pop()

    def begin_drain(self) -> None:
        self.status = "draining"

    def num_unfinished(self) -> int:
        return len(self.sinks)


def make_report(change: int, strategy: str) -> dict[str, Any]:
    source = [{"worker": "w0", "layers": [0, 3]}, {"worker": "w1", "layers": [3, 4]}]
    target = [{"worker": "w0", "layers": [0, 1]}, {"worker": "w1", "layers": [1, 4]}]
    return msgspec.to_builtins(Report(change, strategy, source, target, 1, 2))  # pyright: ignore[reportArgumentType]


class Api:
    """A server and a client for it."""

    def __init__(self, engine: ScriptedEngine, client: aiohttp.ClientSession, url: str, runner: web.AppRunner):
        self.engine = engine
        self.stop = runner.cleanup
        self.close_listeners = runner.app[CONTEXT].listeners.close
        self.client = client
        self.url = url
        self.metrics = runner.app[CONTEXT].metrics

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    async def post(
        self, path: str, body: Any = None, *, raw: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        data = json.dumps(body).encode() if raw is None else raw
        async with self.client.post(self.url + path, data=data, headers=headers) as response:
            return response.status, await response.json()

    async def get(self, path: str, **headers: str) -> tuple[int, str]:
        async with self.client.get(self.url + path, headers=headers) as response:
            return response.status, await response.text()

    async def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The events of a stream, which must end as one should."""
        async with self.client.post(self.url + path, json={**body, "stream": True}) as response:
            assert response.status == 200, await response.text()
            assert response.headers["Content-Type"].startswith("text/event-stream")
            text = (await response.read()).decode()
        assert text.endswith("\n\n")
        events = text[:-2].split("\n\n")
        assert all(event.startswith("data: ") for event in events)
        assert events[-1] == "data: [DONE]"
        return [json.loads(event[6:]) for event in events[:-1]]

    async def until(self, condition: Any, timeout_s: float = 10.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110  there is no event for what the engine was asked
                await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def serve(text: Text, script: list[int], **settings: Any) -> AsyncIterator[Api]:
    engine = ScriptedEngine(script)
    app = build_app(engine, text, ApiSettings(**{"model_names": (MODEL, "alias"), "eos_token_ids": (2,), **settings}))
    runner = make_runner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with aiohttp.ClientSession() as client:
            yield Api(engine, client, f"http://127.0.0.1:{runner.addresses[0][1]}", runner)
        assert not engine.sinks, "every sequence has ended"
    finally:
        await runner.cleanup()

"""``POST /admin/trace``: what every thread of every process does for some seconds, as a picture for Perfetto.

The answer is a trace in Chrome's JSON format (open it at https://ui.perfetto.dev or chrome://tracing): one process per
member, one track per thread, a slice per span, an arrow per step from hop to hop, an instant per flip. Beside the events
stands ``midflight``, the numbers that a table is made of, which viewers ignore.
"""

import itertools
from typing import Any

import msgspec
from aiohttp import web

from api.context import CONTEXT, json_response, read_body
from api.errors import ApiError, shown
from runtime.messages import Span
from scheduler.request import ProcessTrace, TraceRun
from scheduler.transition import Refused

MAX_SECONDS = 60.0
_TRACKS = ("loop", "compute", "rpc", "shadow")


async def trace(request: web.Request) -> web.Response:
    """200 and the trace, after as many seconds as were asked for; 409 while another one is being recorded."""
    seconds = _seconds(await read_body(request))
    try:
        run = await request.app[CONTEXT].engine.trace(seconds)
    except Refused as error:
        raise ApiError(str(error), status=409, code="trace_under_way") from None
    return json_response(chrome_trace(run))


def chrome_trace(run: TraceRun) -> dict[str, Any]:
    """The trace as Chrome's JSON object; its times are microseconds from the beginning of the run."""
    events: list[dict[str, Any]] = []
    for index, process in enumerate(run.processes):
        events.append(_name("process_name", index, 0, process.name))
        tracks = sorted({span.track for span in process.spans}, key=_TRACKS.index)
        events += [_name("thread_name", index, _TRACKS.index(track), track) for track in tracks]
        for span in process.spans:
            events += _events(span, index, run.begun_s + process.ahead_s)
    events += _arrows(run)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "midflight": {
            "seconds": run.ended_s - run.begun_s,
            "head_cpu_s": run.head_cpu_s,
            "generated_tokens": run.generated_tokens,
            "processes": [_describe(process) for process in run.processes],
        },
    }


def _seconds(body: bytes) -> float:
    try:
        wish = msgspec.json.decode(body) if body.strip() else {}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(f"the body is not JSON: {error}", code="invalid_json") from None
    seconds = wish.get("seconds", 3.0) if isinstance(wish, dict) else None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= MAX_SECONDS:
        raise ApiError(
            f'seconds: {shown(seconds)} is not above 0 and at most {MAX_SECONDS:g}; send for example {{"seconds": 3}}',
            param="seconds",
        )
    return float(seconds)


def _events(span: Span, process: int, origin_s: float) -> list[dict[str, Any]]:
    event: dict[str, Any] = {
        "name": f"step, microbatch {span.amounts['microbatch']}" if span.name == "step" else span.name,
        "cat": span.name,
        "ph": "X",
        "pid": process,
        "tid": _TRACKS.index(span.track),
        "ts": _us(span.begin_s - origin_s),
        "dur": _us(span.end_s - span.begin_s),
        "args": {**_step(span), **span.amounts},
    }
    if span.name == "flip":
        del event["dur"]
        event |= {"ph": "i", "s": "p", "name": f"first step of epoch {span.step[0]}"}
    return [event]


def _step(span: Span) -> dict[str, int]:
    epoch, ordinal, hop = span.step
    return {} if epoch < 0 else {"epoch": epoch, "ordinal": ordinal, "hop": hop}


def _arrows(run: TraceRun) -> list[dict[str, Any]]:
    """From each step to the same step at the next hop."""
    steps = [
        (span.step, index, _us(span.begin_s - run.begun_s - process.ahead_s))
        for index, process in enumerate(run.processes)
        for span in process.spans
        if span.name == "step"
    ]
    steps.sort()
    arrows = []
    for (step, process, at_us), (following, next_process, next_at_us) in itertools.pairwise(steps):
        if following[:2] == step[:2]:
            arrow = {"name": "hidden states", "cat": "hop", "id": f"{step[0]}/{step[1]}/{step[2]}", "tid": 1}
            arrows.append({**arrow, "ph": "s", "pid": process, "ts": at_us})
            arrows.append({**arrow, "ph": "f", "bp": "e", "pid": next_process, "ts": next_at_us})
    return arrows


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}


def _describe(process: ProcessTrace) -> dict[str, Any]:
    return {
        "name": process.name,
        "spans": len(process.spans),
        "spans_lost": process.num_lost,
        "clock_ahead_s": process.ahead_s,
        "clock_error_s": process.error_s,
    }


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 3)

"""Recording spans, the picture and the table that are made of them, and asking for them over HTTP."""

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from api.text import Text
from api.trace import chrome_trace
from runtime.messages import Span
from runtime.trace import Tracer
from scheduler.request import ProcessTrace, TraceRun
from scheduler.transition import Refused
from tests.unit.api_harness import serve

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"))

from step_table import SHARES, breakdown, format_head, format_stages

NOTED = {"microbatch": 1, "attention_ns": 0, "products_ns": 0, "lm_head_ns": 0, "cpu_ns": 0}


def make_run() -> TraceRun:
    """Two workers and a step each of two hops; the second worker's clock is 100 s ahead of the head's."""
    first = [
        Span("compute", "wait", 9.0, 10.2, (-1, -1, -1), {}),
        Span("compute", "step", 10.2, 10.6, (3, 7, 0), {**NOTED, "attention_ns": 100_000_000, "cpu_ns": 300_000_000}),
        Span("compute", "send", 10.6, 10.7, (3, 7, 0), {}),
    ]
    second = [
        Span("rpc", "receive step", 110.69, 110.7, (-1, -1, -1), {"bytes": 9}),
        Span("compute", "flip", 110.7, 110.7, (3, 7, 1), {}),
        Span("compute", "step", 110.7, 110.9, (3, 7, 1), {**NOTED, "lm_head_ns": 50_000_000, "cpu_ns": 200_000_000}),
        Span("compute", "sample", 110.8, 110.9, (3, 7, 1), {}),
    ]
    head = [Span("loop", "decide stepresult", 10.9, 10.901, (-1, -1, -1), {})]
    processes = [
        ProcessTrace("head", 0.0, 0.0, head, 0),
        ProcessTrace("w0", 0.0, 0.001, first, 0),
        ProcessTrace("w1", 100.0, 0.001, second, 2),
    ]
    return TraceRun(10.0, 11.0, processes, 0.002, 10)


# -- recording ------------------------------------------------------------------------------------------------


def test_nothing_is_kept_while_the_tracer_is_off() -> None:
    tracer = Tracer()
    assert not tracer.is_on
    assert tracer.cpu_ns() == 0
    tracer.span("compute", "step", 0.0, 1.0)
    assert tracer.stop() == ([], 1)


def test_spans_beyond_the_last_slot_are_counted() -> None:
    tracer = Tracer()
    tracer.start(max_spans=3)
    for index in range(5):
        tracer.span("compute", f"{index}", 0.0, 1.0)
    spans, num_lost = tracer.stop()
    assert [span.name for span in spans] == ["0", "1", "2"]
    assert num_lost == 2
    tracer.start(max_spans=3)
    assert tracer.stop() == ([], 0), "what was recorded before is forgotten"


def test_threads_never_write_into_the_same_slot() -> None:
    tracer = Tracer()
    tracer.start(max_spans=20_000)

    def record(name: str) -> None:
        for index in range(5_000):
            tracer.span("compute", f"{name}{index}", 0.0, 1.0)

    threads = [threading.Thread(target=record, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spans, num_lost = tracer.stop()
    assert num_lost == 0
    assert len({span.name for span in spans}) == 20_000


# -- the picture ----------------------------------------------------------------------------------------------


def test_clocks_are_brought_together_and_hops_joined_by_an_arrow() -> None:
    trace = chrome_trace(make_run())
    events = json.loads(json.dumps(trace))["traceEvents"]
    steps = {event["pid"]: event for event in events if event.get("cat") == "step"}
    assert steps[1]["ts"] == pytest.approx(200_000)
    assert steps[2]["ts"] == pytest.approx(700_000), "its clock is 100 s ahead"
    assert steps[2]["name"] == "step, microbatch 1"
    assert {key: steps[2]["args"][key] for key in ("epoch", "ordinal", "hop")} == {"epoch": 3, "ordinal": 7, "hop": 1}
    (start,) = [event for event in events if event["ph"] == "s"]
    (end,) = [event for event in events if event["ph"] == "f"]
    assert (start["pid"], start["ts"]) == (1, steps[1]["ts"])
    assert (end["pid"], end["ts"]) == (2, steps[2]["ts"])
    assert start["id"] == end["id"]


def test_flips_are_instants_and_every_track_has_a_name() -> None:
    events = chrome_trace(make_run())["traceEvents"]
    (flip,) = [event for event in events if event["ph"] == "i"]
    assert flip["name"] == "first step of epoch 3"
    assert "dur" not in flip
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] != "M"} == set(names)
    assert names[2, 2] == "rpc"


# -- the table ------------------------------------------------------------------------------------------------


def test_the_shares_of_a_stage_are_its_whole_time() -> None:
    figures = breakdown(chrome_trace(make_run()))
    first, second = figures["stages"]
    for stage in (first, second):
        assert sum(stage["share_percent"].values()) == pytest.approx(100.0)
    assert first["share_percent"]["waiting"] == pytest.approx(20.0), "a wait counts from the recording's beginning on"
    assert first["share_percent"]["attention"] == pytest.approx(10.0)
    assert first["share_percent"]["sending"] == pytest.approx(10.0)
    assert first["off_processor_percent"] == pytest.approx(25.0)
    assert second["share_percent"]["products"] == pytest.approx(5.0), "the LM head is a product"
    assert second["share_percent"]["sampling"] == pytest.approx(5.0), "what remains of the sampling"
    assert (first["hop"], second["hop"]) == (0, 1)
    assert figures["head_cpu_us_per_token"] == pytest.approx(200.0)
    assert figures["spans_lost"] == 2
    run = {"workload": "c1", **figures}
    for table in (format_stages([run]), format_head([run])):
        rows = table.splitlines()
        assert len({row.count("|") for row in rows}) == 1, "every row has every column"
    assert all(name in format_stages([run]) for name in SHARES)


# -- over HTTP ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0, -1, 61, True, "3", None, 1e400])
async def test_a_length_that_makes_no_sense_is_refused(seconds: Any) -> None:
    async with serve(Text(None), [1]) as api:
        status, answer = await api.post("/admin/trace", raw=json.dumps({"seconds": seconds}).encode())
        assert status == 400, answer


async def test_a_trace_is_answered_as_the_picture() -> None:
    async with serve(Text(None), [1]) as api:
        api.engine.traces = [make_run()]
        status, answer = await api.post("/admin/trace", {"seconds": 0.5})
        assert status == 200
        assert answer["midflight"]["generated_tokens"] == 10
        assert [process["name"] for process in answer["midflight"]["processes"]] == ["head", "w0", "w1"]
        api.engine.refusal = Refused("a trace is being recorded already; try again when it has ended")
        status, answer = await api.post("/admin/trace", {"seconds": 0.5})
        assert (status, answer["error"]["code"]) == (409, "trace_under_way")

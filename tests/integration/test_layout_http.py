"""Changing the layout of a real server over HTTP and by the command line, with streams that must not notice."""

import asyncio
import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.integration.server import Server

PROMPTS = [[7 + 3 * index, 11, 13 + index] * 4 for index in range(4)]
NUM_TOKENS = 60
LONG = 6000
CONTEXT = 8192


@pytest.fixture(scope="module")
def own(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Three workers, two of which serve at first. Tests leave any layout behind, but no change under way."""
    folder = tmp_path_factory.mktemp("layouts")
    model = with_long_context(tiny_llama, folder)
    options = ("--layers", "2,2", "--local-workers", "3", "--dtype", "float32", "--kv-memory", "16M")
    with Server(model, *options, log=folder / "log") as server:
        wait_for(lambda: len(server.worker_pids()) == 3, "the third worker")
        yield server


def with_long_context(model: Path, folder: Path) -> Path:
    """A copy of `model` in `folder` that reads `CONTEXT` tokens."""
    copy = shutil.copytree(model, folder / "long-llama")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
    return copy


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.02)


async def until(condition: Callable[[], bool], what: str) -> None:
    await asyncio.to_thread(wait_for, condition, what)


async def generate(
    session: aiohttp.ClientSession, server: Server, prompt: list[int], num_tokens: int, into: list[int] | None = None
) -> list[int]:
    body = {
        "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "return_token_ids": True,
    }  # fmt: skip
    tokens = [] if into is None else into
    async with session.post(f"{server.url}/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                tokens += event["choices"][0]["token_ids"]
    return tokens


async def ask(session: aiohttp.ClientSession, method: str, url: str, body: Any = None) -> tuple[int, Any]:
    async with session.request(method, url, json=body) as response:
        return response.status, await response.json()


async def start_cli(server: Server, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "api.cli", *arguments, "--url", server.url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def end_of(process: asyncio.subprocess.Process) -> tuple[int, str, str]:
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def read_events(session: aiohttp.ClientSession, server: Server, into: list[dict[str, Any]]) -> None:
    async with session.get(f"{server.url}/admin/events", timeout=aiohttp.ClientTimeout(None)) as response:
        async for line in response.content:
            if line.startswith(b"data: "):
                into.append(json.loads(line[6:]))


def owners(server: Server) -> list[tuple[str, list[int]]]:
    return [(stage["worker"], stage["layers"]) for stage in server.get("/admin/layout")[1]["stages"]]


def report_of(server: Server, change: int) -> dict[str, Any]:
    return server.get(f"/admin/transitions/{change}")[1]


def metric(server: Server, name: str) -> float:
    match = re.search(rf"^{re.escape(name)} (\S+)$", server.get("/metrics")[1], re.MULTILINE)
    assert match, f"{name} is not in /metrics"
    return float(match[1])


# -- committed -----------------------------------------------------------------------------------------------


async def test_a_change_under_load_is_shown_and_not_felt(own: Server) -> None:
    (_, first_layers), (second, second_layers) = owners(own)
    assert (first_layers, second_layers) == ([0, 2], [2, 4])
    (idle,) = set(own.worker_pids()) - {worker for worker, _ in owners(own)}
    async with aiohttp.ClientSession() as session:
        expected = [await generate(session, own, prompt, NUM_TOKENS) for prompt in PROMPTS]
        events: list[dict[str, Any]] = []
        listening = asyncio.ensure_future(read_events(session, own, events))
        over = asyncio.Event()

        async def load(index: int) -> int:
            count = 0
            while not over.is_set():
                assert await generate(session, own, PROMPTS[index], NUM_TOKENS) == expected[index]
                count += 1
            return count

        streams = [asyncio.ensure_future(load(index)) for index in range(len(PROMPTS))]
        code, out, err = await end_of(await start_cli(own, "layout", f"{second}:0-1,{idle}:1-4"))
        assert code == 0, err
        code, _, err = await end_of(await start_cli(own, "layout", "3,1"))
        assert code == 0, err
        over.set()
        assert min(await asyncio.gather(*streams)) > 0
        listening.cancel()

    assert f"{second} [0, 1) | {idle} [1, 4)" in out
    assert "0 tokens recomputed, 0 requests dropped" in out
    assert owners(own) == [(second, [0, 3]), (idle, [3, 4])], "counts are for the workers that serve"
    assert events[0]["type"] == "layout"
    reports = [event["report"] for event in events if event["type"] == "report"]
    assert [report["outcome"] for report in reports] == ["committed", "committed"]
    for report in reports:
        shown = [event["transition"] for event in events if event.get("transition")]
        first = list(dict.fromkeys(view["phase"] for view in shown if view["id"] == report["id"]))
        assert first == [
            phase for phase in ("reserve", "prepare", "shadow", "copy", "flip", "retire") if phase in first
        ]
        assert {"shadow", "retire"} <= set(first)
        view = own.get(f"/admin/transitions/{report['id']}")[1]
        assert view == {**report, "progress": None}
        assert report["snapshot_bytes"] + report["mirror_bytes"] > 0
    assert metric(own, 'midflight_transitions_total{outcome="committed"}') == 2
    for kind in ("weight", "snapshot", "mirror"):
        total = metric(own, f'midflight_transition_bytes_total{{kind="{kind}"}}')
        assert total == sum(report[f"{kind}_bytes"] for report in reports), kind
    assert metric(own, "midflight_layout_epoch") == reports[-1]["target_epoch"]
    assert metric(own, f'midflight_worker_layers{{worker="{second}"}}') == 3
    assert own.audit()["problems"] == []


async def test_a_worker_is_drained(own: Server) -> None:
    name = owners(own)[0][0]
    status, report = own.post(f"/admin/workers/{name}/drain?wait=true", {})
    assert (status, report["outcome"]) == (200, "committed")
    assert name not in [worker for worker, _ in owners(own)]
    shown = {worker["name"]: worker for worker in own.get("/admin/workers")[1]["workers"]}
    workers = {worker: view["layers"] for worker, view in shown.items()}
    assert workers[name] == []
    assert [worker for worker, view in shown.items() if view["drained"]] == [name]
    rest = [worker for worker in shown if worker != name]
    stages = [{"worker": rest[0], "layers": [0, 3]}, {"worker": name, "layers": [3, 4]}]
    assert own.post("/admin/layout?wait=true", {"stages": stages})[1]["outcome"] == "committed"
    assert not any(worker["drained"] for worker in own.get("/admin/workers")[1]["workers"]), "it was named"
    assert sorted(layer for layers in workers.values() for layer in layers) == [0, 1, 2, 3]
    for action in ("drain", "resume"):
        status, answer = own.post(f"/admin/workers/w9/{action}", {})
        assert (status, answer["error"]["param"]) == (404, "worker")
    assert own.audit()["problems"] == []


# -- not committed -------------------------------------------------------------------------------------------


async def test_changes_are_refused_queued_and_aborted(own: Server) -> None:
    """The `drain` strategy begins when what runs has ended, so a long request holds a change where it can be aborted."""
    before = owners(own)
    layout, transitions = f"{own.url}/admin/layout", f"{own.url}/admin/transitions"
    aborted = metric(own, 'midflight_transitions_total{outcome="aborted"}')
    async with aiohttp.ClientSession() as session:
        tokens: list[int] = []
        long = asyncio.ensure_future(generate(session, own, PROMPTS[0], LONG, tokens))
        await until(lambda: len(tokens) > 0, "the first token")
        status, answer = await ask(session, "POST", layout, {"layers": [2, 2], "strategy": "drain"})
        assert status == 202
        first = answer["id"]
        status, answer = await ask(session, "POST", layout, {"layers": [1, 3]})
        assert (status, answer["error"]["code"]) == (409, "refused")
        assert f"/admin/transitions/{first}" in answer["error"]["message"]
        waiting = asyncio.ensure_future(ask(session, "POST", layout + "?wait=true", {"layers": [1, 3], "queue": True}))
        await until(lambda: report_of(own, first + 1).get("outcome") == "queued", "the queued change")
        assert (await ask(session, "DELETE", f"{transitions}/{first + 1}"))[0] == 200
        status, report = await asyncio.wait_for(waiting, 10)
        assert (status, report["id"], report["outcome"]) == (200, first + 1, "aborted")
        status, report = await ask(session, "DELETE", f"{transitions}/{first}")
        assert status == 200, report
        await until(lambda: report_of(own, first)["outcome"] != "running", "the abort")
        assert report_of(own, first)["outcome"] == "aborted"
        assert report_of(own, first)["why"] == "the operator aborted it"
        status, answer = await ask(session, "DELETE", f"{transitions}/{first}")
        assert (status, answer["error"]["code"]) == (409, "too_late")

        process = await start_cli(own, "layout", "2,2", "--strategy", "drain")
        assert process.stderr is not None
        assert b"reserve" in await asyncio.wait_for(process.stderr.readline(), 30)
        process.send_signal(signal.SIGINT)
        code, out, err = await end_of(process)
        assert code == 1, err
        assert "aborted after" in out, err
        assert not long.done(), "the request was to be long enough to hold the changes"
        so_far = len(tokens)
        await until(lambda: len(tokens) > so_far, "another token")
        long.cancel()
    assert owners(own) == before
    assert metric(own, 'midflight_transitions_total{outcome="aborted"}') == aborted + 3
    await until(lambda: own.get("/admin/stats")[1]["running"] == 0, "the end of the request")
    assert own.audit()["problems"] == []


@pytest.mark.parametrize(
    ("wish", "param", "said"),
    [
        ({"layers": [2, 3]}, "layers", "adds up to 5"),
        ({"layers": [1, 1, 1, 1]}, "layers", "3 workers are here"),
        ({"stages": [{"worker": "w9", "layers": [0, 4]}]}, "stages", "no worker 'w9'"),
        ({"stages": [{"worker": "w0", "layers": [0, 3]}]}, "stages", "covers 3 layers"),
        ({"stages": [{"worker": "w0", "layers": [0, 4], "x": 1}]}, "stages", "stages[0]: 'x'"),
        ({"layers": [2, 2], "strategy": "hope"}, "strategy", "stop-copy"),
        (
            {"layers": [2, 2], "bytes_per_s": 1},
            "bytes_per_s",
            "1 is not a whole number of bytes per second from 1,000,000",
        ),
        ({"layers": [2, 2], "bytes_per_s": 1 << 64}, "bytes_per_s", "to 1,000,000,000,000,000; leave it out"),
        ({"layers": [2, 2], "deadline_s": -1}, "deadline_s", "positive"),
        ({"layers": [2, 2], "deadline": 1}, "deadline", "deadline_s"),
        ({}, "layers", "stages"),
    ],
)
def test_what_makes_no_sense_is_400(own: Server, wish: dict[str, Any], param: str, said: str) -> None:
    before = own.get("/admin/layout")[1]
    status, answer = own.post("/admin/layout", wish)
    assert (status, answer["error"]["param"]) == (400, param)
    assert said in answer["error"]["message"]
    assert own.get("/admin/layout")[1] == before


# -- the end -------------------------------------------------------------------------------------------------


async def test_ctrl_c_ends_streams_events_and_processes(own: Server) -> None:
    """The last test: nothing that a client holds open keeps the server, and its end is no error."""
    assert own.process is not None
    async with aiohttp.ClientSession() as session:
        events: list[dict[str, Any]] = []
        listening = asyncio.ensure_future(read_events(session, own, events))
        await ask(session, "GET", f"{own.url}/health")  # its connection stays open and idle
        body = {"prompt": PROMPTS[0], "max_tokens": LONG, "ignore_eos": True, "stream": True}
        async with session.post(f"{own.url}/v1/completions", json=body) as response:
            await response.content.readline()
            tree = own.tree()
            own.process.send_signal(signal.SIGINT)
            rest = (await asyncio.wait_for(response.content.read(), 30)).decode()
        assert "shutting down" in rest
        assert rest.endswith("data: [DONE]\n\n")
        await asyncio.wait_for(listening, 30)
    assert await asyncio.to_thread(own.process.wait, 30) == 0
    _, alive = psutil.wait_procs(tree, timeout=10)
    assert not alive
    log = own.log_text()
    assert "stopping" in log
    assert "error" not in log.lower(), log
    assert "tensorpipe" not in log.lower(), log


def test_who_waits_for_a_change_hears_that_the_server_ends(tiny_llama: Path, tmp_path: Path) -> None:
    model = with_long_context(tiny_llama, tmp_path)
    options = ("--layers", "2,2", "--dtype", "float32", "--kv-memory", "16M")
    with Server(model, *options, log=tmp_path / "log") as server, ThreadPoolExecutor(2) as pool:
        request = {"prompt": [1, 2, 3], "max_tokens": LONG, "ignore_eos": True}
        running = pool.submit(server.post, "/v1/completions", request)
        wait_for(lambda: server.get("/admin/stats")[1]["running"] == 1, "the request")
        wish = {"layers": [1, 3], "strategy": "drain"}
        waiting = pool.submit(server.post, "/admin/layout?wait=true", wish)
        wait_for(lambda: server.get("/admin/layout")[1]["transition"] is not None, "the change")
        assert server.process is not None
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: server.get("/health")[1]["status"] == "draining", "draining")
        assert server.stop() == 0, "the second signal cuts the request off"
        status, answer = waiting.result(10)
        assert (status, answer["error"]["code"]) == (503, "shutting_down"), answer
        assert "transition 1 " in answer["error"]["message"]
        assert running.result(10)[0] == 500

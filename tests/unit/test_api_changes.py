"""Asking for another layout over HTTP: what the engine is asked, what comes back, and the events meanwhile."""

import asyncio
import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from api.events import EventBuffer
from api.page_script import SCRIPT
from api.text import Text
from scheduler.transition import Refused
from scheduler.wishes import LayoutError
from tests.tiny_models import build_tokenizer
from tests.unit.api_harness import Api, serve


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    async with serve(Text(build_tokenizer()), [1], heartbeat_s=0.05) as running:
        yield running


class Events:
    """An open event stream, read as a browser would."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def line(self) -> str:
        async with asyncio.timeout(10):
            while text := (await self._response.content.readline()).decode():
                if text != "\n":
                    return text.rstrip("\n")
        return ""

    async def next(self) -> dict[str, Any] | None:
        """The next event; None at the end."""
        while line := await self.line():
            if line.startswith("data: "):
                return json.loads(line[6:])
        return None


# -- changes -------------------------------------------------------------------------------------------------


async def test_a_change_is_accepted_followed_and_reported(api: Api) -> None:
    wish = {"layers": [1, 3], "strategy": "drain", "queue": True, "deadline_s": 2.5, "bytes_per_s": 1000}
    async with api.client.post(f"{api.url}/admin/layout", json=wish) as response:
        assert response.status == 202
        assert await response.json() == {"id": 1, "outcome": "running"}
        assert response.headers["Location"] == "/admin/transitions/1"
    assert api.engine.wishes == [wish]
    status, body = await api.get("/admin/transitions/1")
    assert (status, json.loads(body)["outcome"]) == (200, "running")
    await api.post("/admin/layout", {"stages": [{"worker": "w0", "layers": [0, 4]}]})
    api.engine.end_change(1, "committed", total_s=1.5)
    _, body = await api.get("/admin/transitions")
    assert [(view["id"], view["outcome"]) for view in json.loads(body)["transitions"]] == [
        (2, "running"),
        (1, "committed"),
    ]


@pytest.mark.parametrize("outcome", ["committed", "aborted", "refused"])
async def test_waiting_gives_the_report_whatever_became_of_it(api: Api, outcome: str) -> None:
    waiting = asyncio.ensure_future(api.post("/admin/layout?wait=true", {"layers": [1, 3]}))
    await api.until(lambda: api.engine.wishes)
    assert not waiting.done()
    api.engine.end_change(1, outcome, why="because")
    status, body = await waiting
    assert (status, body["id"], body["outcome"], body["why"]) == (200, 1, outcome, "because")


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        (b"[1]", None, "JSON object"),
        (b"{", None, "not JSON"),
        (b"\xff", None, "not JSON"),
        (b'{"layer": [1, 3]}', "layer", "layers, stages, strategy"),
    ],
)
async def test_a_body_that_makes_no_sense_never_reaches_the_engine(
    api: Api, body: bytes, param: str | None, said: str
) -> None:
    status, answer = await api.post("/admin/layout", raw=body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert said in answer["error"]["message"]
    status, answer = await api.post("/admin/layout?wait=perhaps", {"layers": [1, 3]})
    assert (status, answer["error"]["param"]) == (400, "wait")
    assert api.engine.wishes == []


async def test_what_the_engine_refuses(api: Api) -> None:
    api.engine.refusal = LayoutError("layers: adds up to 5" + "!" * 10_000, "layers")
    status, answer = await api.post("/admin/layout", {"layers": [1, 4]})
    assert (status, answer["error"]["param"], answer["error"]["type"]) == (400, "layers", "invalid_request_error")
    assert len(answer["error"]["message"]) < 1000
    long = "no room. This much of it fits: " + ",".join(f"w{layer % 3}:{layer}-{layer + 1}" for layer in range(200))
    api.engine.refusal = Refused(long)
    _, answer = await api.post("/admin/layout", {"layers": [1, 3]})
    assert answer["error"]["message"] == long, "what fits is at its end"
    api.engine.refusal = Refused("transition 7 is under way")
    status, answer = await api.post("/admin/layout?wait=true", {"layers": [1, 3]})
    assert (status, answer["error"]["code"]) == (409, "refused")
    assert "transition 7" in answer["error"]["message"]


async def test_a_worker_is_drained(api: Api) -> None:
    assert await api.post("/admin/workers/w1/drain", raw=b"") == (202, {"id": 1, "outcome": "running"})
    assert await api.post("/admin/workers/w1/drain", {"strategy": "live"}) == (202, {"id": 2, "outcome": "running"})
    assert api.engine.wishes == [{"drain": "w1"}, {"drain": "w1", "strategy": "live"}]
    status, answer = await api.post("/admin/workers/w1/drain", {"layers": [4]})
    assert (status, answer["error"]["param"]) == (400, "layers")
    api.engine.refusal = LayoutError("there is no worker 'w9'; there are w0, w1", "worker")
    for action in ("drain", "resume"):
        status, answer = await api.post(f"/admin/workers/w9/{action}", {})
        assert (status, answer["error"]["param"]) == (404, "worker")


async def test_aborting_in_time_too_late_and_nothing(api: Api) -> None:
    async def ask(method: str, path: str) -> tuple[int, Any]:
        async with api.client.request(method, api.url + path) as response:
            return response.status, await response.json()

    for _ in range(3):
        await api.post("/admin/layout", {"layers": [1, 3]})
    status, report = await ask("DELETE", "/admin/transitions/1")
    assert (status, report["outcome"]) == (200, "aborted")
    status, answer = await ask("DELETE", "/admin/transitions/1")
    assert (status, answer["error"]["code"]) == (409, "too_late")
    assert "aborted" in answer["error"]["message"]
    api.engine.reports[2]["phases_s"] = {"flip": 0.1}
    status, answer = await ask("DELETE", "/admin/transitions/2")
    assert status == 409
    assert "flip" in answer["error"]["message"]
    for unknown in ("9", "x", "-1", "9" * 40, "%C2%B2"):
        for method in ("GET", "DELETE"):
            status, answer = await ask(method, f"/admin/transitions/{unknown}")
            assert (status, answer["error"]["code"]) == (404, "transition_not_found"), unknown


async def test_a_page_from_elsewhere_changes_nothing(api: Api) -> None:
    """A browser sends an operator's cached password along with a foreign page's form; the origin tells them apart."""
    for origin in ("https://evil.example", "null", f"http://127.0.0.1:{api.port + 1}"):
        status, answer = await api.post("/admin/layout", {"layers": [1, 3]}, headers={"Origin": origin})
        assert (status, answer["error"]["code"]) == (403, "foreign_origin")
    assert api.engine.wishes == []
    status, _ = await api.post("/admin/layout", {"layers": [1, 3]}, headers={"Origin": api.url})
    assert status == 202


async def test_the_admin_key_guards_changes() -> None:
    async with serve(Text(build_tokenizer()), [1], admin_key="a") as api:
        for method, path in (
            ("POST", "/admin/layout"), ("GET", "/admin/transitions"), ("GET", "/admin/transitions/1"), ("DELETE", "/admin/transitions/1"),
            ("POST", "/admin/workers/w0/drain"), ("POST", "/admin/workers/w0/resume"), ("GET", "/admin/events"), ("GET", "/"),
        ):  # fmt: skip
            async with api.client.request(method, api.url + path) as response:
                assert response.status == 401, path
        assert api.engine.wishes == []


# -- events --------------------------------------------------------------------------------------------------


async def test_events_begin_with_the_layout_and_come_as_they_happen(api: Api) -> None:
    async with api.client.get(f"{api.url}/admin/events") as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        events = Events(response)
        assert await events.next() == {"type": "layout", "layout": api.engine.layout_view()}
        assert await events.line() == ": alive"
        api.engine.tell({"type": "note", "level": "info", "text": "é\n"})
        api.engine.tell({"type": "transition", "transition": None})
        assert await events.next() == {"type": "note", "level": "info", "text": "é\n"}
        assert await events.next() == {"type": "transition", "transition": None}
    before = len(api.engine.listeners)
    await api.until(lambda: len(api.engine.listeners) == before - 1)
    assert api.metrics.client_disconnects == 0, "an operator's page is no aborted request"


async def test_streams_end_when_the_server_stops() -> None:
    async with serve(Text(build_tokenizer()), [1]) as api, api.client.get(f"{api.url}/admin/events") as response:
        events = Events(response)
        await events.next()
        api.engine.tell({"type": "note", "level": "info", "text": "last"})
        stopping = asyncio.ensure_future(api.stop())
        assert await events.next() == {"type": "note", "level": "info", "text": "last"}
        assert await events.next() is None
        await asyncio.wait_for(stopping, 1.5)


async def test_a_slow_reader_loses_the_oldest_and_is_told() -> None:
    buffer = EventBuffer(max_events=3)
    for number in range(5):
        buffer.put({"type": "note", "text": str(number)})
    events = await buffer.take(1.0)
    assert events is not None
    assert [event.get("text", event.get("num_events")) for event in events] == [2, "2", "3", "4"]
    assert await buffer.take(0.001) == []
    buffer.put({"type": "note", "text": "end"})
    buffer.close()
    assert await buffer.take(1.0) == [{"type": "note", "text": "end"}]
    assert await buffer.take(1.0) is None


# -- metrics -------------------------------------------------------------------------------------------------


async def test_changes_are_counted(api: Api) -> None:
    for _ in range(3):
        await api.post("/admin/layout", {"layers": [1, 3]})
    pauses = {"max": 4.0, "p50": 1.5, "p99": 3.5, "count": 8.0}
    sums = {"weight_bytes": 1000, "snapshot_bytes": 20, "mirror_bytes": 3, "sequences_flipped": 5}
    sums |= {"fence_waits": 2, "fence_wait_ms": 250.0}
    phases = {"shadow": 1.25, "flip": 0.25}
    api.engine.end_change(2, "committed", total_s=9.0, **sums)
    api.engine.end_change(1, "committed", total_s=1.5, engine_pause_ms=pauses, phases_s=phases, **sums)
    _, text = await api.get("/metrics")
    for line in (
        'midflight_transitions_total{outcome="committed"} 2.0',
        'midflight_transitions_total{outcome="aborted"} 0.0',
        'midflight_transition_bytes_total{kind="weight"} 2000.0',
        'midflight_transition_bytes_total{kind="snapshot"} 40.0',
        'midflight_transition_bytes_total{kind="mirror"} 6.0',
        "midflight_transition_sequences_flipped_total 10.0",
        "midflight_transition_fence_waits_total 4.0",
        "midflight_transition_fence_wait_seconds_total 0.5",
        "midflight_transition_dropped_requests_total 0.0",
        "midflight_last_transition_seconds 1.5",
        'midflight_last_transition_phase_seconds{phase="shadow"} 1.25',
        'midflight_last_transition_pause_seconds{statistic="p99"} 0.0035',
        'midflight_last_transition_pause_seconds{statistic="p50"} 0.0015',
        'midflight_last_transition_pause_seconds{statistic="max"} 0.004',
        "midflight_layout_epoch 1.0",
        "midflight_transition_active 0.0",
        'midflight_worker_layers{worker="w0"} 3.0',
    ):
        assert line in text.splitlines(), line


# -- the page ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's script")
def test_the_page_shows_no_rate_over_no_time() -> None:
    """Nothing at the first look, and over the milliseconds between two looks not what a burst of tokens would come to."""
    rates = re.search(r"function rates\(.*?\n}\n", SCRIPT, re.DOTALL)
    least = re.search(r"const LEAST_S = .*", SCRIPT)
    assert rates is not None
    assert least is not None
    looks = [(0, 9000), (0.005, 9022), (1.0, 9100), (1.002, 9120), (3.0, 9300), (4.0, 10), (5.0, 40)]
    program = f"""
        let before = null, lastRate = null, change = null, lingerUntil = 0, now_s = 0;
        const samples = [], KEPT_SAMPLES = 120, LINGER_MS = 0, performance = {{now: () => 1000 * now_s}};
        {least[0]}
        {rates[0]}
        const said = {json.dumps(looks)}.map(([at_s, tokens]) => {{
            now_s = at_s;
            const rate = rates({{generated_tokens: tokens, prompt_tokens: 0, stages: []}});
            return rate && rate.out;
        }});
        console.log(JSON.stringify([said, samples.length]));
    """
    ran = subprocess.run(["node", "-e", program], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(ran.stdout) == [[None, None, 100, 100, 100, None, 30], 3]


async def test_the_page_runs_its_own_script_and_nothing_else(api: Api) -> None:
    async with api.client.get(api.url + "/") as response:
        page, policy = await response.text(), response.headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.findall(r"""(?:src|href)=["']?https?:|style=|\son\w+=|innerHTML""", page)
    ids = set(re.findall(r'\sid="([\w-]+)"', page))
    used = set(re.findall(r'\bat\("([\w-]+)"\)', page))
    assert used - ids == set(), "the script asks for elements that are not there"

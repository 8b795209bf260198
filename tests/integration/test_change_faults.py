"""Changes that wait, fail and stop everything, with real processes: streams run on, token-equal, and the report says why.

One server with four workers, of which w0, w1 and w2 serve at first. w3 is stopped (SIGSTOP) at once, so that its eviction is due
when the first test has ended; from then on it is the idle worker that changes are to take in. The tests build on each other.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.integration.links import break_link
from tests.integration.server import Server
from tests.integration.test_layout_http import (
    LONG,
    PROMPTS,
    ask,
    end_of,
    generate,
    owners,
    report_of,
    start_cli,
    until,
    wait_for,
    with_long_context,
)

NUM_TOKENS = 250
DEADLINE_S = 6
"""Time enough for an idle worker to come to load, and less than until its eviction."""


class Faulty(Server):
    """The server, where its model lies, and what it says while nothing happens to it."""

    folder: Path
    stopped: int
    expected: list[list[int]]

    def idle(self) -> str:
        """The present name of the worker that was w3."""
        (name,) = [name for name in self.worker_pids() if name.startswith("w3")]
        return name

    def transition(self) -> dict[str, Any] | None:
        return self.get("/admin/layout")[1]["transition"]

    def num_tokens(self) -> int:
        return self.get("/admin/stats")[1]["generated_tokens"]


@pytest.fixture(scope="module")
def faulty(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    folder = tmp_path_factory.mktemp("faults")
    model = with_long_context(tiny_llama, folder)
    options = ("--layers", "2,1,1", "--local-workers", "4", "--dtype", "float32", "--kv-memory", "16M")
    with Faulty(model, *options, log=folder / "log") as server:
        server.folder = model
        wait_for(lambda: len(server.worker_pids()) == 4, "the fourth worker", 60.0)
        stages = [{"worker": f"w{index}", "layers": layers} for index, layers in enumerate(([0, 2], [2, 3], [3, 4]))]
        status, answer = server.post("/admin/layout?wait=true", {"stages": stages})  # w3 may have joined before another
        assert (status, answer["outcome"]) == (200, "committed"), answer
        server.expected = asyncio.run(undisturbed(server))
        server.stopped = server.worker_pids()["w3"]
        os.kill(server.stopped, signal.SIGSTOP)
        yield server
        assert server.audit()["problems"] == []


async def undisturbed(server: Server) -> list[list[int]]:
    async with aiohttp.ClientSession() as session:
        return list(await asyncio.gather(*(generate(session, server, prompt, NUM_TOKENS) for prompt in PROMPTS)))


@contextlib.asynccontextmanager
async def streams(server: Faulty) -> AsyncIterator[aiohttp.ClientSession]:
    """Streams that run all the while. Each must end without an error and say what it always says."""
    over = asyncio.Event()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120.0)) as session:

        async def repeat(index: int) -> None:
            while not over.is_set():
                assert await generate(session, server, PROMPTS[index], NUM_TOKENS) == server.expected[index]

        async with asyncio.TaskGroup() as group:
            for index in range(len(PROMPTS)):
                group.create_task(repeat(index))
            try:
                await goes_on(server)
                yield session
            finally:
                over.set()


async def goes_on(server: Faulty) -> None:
    """Tokens come, right now."""
    before = await asyncio.to_thread(server.num_tokens)
    await until(lambda: server.num_tokens() > before + 50, "more tokens")


async def ask_for(session: aiohttp.ClientSession, server: Server, wish: dict[str, Any], path: str = "layout") -> int:
    status, answer = await ask(session, "POST", f"{server.url}/admin/{path}", wish)
    assert status == 202, answer
    return answer["id"]


async def report(server: Server, change: int) -> dict[str, Any]:
    """Of a change, once it has ended."""
    await until(
        lambda: report_of(server, change)["outcome"] not in ("queued", "running"), f"the end of change {change}"
    )
    return report_of(server, change)


async def stop_in_shadow(session: aiohttp.ClientSession, server: Faulty, **options: Any) -> tuple[int, int]:
    """Have the idle worker take the last layer in, and stop it (SIGSTOP) while it loads; the change and the process."""
    name, first = server.idle(), owners(server)[0][0]
    pid = server.worker_pids()[name]
    stages = [{"worker": first, "layers": [0, 3]}, {"worker": name, "layers": [3, 4]}]
    change = await ask_for(session, server, {"stages": stages, **options})

    def is_loading() -> bool:
        view = server.transition()
        assert view is not None, server.log_text()
        assert view["phase"] in ("reserve", "prepare", "shadow"), view
        return view["phase"] == "shadow"

    await until(is_loading, "the shadow")
    os.kill(pid, signal.SIGSTOP)
    view = server.transition()
    assert view is not None
    assert (view["id"], view["phase"]) == (change, "shadow")
    assert name in view["loading"], "the others may not have said yet that nothing is to come"
    return change, pid


# -- waiting changes -----------------------------------------------------------------------------------------


async def test_queued_wishes_are_for_the_layout_that_they_find(faulty: Faulty) -> None:
    """Two workers are drained in a row, and counts that wait behind are for those that serve then, and may serve."""
    async with streams(faulty) as session:
        long = asyncio.ensure_future(generate(session, faulty, PROMPTS[0], LONG))
        await goes_on(faulty)
        holding = await ask_for(session, faulty, {"layers": [1, 2, 1], "strategy": "drain"})
        queued = [
            await ask_for(session, faulty, {"queue": True}, "workers/w0/drain"),
            await ask_for(session, faulty, {"queue": True}, "workers/w1/drain"),
            await ask_for(session, faulty, {"queue": True, "layers": [2, 1, 1]}),
            await ask_for(session, faulty, {"queue": True, "layers": [4]}),
        ]
        status, answer = await ask(session, "POST", f"{faulty.url}/admin/layout", {"queue": True, "layers": [3, 2]})
        assert (status, answer["error"]["param"]) == (400, "layers"), "what makes no sense is not queued"
        assert [report_of(faulty, change)["outcome"] for change in queued] == ["queued"] * 4
        assert not long.done()
        long.cancel()
        reports = [await report(faulty, change) for change in (holding, *queued)]
    assert [ended["outcome"] for ended in reports] == ["committed"] * 3 + ["refused", "committed"]
    assert "3 stages are asked for" in reports[3]["why"]
    assert reports[3]["why"].endswith("; w0, w1 drained: resume it, or name it in a layout")
    reached = [[stage["worker"] for stage in ended["reached"]] for ended in reports]
    assert reached == [["w0", "w1", "w2"], ["w1", "w2"], ["w2"], ["w2"], ["w2"]]
    status, answer = faulty.post("/admin/layout?wait=true", {"layers": [2, 1, 1]})
    assert (status, answer["error"]["param"]) == (400, "layers"), "both are drained"
    assert faulty.post("/admin/workers/w0/resume", {}) == (200, {"name": "w0", "drained": False})
    assert faulty.post("/admin/layout?wait=true", {"layers": [3, 1]})[1]["outcome"] == "committed"
    assert owners(faulty) == [("w2", [0, 3]), ("w0", [3, 4])]
    epoch = faulty.get("/admin/layout")[1]["epoch"]
    for wish in ({"layers": [3, 1]}, {"layers": [3, 1], "strategy": "stop-copy"}):
        status, ended = faulty.post("/admin/layout?wait=true", wish)
        assert (status, ended["outcome"], ended["why"]) == (200, "committed", "the layout was this one already")
        assert (ended["target_epoch"], ended["phases_s"], ended["blocks_copied"]) == (epoch, {}, 0)
    status, ended = faulty.post("/admin/workers/w1/drain?wait=true", {})
    assert (status, ended["outcome"], ended["target_epoch"]) == (200, "committed", epoch), "w1 serves nothing"
    assert faulty.get("/admin/layout")[1]["epoch"] == epoch
    assert {worker["name"] for worker in faulty.get("/admin/workers")[1]["workers"] if worker["drained"]} == {"w1"}
    faulty.post("/admin/workers/w1/resume", {})


def test_a_worker_that_stood_still_starts_again(faulty: Faulty) -> None:
    wait_for(lambda: "w3" not in faulty.worker_pids(), "the eviction")
    os.kill(faulty.stopped, signal.SIGCONT)
    wait_for(lambda: "w3-r1" in faulty.worker_pids(), "its return", 60.0)
    log = faulty.log_text()
    assert "worker w3 is lost: no heartbeat for 15 s" in log
    assert "the head lives and has given this worker up" in log
    assert "worker w3-r1 joined" in log


# -- before the first flip -----------------------------------------------------------------------------------


async def test_a_target_that_dies_in_the_shadow(faulty: Faulty) -> None:
    before = faulty.get("/admin/layout")[1]
    async with streams(faulty) as session:
        name = faulty.idle()
        change, pid = await stop_in_shadow(session, faulty)
        await goes_on(faulty)
        os.kill(pid, signal.SIGKILL)
        ended = await report(faulty, change)
        assert (ended["outcome"], ended["why"]) == ("aborted", f"worker {name} was lost before anything had flipped")
        await goes_on(faulty)
        assert faulty.get("/admin/layout")[1] == before
        await asyncio.to_thread(wait_for, lambda: "w3-r2" in faulty.worker_pids(), "its return", 60.0)


async def test_a_checkpoint_that_has_vanished(faulty: Faulty) -> None:
    before = faulty.get("/admin/layout")[1]
    weights = faulty.folder / "model.safetensors"
    name, first = faulty.idle(), owners(faulty)[0][0]
    async with streams(faulty) as session:
        kept = weights.rename(faulty.folder / "kept")
        try:
            stages = [{"worker": first, "layers": [0, 3]}, {"worker": name, "layers": [3, 4]}]
            ended = await report(faulty, await ask_for(session, faulty, {"stages": stages}))
        finally:
            kept.rename(weights)
        assert ended["outcome"] == "aborted"
        assert ended["why"].startswith(f"{name}: ModelError: "), ended["why"]
        assert str(faulty.folder) in ended["why"]
        await goes_on(faulty)
    assert faulty.get("/admin/layout")[1] == before


async def test_a_deadline_that_passes_in_the_shadow(faulty: Faulty) -> None:
    """While the change goes back it may be aborted as often as one likes; what it says is that its deadline passed."""
    before = faulty.get("/admin/layout")[1]
    async with streams(faulty) as session:
        change, pid = await stop_in_shadow(session, faulty, deadline_s=DEADLINE_S)
        await goes_on(faulty)
        await until(lambda: (faulty.transition() or {})["phase"] == "abort", "the deadline")
        for _ in range(2):
            status, answer = await ask(session, "DELETE", f"{faulty.url}/admin/transitions/{change}")
            assert (status, answer["id"], answer["outcome"]) == (200, change, "running")
        await goes_on(faulty)
        os.kill(pid, signal.SIGCONT)
        ended = await report(faulty, change)
        assert (ended["outcome"], ended["why"]) == (
            "aborted",
            f"its deadline of {DEADLINE_S} s has passed in phase shadow",
        )
        status, answer = await ask(session, "DELETE", f"{faulty.url}/admin/transitions/{change}")
        assert (status, answer["error"]["code"]) == (409, "too_late")
        await goes_on(faulty)
    assert faulty.get("/admin/layout")[1] == before


# -- the other strategies, to the end ------------------------------------------------------------------------


async def test_stop_copy_and_recompute_change_no_token(faulty: Faulty) -> None:
    name, first = faulty.idle(), owners(faulty)[0][0]
    async with streams(faulty):
        code, out, err = await end_of(
            await start_cli(faulty, "layout", f"{first}:0-1,{name}:1-3,w1:3-4", "--strategy", "stop-copy")
        )
        assert code == 0, err
        assert "all steps stopped for" in out
        await goes_on(faulty)
        view = faulty.get("/admin/layout")[1]
        assert [stage["implementation"] for stage in view["stages"]] == ["lean"] * 3
        idle = [worker for worker in faulty.get("/admin/workers")[1]["workers"] if not worker["layers"]]
        assert [(worker["name"], worker["units_loaded"], worker["units_total"]) for worker in idle] == [("w0", 0, 0)]
        code, out, err = await end_of(
            await start_cli(faulty, "layout", f"w0:0-2,{name}:2-4", "--strategy", "recompute")
        )
        assert code == 0, err
        assert "had been prefilled again, for how long is not measured" in out
        await goes_on(faulty)
    recomputed, copied = faulty.get("/admin/transitions")[1]["transitions"][:2]
    assert (copied["strategy"], copied["recomputed_tokens"], copied["dropped_requests"]) == ("stop-copy", 0, 0)
    assert copied["blocks_copied"] > 0
    assert copied["snapshot_bytes"] > 0
    assert (recomputed["strategy"], recomputed["blocks_copied"]) == ("recompute", 0)
    assert (recomputed["snapshot_bytes"], recomputed["dropped_requests"]) == (0, 0)
    assert recomputed["recomputed_tokens"] > 0
    assert owners(faulty) == [("w0", [0, 2]), (name, [2, 4])]


# -- links that break, between workers that live -------------------------------------------------------------


async def test_a_link_to_a_worker_that_joins_is_gone(faulty: Faulty) -> None:
    """The change is aborted, no step was held up; the worker joins again, and then the same change is made."""
    before = faulty.get("/admin/layout")[1]
    pids = faulty.worker_pids()
    (_, _), (last, _) = owners(faulty)
    async with streams(faulty) as session:
        assert break_link(pids["w0"], pids["w1"]), "they served together before"
        await goes_on(faulty)
        text = f"w0:0-1,w1:1-2,{last}:2-4"
        code, out, _ = await end_of(await start_cli(faulty, "layout", text))
        assert code != 0
        assert "w1 cannot be reached" in out, out
        await goes_on(faulty)
        assert faulty.get("/admin/layout")[1] == before
        await asyncio.to_thread(wait_for, lambda: "w1-r1" in faulty.worker_pids(), "its return", 60.0)
        wish = {"stages": [{"worker": w, "layers": r} for w, r in (("w0", [0, 1]), ("w1-r1", [1, 2]), (last, [2, 4]))]}
        ended = await report(faulty, await ask_for(session, faulty, wish))
        assert (ended["outcome"], ended["recomputed_tokens"]) == ("committed", 0)
        await goes_on(faulty)


async def test_a_link_of_the_pipeline_is_gone(faulty: Faulty) -> None:
    """Streams wait until the one that cannot be reached has joined again, and go on with what they would have said."""
    (first, _), (second, _), *_ = owners(faulty)
    pids = faulty.worker_pids()
    async with streams(faulty):
        assert break_link(pids[first], pids[second])
        await asyncio.to_thread(wait_for, lambda: second not in faulty.worker_pids(), "its end", 60.0)
        await asyncio.to_thread(faulty.await_health)
        await goes_on(faulty)
    assert pids[first] == faulty.worker_pids()[first]
    log = faulty.log.read_text(errors="replace")  # all of it: every message that was on its way is warned of after that
    assert f"worker {second} is lost: {first} cannot reach it" in log

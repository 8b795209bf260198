"""Pages and weights share a worker's memory: a change of layout moves pages with the weights, and no stream notices."""

import asyncio
from pathlib import Path
from typing import Any

from tests.integration.server import Server
from tests.integration.test_layout_http import wait_for

BODIES = [
    {"prompt": [7 + 3 * index, 11, 13] * 5, "max_tokens": 150, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    for index in range(5)
]  # fmt: skip


def pages(server: Server) -> dict[str, int]:
    _, body = server.get("/admin/layout")
    return {stage["worker"]: stage["kv_pages"] for stage in body["stages"]}


def told(answers: list[Any]) -> list[list[int]]:
    return [answer["choices"][0]["token_ids"] for answer in answers]


async def test_pages_go_where_weights_leave(tiny_llama: Path, tmp_path: Path) -> None:
    options = ("--layers", "2,2", "--local-workers", "3", "--dtype", "float32")
    with Server(tiny_llama, *options, log=tmp_path / "log") as server:
        await check_pages_follow(server)


async def check_pages_follow(server: Server) -> None:
    """Change the layout of a server of four layers on two of three workers, under load."""
    wait_for(lambda: len(server.worker_pids()) == 3, "the third worker")
    at_first = pages(server)
    first, second = at_first
    (third,) = server.worker_pids().keys() - at_first.keys()
    expected = told(await server.post_all("/v1/completions", BODIES))
    load = asyncio.ensure_future(server.post_all("/v1/completions", BODIES))
    await asyncio.sleep(0.1)
    await change(server, (first, 0, 1), (second, 1, 4))
    moved = pages(server)
    assert moved[first] > at_first[first], "the layer that left makes room for pages"
    assert moved[second] < at_first[second], "the layer that came takes it"
    left, came = moved[first] - at_first[first], at_first[second] - moved[second]
    assert abs(left - came) <= 1, "a layer takes as many pages as it leaves"
    await change(server, (first, 0, 2), (third, 2, 4))
    assert pages(server)[first] == at_first[first], "there and back is where it began"
    await change(server, (first, 0, 2), (second, 2, 4))
    assert pages(server) == at_first, "also of a worker that had been emptied"
    assert told(await load) == told(await server.post_all("/v1/completions", BODIES)) == expected
    assert server.audit()["problems"] == []


async def change(server: Server, *stages: tuple[str, int, int]) -> None:
    wish = {"stages": [{"worker": name, "layers": [start, stop]} for name, start, stop in stages]}
    status, report = await asyncio.to_thread(server.post, "/admin/layout?wait=true", wish)
    assert (status, report["outcome"]) == (200, "committed"), report

"""A pool too small for both layouts at once, on real processes: the change goes in hops, or is refused with what is missing."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

from tests.integration.server import Server
from tests.integration.test_layout_http import until, wait_for

BLOCK_SIZE, NUM_PAGES = 16, 330
"""Blocks: 165 with two of the four layers, 110 with three, 82 with all."""


def page_bytes(model: Path) -> int:
    config = json.loads((model / "config.json").read_text())
    return 2 * BLOCK_SIZE * config["num_key_value_heads"] * config["head_dim"] * 4


def bodies(count: int, num_tokens: int) -> list[dict[str, Any]]:
    return [
        {"prompt": [7 + index, *[11 + index % 3, 13] * 200], "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        for index in range(count)
    ]  # fmt: skip


def tokens(answers: list[Any]) -> list[list[int]]:
    return [answer["choices"][0]["token_ids"] for answer in answers]


async def test_full_workers_change_places_in_hops_or_say_what_is_missing(tiny_llama: Path, tmp_path: Path) -> None:
    memory = str(NUM_PAGES * page_bytes(tiny_llama))
    options = ("--layers", "2,2", "--dtype", "float32", "--kv-memory", memory, "--no-prefix-cache")
    with Server(tiny_llama, *options, log=tmp_path / "log") as server:
        _, before = server.get("/admin/layout")
        first, second = (stage["worker"] for stage in before["stages"])
        assert [stage["kv_pages"] for stage in before["stages"]] == [NUM_PAGES] * 2
        swapped = {"stages": [{"worker": second, "layers": [0, 2]}, {"worker": first, "layers": [2, 4]}]}
        wait_for(lambda: server.get("/health")[0] == 200, "health")

        expected = tokens(await server.post_all("/v1/completions", bodies(3, 110)))
        load = asyncio.ensure_future(server.post_all("/v1/completions", bodies(3, 110)))
        await until(lambda: blocks_in_use(server) >= 75, "three prompts in service")
        status, report = await asyncio.to_thread(server.post, "/admin/layout?wait=true", swapped)
        assert (status, report["outcome"]) == (200, "committed"), report
        assert report["num_hops"] > 1
        assert report["recomputed_tokens"] == 0
        assert report["reached"] == report["target"]
        assert tokens(await load) == expected

        expected = tokens(await server.post_all("/v1/completions", bodies(5, 110)))
        load = asyncio.ensure_future(server.post_all("/v1/completions", bodies(5, 110)))
        await until(lambda: blocks_in_use(server) >= 125, "five prompts in service")
        back = {"stages": [{"worker": first, "layers": [0, 2]}, {"worker": second, "layers": [2, 4]}]}
        status, body = await asyncio.to_thread(server.post, "/admin/layout", back)
        message = body["error"]["message"]
        assert status == 409, body
        assert "can be made with 110 at most (1760 tokens), even one layer at a time" in message
        assert "has pages for 110 blocks of 3 layers" in message
        assert "MiB of --kv-memory too few" in message
        _, after = server.get("/admin/layout")
        assert [stage["worker"] for stage in after["stages"]] == [second, first], "nothing has changed"
        assert after["transition"] is None
        assert tokens(await load) == expected
        assert server.audit()["problems"] == []


def blocks_in_use(server: Server) -> int:
    _, text = server.get("/metrics")
    used = re.search(r'midflight_kv_blocks\{state="used"\} (\S+)', text)
    assert used is not None, text
    return int(float(used[1]))

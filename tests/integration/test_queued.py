"""Real workers that treat the processor as a device whose work is queued (`tests/integration/queued`), beside workers that do not.

Steps are planned, and results sent, while another step is waited for; on CUDA it is the same code. Their kernels are those of the processor, so
nothing may differ by a bit.
"""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from tests.integration.server import Server
from tests.integration.test_equality import make_prompts
from tests.integration.test_layout_http import wait_for
from tests.integration.test_room import change

OPTIONS = (
    "--dtype",
    "float32",
    "--kv-memory",
    "16M",
    "--step-tokens",
    "24",
    "--block-size",
    "8",
    "--local-workers",
    "3",
)
SITE = Path(__file__).parent / "queued"


def bodies(count: int = 12, num_tokens: int = 60) -> list[dict[str, Any]]:
    """Greedy ones, and drawn ones with seeds and penalties."""
    common = {"max_tokens": num_tokens, "ignore_eos": True, "return_token_ids": True}
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.9, "seed": 3},
        {"temperature": 0.7, "seed": 4, "presence_penalty": 1.0},
    ]
    return [{"prompt": p, **common, **kinds[i % 3]} for i, p in enumerate(make_prompts(4, count))]


def told(answers: list[Any]) -> list[list[int]]:
    return [answer["choices"][0]["token_ids"] for answer in answers]


async def test_they_say_the_same_in_every_layout(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Server(tiny_llama, "--layers", "2,2", *OPTIONS, log=tmp_path / "plain") as plain:
        expected = told(await plain.post_all("/v1/completions", bodies()))
        assert "queued:" not in plain.log_text()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(SITE), os.environ.get("PYTHONPATH", "")))))
    with Server(tiny_llama, "--layers", "2,2", *OPTIONS, log=tmp_path / "queued") as server:
        wait_for(lambda: len(server.worker_pids()) == 3, "all workers")
        assert told(await server.post_all("/v1/completions", bodies())) == expected
        running = asyncio.ensure_future(server.post_all("/v1/completions", bodies()))
        await asyncio.sleep(0.2)
        await change(server, ("w0", 0, 1), ("w2", 1, 4))
        assert told(await running) == expected
        for stages in ([("w2", 0, 2), ("w1", 2, 3), ("w2", 3, 4)], [("w1", 0, 4)]):
            await change(server, *stages)
            assert told(await server.post_all("/v1/completions", bodies())) == expected
        assert server.audit()["problems"] == []
    said = (tmp_path / "queued").read_text()
    assert said.count("queued: steps go through a runner") == 3
    for worker in ("the first hop", "a later hop"):
        assert f"queued: {worker} planned a step ahead" in said

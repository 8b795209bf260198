"""A server with int8 weights: its streams do not change with its layout, and it says what it holds."""

import asyncio
from pathlib import Path

import aiohttp

from tests.integration.server import Server
from tests.integration.test_changes import await_workers, make_jobs, tell

OPTIONS = ("--stages", "2", "--kv-memory", "16M", "--block-size", "8", "--quantize", "int8")
LAYOUTS = ([1, 3], [3, 1], [2, 1, 1], [2, 2], [4])


async def test_nobody_can_tell_when_the_layout_changes(tiny_llama: Path, tmp_path: Path) -> None:
    """To the bit: a row has the same on every worker, in whatever company."""
    jobs = make_jobs(12)
    options = (*OPTIONS, "--dtype", "bfloat16", "--local-workers", "3", "--no-prefix-cache")
    timeout = aiohttp.ClientTimeout(total=120.0)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        with Server(tiny_llama, *options, log=tmp_path / "unchanged.log") as unchanged:
            expected = [await tell(session, unchanged, job) for job in jobs]
        with Server(tiny_llama, *options, log=tmp_path / "changed.log") as server:
            await_workers(server, 3)
            status, before = server.get("/admin/layout")
            assert status == 200
            assert [stage["implementation"] for stage in before["stages"]] == ["lean int8"] * 2
            over = asyncio.Event()

            async def repeat(first: int) -> int:
                count = 0
                while not over.is_set():
                    index = (first + 5 * count) % len(jobs)
                    told = await tell(session, server, jobs[index])
                    assert told == expected[index], f"job {index} differs"
                    count += 1
                return count

            streams = [asyncio.create_task(repeat(number)) for number in range(4)]
            try:
                flipped = 0
                for layers in LAYOUTS:
                    await asyncio.sleep(0.2)
                    url = f"{server.url}/admin/layout?wait=true"
                    async with session.post(url, json={"layers": layers}) as response:
                        report = await response.json()
                    assert report["outcome"] == "committed", report
                    flipped += report["sequences_flipped"]
            finally:
                over.set()
                compared = await asyncio.gather(*streams)
            assert min(compared) > 0
            assert flipped > 0
            assert server.audit()["problems"] == []


def test_an_architecture_without_lean_layers_is_refused(tmp_path: Path) -> None:
    from tests.tiny_models import write_tiny

    folder = write_tiny("mixtral", tmp_path / "tiny-mixtral")
    server = Server(folder, "--quantize", "int8", "--stages", "1", log=tmp_path / "log", wait=False)
    with server:
        assert server.process is not None
        assert server.process.wait(60.0) == 1
    assert "--quantize int8 is for the lean layers, and MixtralForCausalLM" in server.log_text()

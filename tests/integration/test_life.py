"""Starting, dying and ending, with real processes: workers that crash or come from elsewhere, heads that are killed."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.server import Server, free_port
from tests.integration.test_equality import generate, load_reference

OPTIONS = ("--dtype", "float32", "--kv-memory", "4M")
BODY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}


def complete(server: Server, prompt: list[int], max_tokens: int) -> list[int]:
    status, answer = server.post("/v1/completions", {**BODY, "prompt": prompt, "max_tokens": max_tokens})
    assert status == 200, answer
    return answer["choices"][0]["token_ids"]


def wait_for(condition: Any, timeout_s: float, what: str) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.05)


def test_a_killed_worker_comes_back_and_no_stream_notices(tiny_llama: Path, tmp_path: Path) -> None:
    """SIGKILL one worker, then the other, in the middle of generating; the tokens are those of `transformers`."""
    model = load_reference(tiny_llama)
    prompts = [[7 + index, 9, 11 + index] for index in range(6)]
    with ThreadPoolExecutor() as pool, Server(tiny_llama, "--stages", "2", *OPTIONS, log=tmp_path / "log") as server:
        for name in ("w0", "w1"):
            before = server.get("/admin/stats")[1]["generated_tokens"]
            streams = [pool.submit(complete, server, prompt, 400) for prompt in prompts]
            wait_for(lambda b=before: server.get("/admin/stats")[1]["generated_tokens"] > b + 50, 30, "generation")
            os.kill(server.worker_pids()[name], signal.SIGKILL)
            for prompt, stream in zip(prompts, streams, strict=True):
                got = stream.result(120)
                assert got[:24] == generate(model, prompt)
                assert len(got) == 400
        stats = server.get("/admin/stats")[1]
        assert stats["workers_lost"] == 2
        assert server.get("/admin/layout")[1]["epoch"] == 3
        assert server.audit()["problems"] == []


def test_a_worker_from_elsewhere_joins_by_torchrun(tiny_llama: Path, tmp_path: Path) -> None:
    rpc_port = free_port()
    options = ("--stages", "2", "--local-workers", "1", "--rpc-port", str(rpc_port))
    server = Server(tiny_llama, *options, *OPTIONS, log=tmp_path / "log", wait=False)
    with server:
        body = server.await_health(wanted=503)
        assert body["status"] in ("waiting_for_workers", "starting"), body
        status, refused = server.post("/v1/completions", {"prompt": [1, 2], "max_tokens": 1})
        assert status == 503, refused
        torchrun = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"),
            *("-m", "runtime", "--head", f"127.0.0.1:{rpc_port}", "--name", "guest"),
        ]
        with (tmp_path / "guest").open("wb") as log:
            guest = subprocess.Popen(torchrun, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            server.await_health()
            assert [stage["worker"] for stage in server.get("/admin/layout")[1]["stages"]] == ["guest", "w0"]
            assert complete(server, [5, 6, 7], 24) == generate(load_reference(tiny_llama), [5, 6, 7])
            server.stop()
            assert guest.wait(20) == 0, "the head told it to end, so its agent must not start it again"
        finally:
            if guest.poll() is None:
                guest.terminate()
                guest.wait(20)


def test_a_worker_that_dies_again_and_again_does_not_end_the_server(tiny_llama: Path, tmp_path: Path) -> None:
    """An idle worker is killed as often as its agent starts it, and once more: it stays out, and the other one goes on."""
    options = ("--stages", "1", "--local-workers", "2")
    expected = generate(load_reference(tiny_llama), [7, 9, 11])
    with Server(tiny_llama, *options, *OPTIONS, log=tmp_path / "log") as server:
        for count in range(1, 5):
            wait_for(lambda: len(server.worker_pids()) == 2, 60, "the worker's return")
            idle = next(name for name in server.worker_pids() if name.startswith("w1"))
            os.kill(server.worker_pids()[idle], signal.SIGKILL)
            wait_for(lambda n=count: server.get("/admin/stats")[1]["workers_lost"] == n, 30, "the loss")
        wait_for(lambda: "w1 ended with code" in server.log_text(), 30, "the end of its agent")
        assert "Another one joins with" in server.log_text()
        assert complete(server, [7, 9, 11], 24) == expected
        os.kill(server.worker_pids()["w0"], signal.SIGKILL)
        assert complete(server, [7, 9, 11], 24) == expected, "w0 may return"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_the_head(number: int, tiny_llama: Path, tmp_path: Path) -> None:
    server = Server(tiny_llama, "--stages", "2", *OPTIONS, log=tmp_path / "log")
    server.start()
    tree = server.tree()
    assert len(tree) >= 5, "a head, two agents and two workers"
    assert server.process is not None
    server.process.send_signal(number)
    _, alive = psutil.wait_procs(tree, timeout=12.0)
    for process in alive:
        process.kill()
    assert not alive, f"after {signal.Signals(number).name} {[(p.pid, p.name()) for p in alive]} were left"
    if number == signal.SIGINT:
        assert server.process.wait(1) == 0


def test_a_server_without_any_worker_left_ends(tiny_llama: Path, tmp_path: Path) -> None:
    """Both are told to end: the first leaves the other one serving, the second nobody, and no agent starts them again."""
    with Server(tiny_llama, "--stages", "1", "--local-workers", "2", *OPTIONS, log=tmp_path / "log") as server:
        wait_for(lambda: len(server.worker_pids()) == 2, 60, "the second worker")
        os.kill(server.worker_pids()["w1"], signal.SIGTERM)
        wait_for(lambda: "w1 was told to end and will not be started again" in server.log_text(), 30, "its end")
        assert server.get("/health")[0] == 200
        assert len(complete(server, [7, 9, 11], 4)) == 4
        os.kill(server.worker_pids()["w0"], signal.SIGTERM)
        assert server.process is not None
        assert server.process.wait(30) != 0
        assert "local worker w0 was told to end and will not be started again" in server.log_text()


def test_sigterm_lets_running_requests_end(tiny_llama: Path, tmp_path: Path) -> None:
    server = Server(tiny_llama, "--stages", "2", *OPTIONS, log=tmp_path / "log")
    server.start()
    results: list[list[int]] = []
    thread = threading.Thread(target=lambda: results.append(complete(server, [3, 4, 5], 300)))
    thread.start()
    wait_for(lambda: server.get("/admin/stats")[1]["running"] == 1, 20, "the request")
    assert server.process is not None
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: server.get("/health")[1]["status"] == "draining", 10, "draining")
    status, body = server.post("/v1/completions", {"prompt": [1], "max_tokens": 1})
    assert (status, body["error"]["code"]) == (503, "shutting_down")
    thread.join(60)
    assert len(results[0]) == 300
    assert server.stop() == 0


async def test_what_a_client_leaves_is_freed(server: Server) -> None:
    """Connections cut in the middle of a stream: their sequences and blocks go, nothing else does."""
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    for _ in range(5):
        body = b'{"prompt": [5, 6], "max_tokens": 400, "stream": true, "ignore_eos": true}'
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(head.encode() + str(len(body)).encode() + b"\r\n\r\n" + body)
        await reader.readuntil(b"data: ")
        writer.transport.abort()
    deadline_s = time.monotonic() + 10
    while (stats := server.get("/admin/stats")[1])["running"] or stats["kv_blocks_used"]:
        assert time.monotonic() < deadline_s, stats
        await asyncio.sleep(0.05)
    audit = server.audit()
    assert audit["problems"] == []
    assert audit["sequences"] == audit["sinks"] == 0

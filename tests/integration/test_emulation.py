"""A real server whose workers emulate other devices says so wherever it names them."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tests.integration.server import Server


def test_emulated_workers_are_labelled_everywhere(tiny_llama: Path, tmp_path: Path) -> None:
    options = ("--layers", "2,2", "--pace", "a100,none", "--dtype", "float32", "--kv-memory", "16M")
    with Server(tiny_llama, *options, log=tmp_path / "log") as server:
        body = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        status, answer = server.post("/v1/completions", body)
        assert status == 200
        assert answer["usage"]["completion_tokens"] == 4
        _, view = server.get("/admin/workers")
        first, second = sorted(view["workers"], key=lambda worker: worker["name"])
        assert re.fullmatch(r"a100 \(emulated on .+\)", first["device_name"])
        assert first["pace"][1] > 2
        assert second["pace"] is None
        assert "emulated" not in second["device_name"]
        _, layout = server.get("/admin/layout")
        assert [stage["pace"] is not None for stage in layout["stages"]] == [True, False]
        metrics = server.get("/metrics")[1]
        assert re.search(r'midflight_worker_info\{.*emulation="prefill=3.17,decode=2.354",worker="w0"\} 1.0', metrics)
        assert re.search(r'midflight_worker_info\{.*emulation="",worker="w1"\} 1.0', metrics)
        for command in ("workers", "layout"):
            shown = subprocess.run(
                [sys.executable, "-m", "api.cli", command, "--url", server.url],
                capture_output=True, text=True, env=os.environ, timeout=60.0,
            ).stdout  # fmt: skip
            assert shown.count("a100 (emulated on") == 1, shown
        assert "a100 (emulated on" in server.log_text(), "the lines at the start"


def test_the_roofline_law_on_real_workers(tiny_llama: Path, tmp_path: Path) -> None:
    """Steps last as long as the law says, and the planner begins with it: it would give the slow worker less."""
    fast, slow = "read=0.01,token=0.0001,name=a100", "read=0.03,token=0.0001,name=l40s"
    options = ("--layers", "2,2", "--pace", fast, "--pace", slow, "--dtype", "float32", "--kv-memory", "16M")
    with Server(tiny_llama, *options, log=tmp_path / "log") as server:
        body = {"prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        begun_s = time.monotonic()
        status, answer = server.post("/v1/completions", body)
        took_s = time.monotonic() - begun_s
        assert status == 200
        assert answer["usage"]["completion_tokens"] == 6
        assert took_s >= 6 * 2 * (0.01 + 0.03), "a token's way through two layers of each"
        workers = server.get("/admin/workers")[1]["workers"]
        assert [worker["roofline"] for worker in sorted(workers, key=lambda w: w["name"])] == [
            [0.01, 1e-4],
            [0.03, 1e-4],
        ]
        assert re.search(
            r'midflight_worker_info\{.*emulation="read=0.01,token=0.0001",worker="w0"\} 1.0', server.get("/metrics")[1]
        )
        assert "a100: 10 ms and 100 us a token for each layer (emulated on" in server.log_text()
        plan = server.get("/admin/plan")[1]["plan"]
        assert plan["is_change"]
        (first, *_), counts = plan["proposed"]["stages"], plan["proposed"]["layers"]
        assert first["device"] == "a100 (emulated)"
        assert counts[0] > 2, "the fast one should hold more"


def test_a_mistake_ends_the_command_with_a_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "runtime", "--head", "127.0.0.1:1", "--pace", "k80"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "k80" in done.stderr
    assert "a100" in done.stderr

"""A real server with a bad split: it shows a plan, and with the autopilot on it leaves that split under load."""

import json
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from api.plan_text import plan_lines
from tests.integration.server import Server

LAYERS = (28, 2)
NUM_CLIENTS = 8
TIMEOUT_S = 240.0


@pytest.fixture(scope="module")
def deep_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty layers that cost something to run, and no weights: they are made up at load."""
    folder = tmp_path_factory.mktemp("models") / "deep-llama"
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "num_hidden_layers": sum(LAYERS), "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512,
    }  # fmt: skip
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Clients:
    """A closed loop until `stop`; every answer must be right."""

    def __init__(self, server: Server, count: int = NUM_CLIENTS) -> None:
        self._server, self._over = server, threading.Event()
        self.failures: list[Any] = []
        self.answers = 0
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        while not self._over.is_set():
            body = {"prompt": [5 + number, *range(10, 50)], "max_tokens": 30, "temperature": 0, "ignore_eos": True}
            status, answer = self._server.post("/v1/completions", body)
            if status != 200 or answer["usage"]["completion_tokens"] != 30:
                self.failures.append(answer)
                return
            self.answers += 1

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def until(what: str, server: Server, condition: Any) -> Any:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"{what}:\n{server.get('/admin/plan')[1]}\n{server.log_text()}"
        time.sleep(0.2)
    return found


def test_a_bad_split_is_left_under_load(deep_llama: Path, tmp_path: Path) -> None:
    told = tmp_path / "told"
    command = (
        f"{sys.executable} -c \"import os; open('{told}', 'a').write(os.environ['MIDFLIGHT_WORKERS_WANTED'] + ' ')\""
    )
    options = ("--load-format", "dummy", "--dtype", "float32", "--layers", ",".join(map(str, LAYERS)))
    more = ("--kv-memory", "64M", "--scale-command", command)
    with Server(deep_llama, *options, *more, log=tmp_path / "log") as server:
        status, view = server.get("/admin/plan")
        assert status == 200
        assert view["load_is_assumed"]
        assert view["plan"]["is_change"], "the usual load wants another split, too"
        assert view["mode"] == "off"
        clients = Clients(server)
        try:
            until("it sees a load", server, lambda: not server.get("/admin/plan")[1]["load_is_assumed"])
            assert server.get("/admin/layout")[1]["epoch"] == 1, "switched off it does nothing"
            assert server.post("/admin/autopilot", {"enabled": True})[1] == {"mode": "on"}
            until("it changes the layout", server, lambda: server.get("/admin/layout")[1]["epoch"] > 1)
            until("the change ends", server, lambda: server.get("/admin/layout")[1]["transition"] is None)
            view = until("it judges, and knows the load by then", server, lambda: _with_result(server))
        finally:
            clients.stop()
        assert not clients.failures
        assert clients.answers > NUM_CLIENTS
        _check(server, view)
        assert server.audit()["problems"] == []
        until("the scale command runs", server, told.exists)
        assert int(told.read_text().split()[0]) in (1, 2)


def _with_result(server: Server) -> dict[str, Any] | None:
    _, view = server.get("/admin/plan")
    is_judged = any(entry["kind"] == "result" for entry in view["log"])
    return view if is_judged and view["load"]["is_closed"] else None


def _check(server: Server, view: dict[str, Any]) -> None:
    stages = server.get("/admin/layout")[1]["stages"]
    counts = [stage["layers"][1] - stage["layers"][0] for stage in stages]
    assert max(counts) - min(counts) < 16 or len(counts) == 1, f"the split is still lopsided: {counts}"
    assert view["load"]["traffic"]["prompt_tokens"] == pytest.approx(41)
    assert view["load"]["traffic"]["output_tokens"] == pytest.approx(30, rel=0.2)
    assert all(error["num_steps"] > 10 for error in view["errors"]["stages"])
    assert len(view["errors"]["stages"]) == 2
    text = "\n".join(plan_lines(view))
    assert "clients in a closed loop" in text
    assert "bottleneck" in text
    _, metrics = server.get("/metrics")
    assert 'midflight_autopilot_mode{mode="on"} 1.0' in metrics
    assert "midflight_plan_step_error_ratio{" in metrics
    assert 'midflight_autopilot_entries_total{kind="change"}' in metrics
    _, reports = server.get("/admin/transitions")
    assert reports["transitions"][0]["outcome"] == "committed"
    assert reports["transitions"][0]["dropped_requests"] == 0
    assert reports["transitions"][0]["recomputed_tokens"] == 0


def test_a_small_load_gives_a_worker_back_and_a_large_one_takes_it(tiny_llama: Path, tmp_path: Path) -> None:
    """Emulated devices, so that it is clear which layout is right: one client is served best by the fast one alone."""
    paces = ("--pace", "read=0.01,token=0.002,name=a100", "--pace", "read=0.03,token=0.002,name=l40s")
    options = ("--layers", "2,2", "--dtype", "float32", "--kv-memory", "16M", "--autopilot", "on", "--elastic")
    with Server(tiny_llama, *options, *paces, log=tmp_path / "log") as server:
        clients = Clients(server, 1)
        try:
            until("it shrinks", server, lambda: len(server.get("/admin/layout")[1]["stages"]) == 1)
            assert server.get("/admin/layout")[1]["stages"][0]["worker"] == "w0"
            view = until("the other one is a spare", server, lambda: _with_spare(server, ["w1"]))
            assert view["workers"]["used"] == 1
            assert 'midflight_plan_workers{state="spare"} 1.0' in server.get("/metrics")[1]
            assert "spare: w1" in "\n".join(plan_lines(view))
        finally:
            clients.stop()
        more = Clients(server, 24)
        try:
            until("it grows", server, lambda: len(server.get("/admin/layout")[1]["stages"]) == 2)
        finally:
            more.stop()
        assert not clients.failures + more.failures
        assert server.audit()["problems"] == []


def _with_spare(server: Server, names: list[str]) -> dict[str, Any] | None:
    _, view = server.get("/admin/plan")
    return view if view["workers"] and view["workers"]["spare"] == names else None

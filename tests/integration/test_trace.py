"""A trace of a real server whose layout changes meanwhile: every process and every kind of work is in it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.integration.server import Server

BODY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 200}


def test_a_change_can_be_seen_from_its_shadow_to_its_flip(tiny_llama: Path, tmp_path: Path) -> None:
    options = ("--stages", "2", "--layers", "3,1", "--dtype", "float32", "--kv-memory", "16M")
    with ThreadPoolExecutor(5) as pool, Server(tiny_llama, *options, log=tmp_path / "log") as server:
        streams = [pool.submit(server.post, "/v1/completions", {**BODY, "prompt": [7 + i, 9]}) for i in range(4)]
        tracing = pool.submit(server.post, "/admin/trace", {"seconds": 2})
        while not tracing.done():  # there and back again: the recording begins and ends somewhere in it
            for counts in ([1, 3], [3, 1]):
                status, report = server.post("/admin/layout?wait=true", {"layers": counts})
                assert (status, report["outcome"]) == (200, "committed")
        status, trace = tracing.result(60)
        assert status == 200, trace
        assert all(stream.result(60)[0] == 200 for stream in streams)
        assert server.post("/admin/trace", {"seconds": 0.05})[0] == 200, "it can be done again"
        assert server.audit()["problems"] == []
    facts, events = trace["midflight"], trace["traceEvents"]
    assert [process["name"] for process in facts["processes"]] == ["head", "w0", "w1"]
    assert all(process["spans_lost"] == 0 for process in facts["processes"])
    assert facts["generated_tokens"] > 0
    assert facts["head_cpu_s"] > 0

    def seen(pid: int) -> set[str]:
        return {event["cat"] for event in events if event["pid"] == pid and "cat" in event}

    assert {"receive stepresult", "decide stepresult", "send step", "emit"} <= seen(0)
    assert {"wait", "decode", "step", "send", "mirror", "snapshot slice", "flip"} <= seen(1)
    assert {"step", "sample", "rows applied", "pages applied", "flip"} <= seen(2)
    assert all(seen(2) & {f"load {layer}", f"fetch {layer}"} for layer in (1, 2)), "from the disk or from its peer"
    steps = [event for event in events if event.get("cat") == "step"]
    assert all(event["args"]["products_ns"] > 0 and event["args"]["attention_ns"] > 0 for event in steps)
    for event in steps:
        parts = sum(event["args"][name] for name in ("products_ns", "attention_ns", "lm_head_ns"))
        assert parts <= 1e3 * event["dur"] + 1e3, event
    flips = [{e["args"]["epoch"] for e in events if e.get("cat") == "flip" and e["pid"] == pid} for pid in (1, 2)]
    assert flips[0] & flips[1], "a change that both workers were seen to make"

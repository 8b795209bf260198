"""The command line: what it parses, how it refuses, and what its client commands print."""

import asyncio
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from api import cli, layouts
from api.config import LOOK_AHEAD, STRATEGIES, ServeConfig
from api.head import _join_line, _make_state
from api.status import StatusReporter, Terminal, TerminalHandler, progress_line, ready_lines
from api.text import Text
from scheduler import transition
from scheduler.lanes import LookAhead
from scheduler.request import Health
from scheduler.transition import Refused
from scheduler.wishes import LayoutError
from tests.sim.cluster import make_spec
from tests.tiny_models import build_tokenizer
from tests.unit.api_harness import make_report, serve

LAYOUT: dict[str, Any] = {
    "epoch": 3,
    "model": "m",
    "num_layers": 30,
    "stages": [
        {"worker": "w0", "layers": [0, 19], "device": "cpu"},
        {"worker": "w1", "layers": [19, 30], "device": "cpu"},
    ],
    "transition": None,
}

ROOT = Path(__file__).parents[2]

VIEW: dict[str, Any] = {
    "id": 1, "strategy": "live", "phase": "flip", "target": [], "hop": 1, "num_hops": 2, "loading": [], "weights": [],
    "snapshot_blocks": 4, "snapshot_blocks_arrived": 3, "sequences_flipped": 1, "sequences_left": 2, "elapsed_s": 0.5,
}  # fmt: skip


def parsed(*arguments: str, **environment: str) -> ServeConfig:
    return cli.parse_serve(["m", *arguments], environment)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, "one clear line"
    return lines[0]


def test_the_defaults_are_the_configs_own() -> None:
    assert parsed() == ServeConfig(model="m", home=Path("~/.cache/midflight").expanduser())


def test_every_option_arrives() -> None:
    line = """
        --layers 19,11 --local-workers 1 --threads 3 --host 0.0.0.0 --port 0 --rpc-host 10.0.0.1 --rpc-port 29500
        --allow-public-rpc --dtype bfloat16 --device cuda --load-format dummy --implementation lean
        --kv-memory 1.5GiB --memory-fraction 0.7 --block-size 32 --max-context 2048 --max-running 8 --max-queue 9 --step-tokens 64
        --microbatches 3 --no-prefix-cache --api-key a --admin-key b --max-body 1M --drain-timeout 5
        --log-level debug --served-model-name name --pace a100
    """
    config = parsed(*line.split(), MIDFLIGHT_HOME="/somewhere")
    assert config == ServeConfig(
        model="m", home=Path("/somewhere"), served_model_name="name", num_stages=2, layers=(19, 11), num_local_workers=1,
        num_threads=3, host="0.0.0.0", port=0, rpc_host="10.0.0.1", rpc_port=29500, allow_public_rpc=True, dtype="bfloat16",
        device="cuda", load_format="dummy", implementation="lean", kv_memory=3 << 29, memory_fraction=0.7, block_size=32, max_context=2048,
        max_running=8, max_queue=9, step_tokens=64, num_microbatches=3, prefix_cache=False, api_key="a", admin_key="b",
        max_body_bytes=1 << 20, drain_timeout_s=5.0, log_level="debug", paces=("a100",),
    )  # fmt: skip


def test_what_memory_is_for_reaches_the_scheduler() -> None:
    cluster = _make_state(parsed("--layers", "2,3", "--memory-fraction", "0.7"), make_spec(5)).cluster
    assert (cluster.memory_fraction, cluster.kv_bytes) == (0.7, 0)
    assert _make_state(parsed("--layers", "2,3", "--kv-memory", "2M"), make_spec(5)).cluster.kv_bytes == 2 << 20


def test_weights_are_quantised_when_asked_for() -> None:
    assert parsed("--quantize", "int8", "--implementation", "lean").quantize == "int8"
    assert parsed("--implementation", "lean").quantize == ""


def test_workers_follow_the_stages() -> None:
    assert (parsed("--stages", "3").num_stages, parsed("--stages", "3").num_local_workers) == (3, 3)
    assert parsed("--layers", "10,10,10").num_stages == 3
    assert parsed("--stages", "3", "--no-local-workers").num_local_workers == 0
    assert parsed("--layers", "0,30").layers == (0, 30)


def test_keys_come_from_the_environment_or_the_line() -> None:
    assert parsed(MIDFLIGHT_API_KEY="e", MIDFLIGHT_ADMIN_KEY="f").api_key == "e"
    assert parsed("--api-key", "x", MIDFLIGHT_API_KEY="e").api_key == "x"
    assert parsed("--api-key", "", MIDFLIGHT_API_KEY="e").api_key == ""


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("2k", 2048), ("3M", 3 << 20), ("1.5GiB", 3 << 29), ("1TB", 1 << 40), ("2 gb", 2 << 30)],
)
def test_sizes(text: str, size: int) -> None:
    assert parsed("--kv-memory", text).kv_memory == size


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("serve",), "MODEL"),
        (("serve", "m", "--port", "70000"), "65535"),
        (("serve", "m", "--port", "x"), "--port"),
        (("serve", "m", "--stages", "0"), "at least 1"),
        (("serve", "m", "--stages", "-1"), "--stages"),
        (("serve", "m", "--layers", "a,b"), "19,11"),
        (("serve", "m", "--layers", ""), "19,11"),
        (("serve", "m", "--layers", "1,0,1"), "without a layer"),
        (("serve", "m", "--layers", "1,1", "--stages", "3"), "leave one out"),
        (("serve", "m", "--no-local-workers", "--local-workers", "2"), "leave one out"),
        (("serve", "m", "--kv-memory", "lots"), "2GiB"),
        (("serve", "m", "--kv-memory", "0"), "2GiB"),
        (("serve", "m", "--memory-fraction", "1"), "between 0 and 1"),
        (("serve", "m", "--dtype", "int4"), "bfloat16"),
        (("serve", "m", "--drain-timeout", "nan"), "seconds"),
        (("serve", "m", "--drain-timeout", "-1"), "seconds"),
        (("serve", "m", "--wat"), "--wat"),
        (("fly",), "fly"),
        (("pull", "gpt-17"), "smollm2-135m-instruct"),
        (("layout", "--url", "here"), "http://"),
        (("layout", "11,x"), "w1:0-12"),
        (("layout", "w1:0-12,w0"), "w1:0-12"),
        (("layout", "w1:12"), "w1:0-12"),
        (("layout", "11,-19"), "11,19"),
        (("layout", "--queue"), "11,19"),
        (("layout", "--no-wait"), "11,19"),
        (("layout", "11,19", "--strategy", "hope"), "stop-copy"),
        (("layout", "11,19", "--rate", "fast"), "2GiB"),
        (("serve", "m", "--quantize", "int4"), "int8"),
        (("serve", "m", "--quantize", "int8", "--implementation", "transformers"), "--implementation transformers"),
        (("serve", "m", "--quantize", "int8", "--device", "cuda:1"), "--device cuda:1"),
        (("workers", "fly"), "drain"),
        (("workers", "drain"), "NAME"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str) -> None:
    assert said in refused(capsys, *arguments)


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys; from api.cli import main\n"
        "try: main(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'aiohttp', 'numpy', 'msgspec'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--kv-memory" in done.stdout


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "serve" in capsys.readouterr().out


def test_no_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["layout", "--url", "http://127.0.0.1:1"]) == 1
    assert "midflight serve" in capsys.readouterr().err


def test_a_server_that_stands_still_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.client._ASK_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert cli.main(["workers", "--url", url]) == 1
    assert capsys.readouterr().err == f"midflight: {url}/admin/workers did not answer within 0.2 s\n"


# -- against a server ----------------------------------------------------------------------------------------


async def start(*arguments: str, **environment: str) -> asyncio.subprocess.Process:
    """`midflight ARGUMENTS` as a process of its own."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "api.cli", *arguments,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environment},
    )  # fmt: skip


async def run(*arguments: str, stdin: str = "", **environment: str) -> tuple[int, str, str]:
    process = await start(*arguments, **environment)
    out, err = await asyncio.wait_for(process.communicate(stdin.encode()), 60)
    return process.returncode or 0, out.decode(), err.decode()


@pytest.mark.parametrize("arguments", [(), ("--help",), ("no-such-benchmark", "--device", "cuda")])
async def test_bench_is_the_script_of_the_checkout(arguments: tuple[str, ...]) -> None:
    code, out, err = await run("bench", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("scripts/bench NAME [ARGS]: runs scripts/benchmarks/NAME.py")


async def test_bench_runs_in_the_same_environment() -> None:
    code, out, _ = await run("bench", "peers", "--help")
    assert code == 0
    assert out.startswith("usage: scripts/bench peers")


def test_bench_without_a_checkout_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_ROOT", tmp_path)
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", "serve"])
    assert caught.value.code == 1
    assert "pip install -e CHECKOUT" in capsys.readouterr().err


async def test_layout_workers_and_chat_against_a_server() -> None:
    text = Text(build_tokenizer())
    async with serve(text, [*text.encode("the answer é"), 2], api_key="k", admin_key="a") as api:
        code, out, _ = await run("layout", "--url", api.url, MIDFLIGHT_ADMIN_KEY="a")
        assert code == 0
        assert "w0" in out
        assert "[3, 4)" in out
        code, out, _ = await run("layout", "--json", "--url", api.url, MIDFLIGHT_ADMIN_KEY="a")
        assert json.loads(out) == api.engine.layout_view()
        code, out, err = await run("layout", "--url", api.url, MIDFLIGHT_ADMIN_KEY="wrong")
        assert (code, out) == (1, "")
        assert "admin key" in err
        code, out, _ = await run("workers", MIDFLIGHT_URL=api.url, MIDFLIGHT_ADMIN_KEY="a")
        assert "127.0.0.1" in out
        questions = "first\n\nsecond\n/reset\nthird\n/exit\n"
        code, out, err = await run(
            "chat", "--url", api.url, "--system", "be brief", stdin=questions, MIDFLIGHT_API_KEY="k"
        )
        assert (code, out, err) == (0, "the answer é\n" * 3, "")
        prompts = [text.decode(request.prompt, skip_special_tokens=False) for request in api.engine.requests]
        assert ["be brief" in prompt for prompt in prompts] == [True] * 3
        assert "the answer é" in prompts[1]
        assert "first" in prompts[1]
        assert "first" not in prompts[2]
        code, _, err = await run("chat", "--url", api.url, stdin="hi\n", MIDFLIGHT_API_KEY="wrong")
        assert code == 1
        assert "API key" in err


def test_layout_lines() -> None:
    assert layouts.layout_lines(LAYOUT) == [
        "m: epoch 3, 30 layers, 2 stages",
        "0  w0  [0, 19)   19 layers  cpu",
        "1  w1  [19, 30)  11 layers  cpu",
    ]
    recovering = layouts.layout_lines({**LAYOUT, "stages": [], "status": "waiting_for_workers"})
    assert recovering == ["m: epoch 3, 30 layers, 0 stages, waiting for workers"]
    assert layouts.layout_lines({**LAYOUT, "status": "serving"}) == layouts.layout_lines(LAYOUT)
    assert layouts.worker_lines({"workers": []}) == ["no workers"]
    workers = [{"name": "w0", "status": "ready", "layers": [0, 1, 2, 7, 9, 10], "rss": 852_299_776, "pages_used": 3}]
    line = layouts.worker_lines({"workers": workers})[1]
    assert "[0, 3) [7, 8) [9, 11)" in line
    assert "852.3 MB" in line


# -- changing the layout -------------------------------------------------------------------------------------


async def test_a_change_is_followed_to_its_end() -> None:
    async with serve(Text(build_tokenizer()), [1], admin_key="a") as api:
        line = ["layout", "w1:0-3,w0:3-4", "--strategy", "drain", "--queue", "--deadline", "2", "--rate", "1M", "--url"]
        running = asyncio.ensure_future(run(*line, api.url, MIDFLIGHT_ADMIN_KEY="a"))
        await api.until(lambda: api.engine.wishes)
        stages = [{"worker": "w1", "layers": [0, 3]}, {"worker": "w0", "layers": [3, 4]}]
        assert api.engine.wishes == [
            {"stages": stages, "strategy": "drain", "queue": True, "deadline_s": 2.0, "bytes_per_s": 1 << 20}
        ]
        api.engine.tell({"type": "transition", "transition": {**VIEW, "id": 7, "phase": "abort"}})
        api.engine.tell({"type": "transition", "transition": VIEW})
        api.engine.tell({"type": "report", "report": make_report(7, "live")})
        api.engine.end_change(1, "committed", total_s=1.5, layers_moved=2, sequences_flipped=1)
        code, out, err = await running
        assert code == 0
        assert err == "  0.50 s  flip (hop 1 of 2): snapshot 3 of 4 blocks; 1 sequence over, 2 left\n"
        assert out.startswith(
            "transition 1 committed after 1.50 s (drain)\n  from     w0 [0, 3) | w1 [3, 4), epoch 1\n"
        )
        assert "2 layers" in out
        assert "1 sequence taken over" in out


async def test_a_deadline_of_nothing_is_the_servers_to_refuse() -> None:
    async with serve(Text(build_tokenizer()), [1]) as api:
        api.engine.refusal = LayoutError("deadline_s: must be more than 0", "deadline_s")
        line = ("layout", "1,3", "--deadline", "0", "--url", api.url)
        assert await run(*line) == (1, "", "midflight: deadline_s: must be more than 0\n")
        api.engine.refusal = None
        assert await run(*line, "--no-wait") == (0, "transition 1 is under way\n", "")
        assert api.engine.wishes[-1] == {"layers": [1, 3], "deadline_s": 0.0}


@pytest.mark.parametrize("outcome", ["aborted", "refused"])
async def test_a_change_that_came_to_nothing_is_a_failure(outcome: str) -> None:
    async with serve(Text(build_tokenizer()), [1]) as api:
        running = asyncio.ensure_future(run("workers", "drain", "w1", "--json", "--url", api.url))
        await api.until(lambda: api.engine.wishes)
        assert api.engine.wishes == [{"drain": "w1"}]
        api.engine.end_change(1, outcome, why="no room")
        code, out, _ = await running
        assert (code, json.loads(out)["why"]) == (1, "no room")


async def test_a_worker_is_taken_back() -> None:
    async with serve(Text(build_tokenizer()), [1]) as api:
        assert await run("workers", "resume", "w1", "--url", api.url) == (0, "w1 may have layers again\n", "")
        assert api.engine.wishes == [{"resume": "w1"}]
        api.engine.refusal = LayoutError("there is no worker 'w9'; there are w0, w1", "worker")
        assert await run("workers", "resume", "w9", "--url", api.url) == (
            1,
            "",
            "midflight: there is no worker 'w9'; there are w0, w1\n",
        )


async def test_a_refusal_is_one_line() -> None:
    async with serve(Text(build_tokenizer()), [1]) as api:
        api.engine.refusal = Refused("transition 7 is under way")
        assert await run("layout", "1,3", "--url", api.url) == (1, "", "midflight: transition 7 is under way\n")
        api.engine.refusal = None
        assert await run("layout", "1,3", "--no-wait", "--url", api.url) == (0, "transition 1 is under way\n", "")
        api.engine.first_outcome = "queued"
        behind = "transition 2 is queued behind a change that is under way\n"
        assert await run("layout", "1,3", "--queue", "--no-wait", "--url", api.url) == (0, behind, "")


@pytest.mark.parametrize("in_time", [True, False])
async def test_ctrl_c_asks_the_server_to_abort(in_time: bool) -> None:
    async with serve(Text(build_tokenizer()), [1]) as api:
        process = await start("layout", "1,3", "--url", api.url)
        await api.until(lambda: api.engine.wishes)
        assert process.stderr is not None
        api.engine.tell({"type": "transition", "transition": VIEW})
        await process.stderr.readline()
        if not in_time:
            api.engine.reports[1]["phases_s"] = {"flip": 1.0}
        process.send_signal(signal.SIGINT)
        if not in_time:
            while b"cannot be aborted" not in await process.stderr.readline():
                pass
            api.engine.end_change(1, "committed")
        out, err = await asyncio.wait_for(process.communicate(), 20)
        assert (b"aborted after" in out) == in_time, (out, err)
        assert process.returncode == (1 if in_time else 0)
        assert b"Traceback" not in err


async def test_when_the_events_break_off_the_report_is_asked_for() -> None:
    async with serve(Text(build_tokenizer()), [1]) as api:
        process = await start("layout", "1,3", "--url", api.url)
        await api.until(lambda: api.engine.wishes)
        api.close_listeners()
        await api.until(lambda: api.metrics.responses.get(("/admin/transitions/{id}", 200), 0) > 1)
        api.engine.end_change(1, "committed")
        out, _ = await asyncio.wait_for(process.communicate(), 20)
        assert (process.returncode, out.startswith(b"transition 1 committed")) == (0, True)


def test_reports_are_readable() -> None:
    report = {
        **make_report(4, "live"), "outcome": "committed", "total_s": 2.962, "layers_moved": 20, "weight_bytes": 198_228_096,
        "snapshot_bytes": 2_457_600, "mirror_bytes": 999, "blocks_copied": 1, "sequences_flipped": 4, "fence_waits": 1,
        "fence_wait_ms": 0.04, "engine_pause_ms": {"max": 19.746, "p50": 2.5, "count": 4.0}, "num_hops": 3,
        "phases_s": {"reserve": 0.0617, "shadow": 2.5},
    }  # fmt: skip
    assert layouts.report_lines(report) == [
        "transition 4 committed after 2.96 s (live)",
        "  from     w0 [0, 3) | w1 [3, 4), epoch 1",
        "  to       w0 [0, 1) | w1 [1, 4), epoch 2",
        "  moved    20 layers in 3 hops: weights 198.2 MB, KV snapshot 2.5 MB (1 block), KV mirror 999 B",
        "  running  4 sequences taken over, 0 tokens recomputed, 0 requests dropped",
        "  pause    p50 2.5 ms, max 19.7 ms over 4 flips; 1 fence wait (0.0 ms)",
        "  time     reserve 0.06 s, shadow 2.50 s",
    ]
    beside = {"excess_p50": -0.4, "excess_max": 3.1, "ordinary_p99": 12.04}
    assert layouts.report_lines({**report, "engine_pause_ms": report["engine_pause_ms"] | beside})[5] == (
        "  pause    p50 2.5 ms, max 19.7 ms over 4 flips; beyond the mean gap p50 -0.4 ms, max 3.1 ms"
        " (between two other steps: p99 12.0 ms); 1 fence wait (0.0 ms)"
    )
    untaken = {**report, "engine_pause_ms": {}, "sequences_flipped": 0}
    assert "pause    none measured: no running sequence went over;" in layouts.report_lines(untaken)[5]
    queued = {**report, "outcome": "aborted", "why": "gone", "source": [], "phases_s": {}, "total_s": 0.0}
    assert layouts.report_lines(queued) == [
        "transition 4 aborted after 0.00 s (live): gone",
        "  wanted  w0 [0, 1) | w1 [1, 4)",
    ]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"strategy": "stop-copy", "engine_pause_ms": {}}, "all steps stopped for 0.27 s, from the start to the flip"),
        (
            {"strategy": "recompute", "recomputed_tokens": 57},
            "waited until 57 tokens had been prefilled again, for how long is not measured",
        ),
        ({"strategy": "drain", "engine_pause_ms": {}}, "new ones waited up to 0.27 s"),
    ],
)
def test_the_pause_of_the_other_strategies_is_not_that_of_flips(fields: dict[str, Any], said: str) -> None:
    pause = {"max": 5.8, "p50": 5.8, "count": 1.0}
    phases = {"reserve": 0.01, "prepare": 0.02, "shadow": 0.2, "copy": 0.04, "flip": 0.3, "retire": 0.01}
    report = {**make_report(4, "live"), "outcome": "committed", "engine_pause_ms": pause, "phases_s": phases, **fields}
    (line,) = [line for line in layouts.report_lines(report) if line.startswith("  pause")]
    assert said in line
    assert "5.8" not in line


def test_a_change_to_what_serves_says_that_nothing_happened() -> None:
    same = [{"worker": "w0", "layers": [0, 4]}]
    report = {
        **make_report(4, "live"), "outcome": "committed", "why": "the layout was this one already", "source": same,
        "target": same, "source_epoch": 2, "target_epoch": 2,
    }  # fmt: skip
    assert layouts.report_lines(report) == [
        "transition 4 committed after 0.00 s (live): the layout was this one already",
        "  at  w0 [0, 4), epoch 2",
    ]


def test_arriving_weights_are_shown_by_worker() -> None:
    view = {**VIEW, "phase": "shadow", "num_hops": 1, "loading": ["w1", "w2"]}
    assert layouts.progress_line(view) == "  0.50 s  shadow: weights: w1, w2 loading"
    weights = [
        {"worker": "w1", "units_loaded": 2, "units_total": 5, "bytes_loaded": 12_300_000, "bytes_total": 31_000_000},
        {"worker": "w2", "units_loaded": 0, "units_total": 1, "bytes_loaded": 0, "bytes_total": 900},
    ]
    assert layouts.progress_line({**view, "weights": weights}) == (
        "  0.50 s  shadow: weights: w1 2 of 5 units, 12.3 MB of 31.0 MB; w2 0 of 1 unit, 0 B of 900 B"
    )


def test_a_terminal_gets_one_line_written_over() -> None:
    out = io.StringIO()
    out.isatty = lambda: True
    progress = layouts.Progress(out)
    progress.show(VIEW)
    progress.show({**VIEW, "elapsed_s": 0.6})
    progress.clear()
    shown = out.getvalue().split("\r\x1b[K")
    assert [line[:13] for line in shown] == ["", "  0.50 s  fli", "  0.60 s  fli", ""]
    assert "\n" not in out.getvalue()


def test_the_strategies_are_the_schedulers() -> None:
    assert STRATEGIES == transition.STRATEGIES


def test_so_is_when_to_look_ahead() -> None:
    assert ("auto", *get_args(LookAhead)) == LOOK_AHEAD


# -- what the terminal shows ---------------------------------------------------------------------------------


def test_progress() -> None:
    assert progress_line(Health("waiting_for_workers", "", 1, 2, 0, 0)) == "waiting for workers: 1 of 2 joined"
    assert progress_line(Health("loading", "warming up", 2, 2, 7, 32)) == "loading: 7 of 32 units (warming up)"


def reporter(out: io.StringIO) -> StatusReporter:
    return StatusReporter(Terminal(out), lambda: ["serving m at U", "w0: all"], uptime_s=lambda: 0.0)


def test_a_pipe_gets_each_line_once() -> None:
    out = io.StringIO()
    told = reporter(out)
    for joined in (0, 0, 1):
        told.update(Health("waiting_for_workers", "", joined, 2, 0, 0))
    for status in ("serving", "serving", "recovering", "serving", "draining"):
        told.update(Health(status, "", 2, 2, 8, 8))
    assert out.getvalue().splitlines() == [
        "midflight: waiting for workers: 0 of 2 joined",
        "midflight: waiting for workers: 1 of 2 joined",
        "midflight: serving m at U after 0.0 s",
        "  w0: all",
        "midflight: recovering",
        "midflight: serving again",
    ]


def test_on_a_terminal_progress_gives_way() -> None:
    out = io.StringIO()
    out.isatty = lambda: True
    terminal = Terminal(out)
    told = StatusReporter(terminal, lambda: ["serving m"], uptime_s=lambda: 0.0)
    log = logging.getLogger("test of the terminal")
    log.propagate = False
    log.addHandler(TerminalHandler(terminal))
    told.update(Health("loading", "", 2, 2, 1, 8))
    told.update(Health("loading", "", 2, 2, 2, 8))
    log.warning("a line of the log")
    told.update(Health("loading", "", 2, 2, 2, 8))
    told.update(Health("serving", "", 2, 2, 8, 8))
    clear = "\r\x1b[K"
    assert out.getvalue() == (
        f"{clear}midflight: loading: 1 of 8 units{clear}midflight: loading: 2 of 8 units"
        f"{clear}a line of the log\n"
        f"{clear}midflight: loading: 2 of 8 units{clear}midflight: serving m after 0.0 s\n"
    )


def test_what_is_said_when_up() -> None:
    url = "http://127.0.0.1:8000"
    lines = ready_lines(url, LAYOUT, "midflight", has_api_key=True, has_admin_key=False, is_public=True)
    assert lines[0] == "serving m at http://127.0.0.1:8000"
    assert "w1: layers 19 to 29 of 30, cpu" in lines
    assert any("MIDFLIGHT_ADMIN_KEY" in line for line in lines if line.startswith("warning"))
    assert "http://127.0.0.1:8000/v1/chat/completions" in lines[-1]
    assert "$MIDFLIGHT_API_KEY" in lines[-1]
    quiet = ready_lines(url, LAYOUT, "midflight", has_api_key=False, has_admin_key=False, is_public=False)
    assert not any(line.startswith("warning") for line in quiet)


def test_the_command_for_another_host_is_allowed_what_the_head_is() -> None:
    told = _join_line(
        parsed("--stages", "2", "--no-local-workers", "--rpc-host", "192.0.2.7", "--allow-public-rpc"),
        "192.0.2.7:7000",
    )
    assert told.splitlines() == [
        "waiting for 2 more workers; on each host run",
        "  torchrun --standalone --nproc-per-node 1 -m runtime --head 192.0.2.7:7000 --allow-public-rpc",
    ]
    alone = _join_line(parsed("--stages", "2", "--no-local-workers"), "127.0.0.1:7000")
    assert alone.endswith("--head 127.0.0.1:7000")


async def test_the_command_that_is_printed_works_when_pasted(tmp_path: Path) -> None:
    async with serve(Text(build_tokenizer()), [1]) as api:
        for script, environment in (("scripts/serve", {"MIDFLIGHT_COMMAND": "scripts/midflight"}), ("-m api.cli", {})):
            command = cli._command(environment)
            told = ready_lines(api.url, LAYOUT, command, has_api_key=False, has_admin_key=False, is_public=False)
            (line,) = [line for line in told if line.startswith("layout: ")]
            pasted = line.removeprefix("layout: ").partition("    ")[0]
            process = await asyncio.create_subprocess_shell(
                pasted, stdout=asyncio.subprocess.PIPE, cwd=ROOT, env={**os.environ, "MIDFLIGHT_VENV": sys.prefix}
            )
            out, _ = await process.communicate()
            assert (process.returncode, out.splitlines()[0][:9]) == (0, b"tiny: epo"), (script, pasted)


def test_how_the_command_line_is_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "midflight"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(script), "serve"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli._command({}) == "midflight"
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli._command({}) == str(script)
    assert cli._command({"MIDFLIGHT_COMMAND": "../a b/scripts/midflight"}) == "'../a b/scripts/midflight'"
    monkeypatch.setattr(sys, "argv", ["/somewhere/cli.py"])
    assert cli._command({}) == f"{sys.executable} -m api.cli"

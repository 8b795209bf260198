"""The planner's endpoints, its metrics, its text, and the hook for an autoscaler."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from api.cli import parse_serve
from api.plan_text import plan_lines
from api.scaling import Scaler
from api.text import Text
from runtime.layout import layout_from_counts
from runtime.messages import Join
from scheduler.events import FromWorker
from scheduler.lanes import BatchingConfig
from scheduler.state import ClusterConfig, SchedulerState
from tests.tiny_models import build_tokenizer
from tests.unit.api_harness import Api, serve
from tests.unit.load_harness import llama_8b


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    async with serve(Text(build_tokenizer()), [1]) as running:
        yield running


async def test_the_autopilot_is_set(api: Api) -> None:
    for body, mode in (({"enabled": True}, "on"), ({"mode": "advise"}, "advise"), ({"enabled": False}, "off")):
        assert await api.post("/admin/autopilot", body) == (200, {"mode": mode})
        assert await api.get("/admin/plan") == (200, f'{{"mode":"{mode}"}}')


@pytest.mark.parametrize(
    "body", [{}, {"enabled": 1}, {"mode": "auto"}, {"mode": "on", "enabled": True}, {"other": 1}, {"mode": ["on"]}, []]
)
async def test_what_is_no_mode_is_refused(api: Api, body: Any) -> None:
    status, answer = await api.post("/admin/autopilot", body)
    assert status == 400
    assert answer["error"]["message"]
    assert api.engine.mode == "off"


async def test_a_plan_that_cannot_be_made_yet_is_asked_for_again(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async def not_yet() -> dict[str, Any]:
        raise TimeoutError

    monkeypatch.setattr(api.engine, "plan_view", not_yet)
    status, text = await api.get("/admin/plan")
    assert status == 503
    assert "planner is still being compiled" in str(text)


async def test_metrics(api: Api) -> None:
    _, text = await api.get("/metrics")
    for line in (
        'midflight_autopilot_mode{mode="off"} 1.0',
        "midflight_plan_gain_ratio 0.25",
        'midflight_autopilot_entries_total{kind="shift"} 2.0',
        'midflight_plan_step_seconds{hop="0",layout="present",worker="w0"} 0.012',
        'midflight_plan_step_error_ratio{mean="signed",worker="w0"} -0.01',
        'midflight_plan_service_seconds{source="measured",what="tpot"} 0.021',
        'midflight_plan_workers{state="wanted"} 2.0',
    ):
        assert line in text
    api.engine.staff = {}
    _, text = await api.get("/metrics")
    assert "midflight_plan_workers{" not in text, "an autoscaler would take 0 wanted for an order"


def test_the_text_of_a_head_without_a_load() -> None:
    state = SchedulerState(ClusterConfig(llama_8b(), 2), BatchingConfig())
    for name in ("w0", "w1"):
        info = Join(name, "host", 1, "cuda:0", "NVIDIA L40S", 48 << 30, 40 << 30, 1, {})
        state.step(FromWorker(info, 0.0))
    assert state.layout is not None
    view = state.pilot.view(state, None, None)
    text = "\n".join(plan_lines(view))
    assert "too little was asked yet" in text
    assert "w0 (l40s) [0, " in text
    state.layout = layout_from_counts(1, ["w0", "w1"], [30, 2])
    assert "<- bottleneck" in "\n".join(plan_lines(state.pilot.view(state, None, None)))
    state.layout = None
    assert "no plan" in "\n".join(plan_lines(state.pilot.view(state, None, None)))


def test_flags() -> None:
    config = parse_serve(["m", "--autopilot", "on", "--objective", "goodput", "--slo-ttft", "1.5", "--elastic"], {})
    assert (config.autopilot, config.objective, config.slo_ttft_s, config.elastic) == ("on", "goodput", 1.5, True)
    assert parse_serve(["m"], {}).autopilot == "off"
    with pytest.raises(SystemExit):
        parse_serve(["m", "--autopilot", "yes"], {})


# -- the hook --------------------------------------------------------------------------------------------------


def event(wanted: int, *spare: str) -> dict[str, Any]:
    return {"type": "workers", "workers": {"present": 3, "used": 2, "wanted": wanted, "spare": list(spare)}}


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  a file has no event
            await asyncio.sleep(0.01)


async def test_the_command_is_told_what_is_wanted_once(tmp_path: Path) -> None:
    told = tmp_path / "told"
    command = f'echo "$MIDFLIGHT_WORKERS_WANTED $MIDFLIGHT_WORKERS_SPARE $MIDFLIGHT_WORKERS_SPARE_NAMES" >> {told}'
    scaler = Scaler(command, {}, interval_s=0.05)
    task = asyncio.create_task(scaler.run())
    scaler.on_event({"type": "note", "level": "info", "text": "nothing for it"})
    scaler.on_event(event(5))
    await until(told.exists)
    for _ in range(5):
        scaler.on_event(event(5))
        await asyncio.sleep(0.02)
    scaler.on_event(event(1, "w1", "w2"))
    await until(lambda: told.read_text().count("\n") == 2)
    await asyncio.sleep(0.1)
    task.cancel()
    assert told.read_text() == "5 0 \n1 2 w1 w2\n"


async def test_a_command_that_cannot_be_run_is_tried_again(tmp_path: Path) -> None:
    """What it is to find in its environment is more than a process may have."""
    told = tmp_path / "told"
    scaler = Scaler(f"touch {told}", {"PATH": "/usr/bin:/bin"}, interval_s=0.01)
    task = asyncio.create_task(scaler.run())
    scaler.on_event(event(4, "w" * 200_000))
    await asyncio.sleep(0.1)
    assert not task.done()
    assert not told.exists()
    scaler.on_event(event(4, "w1"))
    await until(told.exists)
    task.cancel()


async def test_a_command_that_fails_or_hangs_is_tried_again(tmp_path: Path) -> None:
    tries = tmp_path / "tries"
    command = f"echo x >> {tries}; case $(wc -l < {tries}) in 1) exit 3;; 2) sleep 60;; esac; touch {tries}.done"
    scaler = Scaler(command, {"PATH": "/usr/bin:/bin"}, interval_s=0.01, timeout_s=0.5)
    task = asyncio.create_task(scaler.run())
    scaler.on_event(event(4))
    await until((tmp_path / "tries.done").exists)
    task.cancel()
    assert tries.read_text() == "x\nx\nx\n"

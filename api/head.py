"""The composition root: a head with its API, scheduler and local workers, from start to shutdown.

Starting: local workers are launched first (they take longest), then the tokenizer is read and HTTP opens, which tells
the progress under ``/health`` from then on. Ending: SIGTERM lets running requests finish up to the drain deadline, a second
signal or Ctrl-C does not wait; either way every process that was started here is gone when `run_head` returns.
"""

import asyncio
import hashlib
import ipaddress
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import psutil
import uvloop
from aiohttp import web

from api.app import build_app, make_runner
from api.config import ServeConfig
from api.context import ApiSettings
from api.pull import PullError, resolve_model
from api.scaling import Scaler
from api.signals import Signals, Stopped, first_of, unless_stopped
from api.status import StatusReporter, Terminal, TerminalHandler, ready_lines
from api.text import Text, load_text
from kvstore.hugepages import gather_heap
from runtime.cores import usable_cores
from runtime.garbage import settle
from runtime.launcher import LocalWorker
from runtime.model.config import inspect_model
from runtime.model.spec import ModelSpec
from runtime.rpc import Door, DoorError
from scheduler.batching import BatchingConfig
from scheduler.driver import Driver
from scheduler.lanes import LookAhead
from scheduler.planning.autopilot import Mode, Settings
from scheduler.planning.traffic import Objective, Slo
from scheduler.state import ClusterConfig, SchedulerState

log = logging.getLogger("midflight.head")

_WORKER_GRACE_S = 3.0
_DRAIN_POLL_S = 0.05
_REPORT_INTERVAL_S, _SERVING_REPORT_INTERVAL_S = 0.25, 1.0


class StartError(Exception):
    """The server cannot start; the message is for the operator."""


def run_head(config: ServeConfig) -> int:
    """Serve until a signal ends it. The exit code: 0 after a signal, 1 when it failed."""
    terminal = Terminal(sys.stderr)
    logging.basicConfig(
        level=config.log_level.upper(),
        format="%(asctime)s %(levelname)s %(message)s",
        handlers=[TerminalHandler(terminal)],
    )
    try:
        return uvloop.run(_Head(config, terminal).run())
    except (StartError, DoorError, PullError, ValueError, OSError) as error:
        terminal.say(f"error: {error}")
        return 1


class _Head:
    def __init__(self, config: ServeConfig, terminal: Terminal) -> None:
        self._config = config
        self._say = terminal.say
        self._terminal = terminal
        self._locals: list[LocalWorker] = []
        self._failed = asyncio.Event()
        self._failure = ""
        self._address = ""
        """Of the head, for workers."""
        self._is_ending = False

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        signals = Signals(asyncio.Event(), asyncio.Event())
        signals.install(loop)
        config = self._config
        try:
            spec = await unless_stopped(signals, _inspect, config, self._say)
        except Stopped:
            return 0
        driver = Driver(_make_state(config, spec), loop)
        door = await loop.run_in_executor(None, _open_door, config, driver)
        runner: web.AppRunner | None = None
        try:
            driver.start(door)
            self._launch(door.address, driver, loop)
            driver.prepare_planner()  # which takes about as long as workers do to load
            text = await unless_stopped(signals, _load_text, spec)
            runner = make_runner(build_app(driver, text, _settings(config, spec)))
            await _listen(runner, config)
            settle()
            log.debug("%d MiB of the heap are on huge pages", await loop.run_in_executor(None, gather_heap) >> 20)
            if config.num_local_workers < config.num_stages:
                self._say(_join_line(config, door.address))
            reporter = loop.create_task(self._report(driver, _address(runner, config)))
            scaler = _start_scaler(config, driver, loop)
            await self._until_told(signals, driver)
            reporter.cancel()
            if scaler is not None:
                scaler.cancel()
        except Stopped:
            pass
        finally:
            await self._end(driver, runner)
        if self._failed.is_set():
            self._say(f"error: {self._failure}")
            return 1
        return 0

    # -- starting -------------------------------------------------------------------------------------------

    def _launch(self, address: str, driver: Driver, loop: asyncio.AbstractEventLoop) -> None:
        config = self._config
        self._address = address
        count = config.num_local_workers
        threads = config.num_threads or max(1, usable_cores() // max(1, count))
        for index in range(count):
            worker = LocalWorker(
                f"w{index}",
                address,
                _worker_args(config, index),
                num_threads=threads,
                environment={"MIDFLIGHT_HOME": str(config.home)},
                on_line=lambda name, line: self._terminal.line(f"[{name}] {line}"),
                on_exit=lambda name, code: self._local_exit(loop, driver, name, code),
            )
            worker.start()
            self._locals.append(worker)

    def _local_exit(self, loop: asyncio.AbstractEventLoop, driver: Driver, name: str, code: int) -> None:
        """In the worker's monitor thread; the last one may come when the loop is closed already."""
        if not self._is_ending:
            loop.call_soon_threadsafe(self._local_ended, driver, name, code)

    def _local_ended(self, driver: Driver, name: str, code: int) -> None:
        """A local worker has no restart left, or was told to end. Without any other, or before anything has served, that is the end of the server."""
        if self._is_ending:
            return
        how = f"ended with code {code}" if code else "was told to end"
        reason = f"local worker {name} {how} and will not be started again"
        is_left = any(worker.poll() is None for worker in self._locals if worker.name != name)
        from_elsewhere = _members(driver) - {worker.name for worker in self._locals}
        if (driver.served_once or not code) and (is_left or from_elsewhere):
            log.warning(
                "%s; the others go on. Another one joins with\n  %s", reason, _join_command(self._config, self._address)
            )
            driver.nobody_comes()
        else:
            self._fail(reason)

    def _fail(self, reason: str) -> None:
        self._failure = self._failure or reason
        self._failed.set()

    async def _report(self, driver: Driver, url: str) -> None:
        """Tell the terminal what is going on, until it is up, and again whenever the status changes."""
        config = self._config
        reporter = StatusReporter(
            self._terminal,
            lambda: ready_lines(
                url,
                driver.layout_view(),
                config.command,
                has_api_key=bool(config.api_key),
                has_admin_key=bool(config.admin_key),
                is_public=_is_public(config.host),
            ),
            _uptime_s,
        )
        while True:
            health = driver.health()
            if health.status == "failed":
                self._fail(health.detail)
                return
            reporter.update(health)
            await asyncio.sleep(_SERVING_REPORT_INTERVAL_S if health.status == "serving" else _REPORT_INTERVAL_S)

    # -- ending ---------------------------------------------------------------------------------------------

    async def _until_told(self, signals: Signals, driver: Driver) -> None:
        """Return when it is time to end: at once after a failure or an interrupt, drained after SIGTERM."""
        await first_of(signals.draining, self._failed)
        driver.begin_drain()
        deadline_s = asyncio.get_running_loop().time() + self._config.drain_timeout_s
        if driver.num_unfinished() and not signals.stopping.is_set() and not self._failed.is_set():
            self._say(f"draining {driver.num_unfinished()} requests, {self._config.drain_timeout_s:g} s at most")
        while driver.num_unfinished() and not signals.stopping.is_set() and not self._failed.is_set():
            if asyncio.get_running_loop().time() > deadline_s:
                self._say(f"the drain deadline has passed; {driver.num_unfinished()} requests are cut off")
                break
            await asyncio.sleep(_DRAIN_POLL_S)

    async def _end(self, driver: Driver, runner: web.AppRunner | None) -> None:
        """Say farewell to clients and workers, and return when every process is gone."""
        self._is_ending = True
        self._say("stopping")
        members = _members(driver)
        await driver.close("the server is shutting down")
        await asyncio.gather(_clean_up(runner), self._end_workers(members))

    async def _end_workers(self, members: set[str]) -> None:
        """Members have been told to end. Those that never joined have not; and nobody gets long."""
        for worker in self._locals:
            if worker.name not in members:
                worker.terminate(_WORKER_GRACE_S)
        ended = asyncio.gather(*(worker.wait() for worker in self._locals))
        try:
            await asyncio.wait_for(asyncio.shield(ended), _WORKER_GRACE_S)
        except TimeoutError:
            for worker in self._locals:
                worker.terminate(_WORKER_GRACE_S)
        await ended


def _members(driver: Driver) -> set[str]:
    """Who has joined, by the names they were first started with: a restarted worker's has a suffix."""
    return {re.sub(r"-r[0-9]+$", "", worker["name"]) for worker in driver.workers_view()}


def _start_scaler(config: ServeConfig, driver: Driver, loop: asyncio.AbstractEventLoop) -> "asyncio.Task[None] | None":
    if not config.scale_command:
        return None
    scaler = Scaler(config.scale_command, os.environ)
    driver.listen(scaler.on_event)
    return loop.create_task(scaler.run())


async def _clean_up(runner: web.AppRunner | None) -> None:
    if runner is not None:
        await runner.cleanup()


def _inspect(config: ServeConfig, say: Callable[[str], None]) -> ModelSpec:
    folder = resolve_model(config.model, config.home, say)
    return inspect_model(
        folder,
        dtype=config.dtype,
        load_format=config.load_format,
        max_context=config.max_context or None,
        name=config.served_model_name or Path(folder).resolve().name,
        quantize=config.quantize,
    )


def _look_ahead(config: ServeConfig) -> LookAhead:
    if config.look_ahead == "auto":
        return "idle" if config.num_local_workers and not _is_on_cuda(config) else "always"
    return cast("LookAhead", config.look_ahead)


def _make_state(config: ServeConfig, spec: ModelSpec) -> SchedulerState:
    if config.layers and sum(config.layers) != spec.num_layers:
        raise StartError(
            f"--layers {','.join(map(str, config.layers))} adds up to {sum(config.layers)} layers, "
            f"{spec.name} has {spec.num_layers}"
        )
    if not config.layers and config.num_stages > spec.num_layers:
        raise StartError(f"--stages {config.num_stages}: {spec.name} has only {spec.num_layers} layers")
    what = f"{spec.folder}\0{spec.dtype}\0{spec.architecture}\0{config.implementation}\0{config.quantize}"
    batching = BatchingConfig(
        num_microbatches=config.num_microbatches,
        max_step_tokens=config.step_tokens,
        max_running=config.max_running,
        max_queue=config.max_queue,
        block_size=config.block_size or _default_block_size(config),
        look_ahead=_look_ahead(config),
        prefix_cache=config.prefix_cache,
        tpot_goal_s=config.tpot_goal_s,
        cache_root=hashlib.blake2b(what.encode(), digest_size=16).digest(),
    )
    cluster = ClusterConfig(
        spec=spec,
        num_stages=config.num_stages,
        layers=config.layers or None,
        kv_bytes=config.kv_memory,
        memory_fraction=config.memory_fraction,
        implementation=config.implementation,
        autopilot=cast("Mode", config.autopilot),
        piloting=Settings(
            objective=cast("Objective", config.objective),
            slo=Slo(config.slo_ttft_s, config.slo_tpot_s),
            elastic=config.elastic,
            tells_workers=bool(config.scale_command),
        ),
    )
    return SchedulerState(cluster, batching)


def _open_door(config: ServeConfig, driver: Driver) -> Door:
    return Door(
        "head",
        f"{config.rpc_host}:{config.rpc_port}",
        is_head=True,
        handler=driver.receive,
        on_lost=driver.peer_lost,
        allow_public=config.allow_public_rpc,
    )


def _worker_args(config: ServeConfig, index: int) -> list[str]:
    device = config.device
    if device in ("auto", "cuda"):
        count = _num_cuda_devices()
        if count:
            device = f"cuda:{index % count}"
    args = ["--name", f"w{index}", "--device", device, "--log-level", config.log_level]
    if config.log_level == "info":
        args[-1] = "warning"
    if config.paces and config.paces[index]:
        args += ["--pace", config.paces[index]]
    if config.device_tensors:
        args.append("--device-tensors")
    return [*args, "--allow-public-rpc"] if config.allow_public_rpc else args


def _default_block_size(config: ServeConfig) -> int:
    return 256 if _is_on_cuda(config) else 16


def _is_on_cuda(config: ServeConfig) -> bool:
    return config.device.startswith("cuda") or (config.device == "auto" and _num_cuda_devices() > 0)


def _num_cuda_devices() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _load_text(spec: ModelSpec) -> Text:
    return load_text(Path(spec.folder))


def _settings(config: ServeConfig, spec: ModelSpec) -> ApiSettings:
    return ApiSettings(
        model_names=(spec.name,),
        eos_token_ids=spec.eos_token_ids,
        api_key=config.api_key,
        admin_key=config.admin_key,
        max_body_bytes=config.max_body_bytes,
    )


async def _listen(runner: web.AppRunner, config: ServeConfig) -> None:
    await runner.setup()
    try:
        await web.TCPSite(runner, config.host, config.port, backlog=1024).start()
    except OSError as error:
        raise StartError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror}; choose another --port"
        ) from error


def _join_line(config: ServeConfig, address: str) -> str:
    missing = config.num_stages - config.num_local_workers
    return f"waiting for {missing} more worker{'s' if missing > 1 else ''}; on each host run\n  {_join_command(config, address)}"


def _join_command(config: ServeConfig, address: str) -> str:
    allow = " --allow-public-rpc" if config.allow_public_rpc else ""
    return f"torchrun --standalone --nproc-per-node 1 -m runtime --head {address}{allow}"


def _address(runner: web.AppRunner, config: ServeConfig) -> str:
    """Where a client on this host finds us; the port may have been chosen by the system."""
    host = "127.0.0.1" if config.host in ("", "0.0.0.0", "::") else config.host
    return f"http://{f'[{host}]' if ':' in host else host}:{runner.addresses[0][1]}"


def _is_public(host: str) -> bool:
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def _uptime_s() -> float:
    """Since the process was started: what the user has waited, imports included."""
    return time.time() - psutil.Process().create_time()

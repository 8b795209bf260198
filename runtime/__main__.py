"""``torchrun --standalone --nproc-per-node 1 -m runtime --head HOST:PORT``: a worker's process.

It joins the head, serves until it is told to end, and exits with 0 (its agent does not start it again). When the
head goes away a worker that was started by hand keeps its weights and looks for a new head at the same address; one
that was started by a head (``--lifeline-pid``) ends with it. When that head lives but has given the worker up (it was
evicted because it stood still for too long), it exits with 1 as after a crash. A crash exits with 1, and the agent starts a
new process, which joins under the next name (``w0``, ``w0-r1``, ...).
"""

import argparse
import contextlib
import faulthandler
import logging
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from runtime.address import Unreachable, parse_address
from runtime.pace import parse_pace

log = logging.getLogger("midflight.worker")

_MAX_FILES = 65536
"""Descriptors that are asked for, as far as they may be: every large weight is a file (`runtime.pages`)."""
_HEAD_ENDS_WITHIN_S = 1.0
"""How long after its connections a head that dies may be seen as a process; a living one has given the worker up."""
_TRY_AGAIN_S = 1.0
"""How long after it lost its head, or found none, a worker looks for the next."""
_SWITCH_INTERVAL_S = 0.0005
"""How long the compute thread may wait for the interpreter's lock while another thread (a shadow's loader) has it."""


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    faulthandler.enable()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    home = Path(os.environ.get("MIDFLIGHT_HOME") or Path.home() / ".cache" / "midflight")
    os.environ.setdefault("NUMBA_CACHE_DIR", str(home / "numba"))
    # torch's threads spin after work otherwise, on the kernels' cores; read when it is imported
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(
        level=args.log_level.upper(),
        format=f"%(asctime)s %(levelname)s {args.name or 'worker'}: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("numba").setLevel(logging.WARNING)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS says that there is no limit, and has one
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, _MAX_FILES)), hard))
    try:
        process = _Process(args)
    except ValueError as error:
        log.error("%s", error)
        return 2
    return process.run()


class _Process:
    """The loop around `Worker`: one life per head.

    Never true: a life begins while something of the one before holds memory, but for the units, which the loader keeps.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        from runtime.cores import usable_cores
        from runtime.device import choose_device
        from runtime.lifeline import watch
        from runtime.loading import Loader
        from runtime.priority import Priority

        self._args = args
        if args.lifeline_pid:
            watch(args.lifeline_pid, lambda: os._exit(0))
        threads = args.threads or int(os.environ.get("OMP_NUM_THREADS", "0")) or usable_cores()
        self._device = choose_device(args.device, threads, args.emulation)
        self._loader = Loader(self._device)
        self._priority = Priority()
        if args.device_tensors and self._loader.queued is not None:
            self._loader.queued.runner.sends_device = True
        self._base = args.name or _default_name()
        self._turn = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self._worker: Any = None
        self._leaving = False
        self._lost_since_s: float | None = None

    def run(self) -> int:
        from runtime.garbage import collect, settle

        settle()
        signal.signal(signal.SIGTERM, lambda *_: self._leave())
        while (code := self._live()) is None:
            collect()  # a worker, its member and the error that ended them hold each other
            time.sleep(_TRY_AGAIN_S)
            self._turn += 1
        return code

    def _live(self) -> int | None:
        """One life: join the head and serve it. The process's exit status, or None when the head is gone and another is looked for."""
        from runtime.rpc import DoorError
        from runtime.worker import HeadLost, StepError, Worker

        replaces = self._name(self._turn - 1) if self._turn else ""
        name = self._name(self._turn)
        self._worker = worker = Worker(name, replaces, self._device, self._loader, self._priority)
        if self._leaving:
            return 0
        try:
            log.info("ending: %s", worker.run(self._door))
            return 0
        except StepError:
            return 1
        except (HeadLost, DoorError) as error:
            code = self._after(str(error), worker.has_joined)
        self._worker = None
        if code is None:
            worker.release()
        return code

    def _after(self, error: str, had_joined: bool) -> int | None:
        """What becomes of this process now that the head is lost, or was not found (it had not joined it): as `_live`."""
        if self._args.lifeline_pid and not self._leaving:
            time.sleep(_HEAD_ENDS_WITHIN_S)  # if it has died, the lifeline ends us here
        if self._leaving:
            return 0
        if self._args.lifeline_pid:
            log.warning("the head lives and has given this worker up (%s): it starts again", error)
            return 1
        now_s = time.monotonic()
        if had_joined or self._lost_since_s is None:
            self._lost_since_s = now_s
        if now_s - self._lost_since_s > self._args.rejoin_timeout:
            log.error("no head at %s for %.0f s: %s", self._args.head, self._args.rejoin_timeout, error)
            return 0
        log.warning("the head at %s is not there (%s); trying again", self._args.head, error)
        return None

    def _door(self, handler: Any, on_lost: Any) -> Any:
        from runtime.rpc import Door

        return Door(
            self._name(self._turn),
            self._args.head,
            is_head=False,
            handler=handler,
            on_lost=on_lost,
            allow_public=self._args.allow_public_rpc,
            device=self._device.device.index if self._args.device_tensors else None,
        )

    def _name(self, turn: int) -> str:
        return self._base if turn == 0 else f"{self._base}-r{turn}"

    def _leave(self) -> None:
        """In a signal handler: the agent (or the operator) wants this process to end."""
        self._leaving = True
        if self._worker is not None:
            self._worker.leave("SIGTERM")


def _default_name() -> str:
    """Stable across the restarts of one agent, different between agents."""
    run = os.environ.get("TORCHELASTIC_RUN_ID") or str(os.getpid())
    return f"{socket.gethostname().partition('.')[0]}-{run[:6]}"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m runtime", description="A Midflight worker, started by torchrun.")
    parser.add_argument("--head", required=True, metavar="HOST:PORT", help="the head's rendezvous address")
    parser.add_argument("--name", default="", help="the worker's name (default: host and agent)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument(
        "--device-tensors", action="store_true", help="send large hidden states from CUDA device to CUDA device"
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="compute threads (default: OMP_NUM_THREADS, or all usable cores)"
    )
    parser.add_argument(
        "--pace",
        default="",
        help="emulate a slower device: a100, or prefill=1.0,decode=2.4, or read=0.005,token=0.0001",
    )
    parser.add_argument("--allow-public-rpc", action="store_true", help="bind RPC to an address that is not loopback")
    parser.add_argument("--rejoin-timeout", type=float, default=600.0, metavar="SECONDS")
    parser.add_argument("--lifeline-pid", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    args = parser.parse_args(argv)
    try:
        args.emulation = parse_pace(args.pace) if args.pace else None
    except ValueError as error:
        parser.error(f"--{error}")
    try:
        parse_address(args.head, allow_public=args.allow_public_rpc)
    except ValueError as error:
        parser.error(f"--head: {error}")
    except Unreachable:
        pass  # the head may come up later than this, and its name with it
    return args


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is closed; to take torch apart module by module would need seconds

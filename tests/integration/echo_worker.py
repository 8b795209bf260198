"""A worker without a model: joins a head and does what its messages say. Run by the door's and the launcher's tests.

Calls: ``echo TEXT``, ``say PEER TEXT`` (a call to a peer, its reply handed back), ``about``, ``received`` (the sends so
far), ``members``, ``tell PEER TEXT`` (a send to a peer; an error of it is remembered), ``cut PEER`` (ends the
connection by which messages go there), ``exit CODE``, ``fail``, ``smuggle PATH`` (a pickle that would create PATH, sent to the head).
Sends: ``back`` returns its tensors to the head; anything else is remembered. It ends with 3 when it loses its head.
"""

import argparse
import json
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence

import torch

from runtime import lifeline
from runtime.rpc import Door, DoorError


class Echo:
    def __init__(self, args: argparse.Namespace, say: Callable[[str], None]) -> None:
        self.args = args
        self.say = say
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.name = args.name + (f"-r{restart}" if restart != "0" else "")
        self.received: list[str] = []
        self.lost = threading.Event()
        self.door: Door | None = None

    def handle(self, payload: bytes, tensors: list[torch.Tensor]):
        assert self.door is not None
        word, _, rest = payload.decode().partition(" ")
        if word == "echo":
            return rest.encode()
        if word == "say":
            peer, _, text = rest.partition(" ")
            return self.door.call(peer, f"echo {text}".encode(), timeout_s=10.0)
        if word == "back":
            self.door.send("head", b"back", tensors)
            return None
        if word == "about":
            keys = ("OMP_NUM_THREADS", "RANK", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
            about = {"pid": os.getpid(), "parent": os.getppid(), "cwd": os.getcwd()}
            return json.dumps(about | {key: os.environ.get(key) for key in keys}).encode()
        if word == "received":
            return json.dumps(self.received).encode()
        if word == "members":
            return json.dumps(self.door.members()).encode()
        if word == "tell":
            peer, _, text = rest.partition(" ")
            self.door.send(peer, text.encode(), on_error=lambda error: self.received.append(str(error)))
            return b""
        if word == "cut":
            return str(_cut(self.door._peers[rest].member.address)).encode()
        if word == "exit":
            threading.Timer(0.1, os._exit, (int(rest),)).start()
            return b""
        if word == "fail":
            raise LookupError("as you wish")
        if word == "smuggle":
            agent, head = self.door._agent, self.door._peers["head"]
            assert agent is not None
            future = agent.post(head.handle, pickle.dumps(_Touch(rest)), [], 5.0, answered_later=False)
            future.add_done_callback(lambda done: self.received.append(str(self.door._outcome("head", done)[1])))
            return b""
        self.received.append(payload.decode())
        return None

    def join(self) -> Door:
        if self.args.hang == "before-admission":
            Door._ask_admission = self.hang  # type: ignore[method-assign]
        if self.args.hang == "after-admission":
            Door._watch = self.hang  # type: ignore[method-assign]
        return Door(
            self.name,
            self.args.head,
            is_head=False,
            handler=self.handle,
            on_lost=lambda _: self.lost.set(),
            join_timeout_s=20.0,
        )

    def run(self) -> int:
        while True:
            try:
                self.door = self.join()
            except DoorError as error:
                self.say(f"refused: {error}")
                return 4
            self.say(f"joined as {self.name}")
            while not self.lost.wait(0.02 if self.args.tick else 3600.0):
                self.door.send("head", f"tick {self.name}".encode())
            if not self.args.rejoin:
                self.say("lost its head")
                os._exit(3)
            self.lost.clear()
            self.door.close()

    def hang(self, *_: object) -> None:
        self.say("hanging")
        time.sleep(3600)


def _cut(address: str) -> int:
    """Shut down this process's connections to `address`, as a reset does: both ends live. How many there were."""
    port, count = int(address.rpartition(":")[2]), 0
    for number in os.listdir("/proc/self/fd"):
        try:
            connection = socket.socket(fileno=os.dup(int(number)))
        except OSError:
            continue  # no socket
        with connection:
            try:
                if connection.getpeername()[1] == port:
                    connection.shutdown(socket.SHUT_RDWR)
                    count += 1
            except (OSError, IndexError):
                continue  # a listener, or not of the internet
    return count


class _Touch:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def main(argv: Sequence[str] | None = None, say: Callable[[str], None] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--head", required=True)
    parser.add_argument("--name", default="echo")
    parser.add_argument("--lifeline-pid", type=int, default=0)
    parser.add_argument("--hang", default="")
    parser.add_argument("--rejoin", action="store_true")
    parser.add_argument("--tick", action="store_true")
    parser.add_argument("--deaf", action="store_true", help="ignore SIGTERM")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.lifeline_pid:
        lifeline.watch(args.lifeline_pid, lambda: os._exit(0))
    signal.signal(signal.SIGTERM, signal.SIG_IGN if args.deaf else lambda *_: os._exit(0))
    return Echo(args, say or (lambda text: print(text, flush=True))).run()


if __name__ == "__main__":
    sys.exit(main())

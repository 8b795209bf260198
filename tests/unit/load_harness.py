"""A served load for the autopilot's tests: requests that progress as a pipeline of true speeds says, in steps of half a second.

The world knows the devices' true speeds; the autopilot is given those that it believes in.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from runtime.layout import Layout
from runtime.model.spec import ModelSpec
from scheduler.planning.autopilot import Autopilot, Decision, Settings
from scheduler.planning.cost import Facts, Speed
from scheduler.planning.devices import lookup
from scheduler.planning.forecast import Device, Pipeline
from scheduler.planning.monitor import Running
from scheduler.planning.traffic import Serving, Traffic

TICK_S = 0.5
SERVING = Serving(max_step_tokens=512, max_running=256)


def llama_8b() -> ModelSpec:
    layer = (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) * 2
    head = 128_256 * 4096 * 2
    return ModelSpec(
        name="llama-8b", folder="", architecture="LlamaForCausalLM", dtype="bfloat16", load_format="dummy",
        num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=8, head_dim=128, vocab_size=128_256,
        max_context=8192, tied_embeddings=False, layer_bytes=(layer,) * 32, embedding_bytes=head, lm_head_bytes=head,
        layer_flops_per_token=(layer,) * 32, lm_head_flops_per_token=head, eos_token_ids=(),
    )  # fmt: skip


FACTS = Facts(llama_8b())


def device(worker: str, kind: str, slower: float = 1.0) -> Device:
    speed = Speed(lookup(kind))
    return Device(worker, Speed(speed.kind, tuple(slower * scale for scale in speed.scale)))


@dataclass
class Phase:
    """For so many seconds: clients in a closed loop, or (open) requests per second, with these mean lengths; neither: nothing comes."""

    seconds: float
    prompt: float
    output: float
    clients: int = 0
    rate: float = 0.0
    limit: float = 0.0
    """The limit that clients set, over what they get; 0: the same limit of 1,000 for all."""


@dataclass
class _Running:
    arrived_s: float
    prompt: int
    output: int
    limit: int
    ttft_s: float
    tokens: float = 0.0
    waited_s: float = 0.0


class World:
    """Serves a sequence of phases over `present`, carrying out what the autopilot decides after `change_s`."""

    def __init__(
        self, autopilot: Autopilot, true: Sequence[Device], believed: Sequence[Device], present: Layout, seed: int
    ) -> None:
        self.autopilot, self.true, self.believed, self.present = autopilot, list(true), list(believed), present
        self.random = random.Random(seed)
        self.now_s = 0.0
        self.changes: list[tuple[float, Layout]] = []
        self.tokens = 0.0
        self.spread = 0.4
        self.refuse = ""
        self._running: list[_Running] = []
        self._ended = 0.0
        self._next_arrival_s = 0.0
        self._change: tuple[float, Decision] | None = None

    def run(self, *phases: Phase) -> None:
        for phase in phases:
            until_s = self.now_s + phase.seconds
            while self.now_s < until_s:
                self._tick(phase)

    def _tick(self, phase: Phase) -> None:
        self._arrive(phase)
        self.now_s += TICK_S
        self._serve(phase)
        pilot = self.autopilot
        running = [Running(r.arrived_s, int(r.tokens), r.limit) for r in self._running]
        pilot.observe(self.now_s, running, 0, int(self.tokens))
        if self._change is not None and self.now_s >= self._change[0]:
            self.present = self._change[1].layout
            self._change = None
            self.changes.append((self.now_s, self.present))
            pilot.committed(self.now_s, self.present)
        decision = pilot.decide(self.now_s, self.believed, self.present, is_free=self._change is None)
        if decision is not None and self.refuse:
            pilot.failed(self.now_s, decision.layout, self.refuse)
            self.changes.append((self.now_s, decision.layout))
        elif decision is not None:
            self._change = self.now_s + 2.0, decision

    def _arrive(self, phase: Phase) -> None:
        if phase.clients:
            while len(self._running) < phase.clients:
                self._begin(phase, self.now_s)
            return
        self._next_arrival_s = max(self._next_arrival_s, self.now_s)
        if not phase.rate:
            return
        while self._next_arrival_s < self.now_s + TICK_S:
            self._begin(phase, self._next_arrival_s)
            self._next_arrival_s += self.random.expovariate(phase.rate)

    def _begin(self, phase: Phase, at_s: float) -> None:
        prompt, output = (max(1, round(mean * self._around_one())) for mean in (phase.prompt, phase.output))
        ttft_s, _ = self._speeds(phase)
        limit = round(output * phase.limit) or 1000
        self.autopilot.monitor.arrived(at_s, prompt, limit)
        self._running.append(_Running(at_s, prompt, output, limit, ttft_s))

    def _serve(self, phase: Phase) -> None:
        _, tpot_s = self._speeds(phase)
        still: list[_Running] = []
        for request in self._running:
            left_s = min(TICK_S, self.now_s - request.arrived_s)
            while request is not None and left_s > 0:
                wait_s = min(left_s, max(0.0, request.ttft_s - request.waited_s))
                request.waited_s += wait_s
                left_s -= wait_s
                step = min(request.output - request.tokens, left_s / tpot_s)
                request.tokens += step
                self.tokens += step
                left_s -= step * tpot_s
                if request.tokens < request.output:
                    break
                self._end(request, tpot_s)
                request = self._again(phase, left_s) if phase.clients > len(still) else None
            if request is not None:
                still.append(request)
        self._running = still[: phase.clients] if phase.clients else still

    def _again(self, phase: Phase, left_s: float) -> _Running:
        self._begin(phase, self.now_s - left_s)
        return self._running.pop()

    def _end(self, request: _Running, tpot_s: float) -> None:
        self.autopilot.monitor.ended(
            self.now_s, request.arrived_s, request.prompt, request.output, 0, ttft_s=request.ttft_s,
            decode_s=(request.output - 1) * tpot_s, max_tokens=request.limit,
        )  # fmt: skip

    def _around_one(self) -> float:
        return math.exp(self.random.gauss(0.0, self.spread) - self.spread**2 / 2)

    def _speeds(self, phase: Phase) -> tuple[float, float]:
        """TTFT and TPOT, by the true speeds."""
        number = phase.clients or max(1, len(self._running))
        return _true_speeds(tuple(self.true), self.present, phase.prompt, phase.output, number)


@lru_cache(maxsize=4096)
def _true_speeds(
    devices: tuple[Device, ...], present: Layout, prompt: float, output: float, number: int
) -> tuple[float, float]:
    traffic = Traffic(prompt_tokens=prompt, output_tokens=output, concurrency=float(number))
    forecast = Pipeline(FACTS, devices, present, traffic, SERVING).forecast()
    request_s = forecast.num_sequences / forecast.requests_per_s
    return max(1e-3, request_s - (output - 1) * forecast.tpot_s), forecast.tpot_s


def make(mode: str = "on", **settings: object) -> Autopilot:
    return Autopilot(FACTS, Settings(**settings), SERVING, mode)  # type: ignore[arg-type]

"""The real scheduler and stage states over a simulated clock, network and model.

A simulated worker keeps, for each block, the tokens whose KV rows it would hold. When a step reads a context, what
the blocks hold must be exactly the sequence's tokens: a block handed on too early, a wrong prefix hit or a lost write
shows at once. The "model" is a hash: the next token is a function of all tokens before it, so the reference output
of a request needs no pipeline at all.
"""

import heapq
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from runtime.messages import (
    HopTiming,
    Join,
    Load,
    Loaded,
    Sampling,
    StepPlan,
    StepResult,
    decode_plan,
    encode,
)
from runtime.model.spec import ModelSpec
from runtime.stage_state import PlannedBatch, StageState, StepOrder
from scheduler.batching import BatchingConfig
from scheduler.request import AdmissionError, Request, TokenOutput
from scheduler.state import (
    Cancel,
    ClusterConfig,
    Emit,
    Event,
    EvictWorker,
    FromWorker,
    PeerDown,
    Report,
    SchedulerState,
    Send,
    SendStep,
    Submit,
    Tick,
)

VOCAB = 97
STOP = 96


def next_token(tokens: list[int]) -> int:
    """The simulated model."""
    return zlib.crc32(bytes(tokens)) % VOCAB


def reference(request: Request) -> list[int]:
    """What `request` must produce."""
    tokens = list(request.prompt)
    while len(tokens) - len(request.prompt) < request.max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] in request.stop_token_ids:
            break
    return tokens[len(request.prompt) :]


def make_spec(num_layers: int) -> ModelSpec:
    return ModelSpec(
        name="sim", folder="sim", architecture="Sim", dtype="float32", load_format="dummy", num_layers=num_layers,
        hidden_size=8, num_heads=2, num_kv_heads=1, head_dim=4, vocab_size=VOCAB, max_context=200,
        tied_embeddings=True, layer_bytes=(100,) * num_layers, embedding_bytes=100, lm_head_bytes=300,
        layer_flops_per_token=(100,) * num_layers, lm_head_flops_per_token=300, eos_token_ids=(STOP,),
    )  # fmt: skip


@dataclass
class SimWorker:
    name: str
    num_pages: int
    alive: bool = True
    load: Load | None = None
    state: StageState | None = None
    order: dict[int, StepOrder[Any]] = field(default_factory=dict)
    kv: dict[int, dict[int, int]] = field(default_factory=dict)


@dataclass
class Stream:
    request: Request
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    cancelled: bool = False


class SimCluster:
    """A head and its workers. `run` drives everything until nothing is left to do."""

    def __init__(
        self, seed: int, *, num_stages: int, batching: BatchingConfig, num_blocks: int, num_layers: int = 6
    ) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        cluster = ClusterConfig(spec=make_spec(num_layers), num_stages=num_stages, rejoin_timeout_s=3.0)
        self.head = SchedulerState(cluster, batching)
        self.workers: dict[str, SimWorker] = {}
        self.streams: dict[int, Stream] = {}
        self.rejected: list[AdmissionError] = []
        self.num_blocks = num_blocks
        self.restarts = 0
        for index in range(num_stages):
            self.at(0.01 * index, lambda index=index: self.start_worker(f"w{index}", ""))

    # -- driving --------------------------------------------------------------------------------------------

    def at(self, delay: float, action: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (self.now + delay, self._num_events, action))

    def run(self, until: float = 10_000.0) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, action = heapq.heappop(self._events)
            action()

    def handle(self, event: Event) -> None:
        effects = self.head.step(event)
        self.head.check_integrity()
        for effect in effects:
            match effect:
                case SendStep():
                    plan = encode(effect.plan)
                    self._transmit(effect.worker, lambda w, plan=plan: self._step(w, 0, plan, []))
                case Send():
                    assert isinstance(effect.message, Load)
                    self._transmit(effect.worker, lambda w, load=effect.message: self._load(w, load))
                case Emit():
                    self._emit(effect.sequence, effect.output)
                case EvictWorker() | Report():
                    pass

    # -- clients --------------------------------------------------------------------------------------------

    def submit(self, sequence: int, request: Request) -> None:
        try:
            self.streams[sequence] = Stream(request)
            self.handle(Submit(sequence, request, self.now))
        except AdmissionError as error:
            del self.streams[sequence]
            self.rejected.append(error)

    def cancel(self, sequence: int) -> None:
        stream = self.streams.get(sequence)
        if stream is not None and stream.finish_reason is None:
            stream.cancelled = True
            self.handle(Cancel(sequence, "abort"))

    def _emit(self, sequence: int, output: TokenOutput) -> None:
        stream = self.streams[sequence]
        assert not stream.cancelled, f"sequence {sequence} was cancelled and still got {output}"
        assert stream.finish_reason is None, f"sequence {sequence} got {output} after its end"
        stream.tokens += output.tokens
        stream.finish_reason = output.finish_reason

    # -- workers --------------------------------------------------------------------------------------------

    def start_worker(self, name: str, replaces: str) -> None:
        self.workers[name] = SimWorker(name, self.num_blocks * 6)
        join = Join(name, "host", 1, "cpu", "sim", 1, 1, 1, {}, replaces)
        self._to_head(self.workers[name], lambda: FromWorker(join, self.now))

    def crash(self, name: str) -> None:
        """Kill a worker; the head learns of it later, and a new incarnation joins later still, or never."""
        worker = self.workers.get(name)
        if worker is None or not worker.alive:
            return
        worker.alive = False
        self.at(self.random.uniform(0.01, 0.5), lambda: self.handle(PeerDown(name, "killed", self.now)))
        if self.random.random() < 0.8:
            self.restarts += 1
            base = name.partition("-")[0]
            restarted = f"{base}-r{self.restarts}"
            self.at(self.random.uniform(0.3, 2.0), lambda: self.start_worker(restarted, name))

    def tick(self) -> None:
        for worker in self.workers.values():
            if worker.alive:
                self.head.members.seen(worker.name, self.now)
        self.handle(Tick(self.now))

    def _transmit(self, to: str, deliver: Callable[[SimWorker], None]) -> None:
        """One message: any delay, any order, sometimes twice."""
        copies = 2 if self.random.random() < 0.05 else 1
        for _ in range(copies):
            self.at(self._delay(), lambda: self._arrive(to, deliver))

    def _arrive(self, to: str, deliver: Callable[[SimWorker], None]) -> None:
        worker = self.workers.get(to)
        if worker is not None and worker.alive:
            deliver(worker)

    def _to_head(self, worker: SimWorker, event: Callable[[], Event]) -> None:
        self.at(self._delay(), lambda: self.handle(event()))

    def _delay(self) -> float:
        return self.random.choice((0.0005, 0.001, self.random.expovariate(300.0)))

    def _load(self, worker: SimWorker, load: Load) -> None:
        if worker.load is not None and load.layout.epoch <= worker.load.layout.epoch:
            return
        worker.load, worker.order, worker.kv = load, {}, {}
        hops = sum(s.worker == worker.name for s in load.layout.segments)
        worker.state = StageState(load.block_size, hops)
        epoch = load.layout.epoch
        loaded = Loaded(worker.name, epoch, 1, worker.num_pages, 1, 0.1, "sim")
        self.at(0.1, lambda: worker.alive and self._to_head(worker, lambda: FromWorker(loaded, self.now)))

    def _step(self, worker: SimWorker, hop: int, raw: bytes, timings: list[HopTiming]) -> None:
        plan = decode_plan(raw)
        if worker.load is None or plan.epoch != worker.load.layout.epoch:
            return
        order = worker.order.setdefault(hop, StepOrder())
        order.push(plan.ordinal, (plan, raw, timings))
        while (due := order.pop()) is not None:
            self._run(worker, hop, *due)

    def _run(self, worker: SimWorker, hop: int, plan: StepPlan, raw: bytes, timings: list[HopTiming]) -> None:
        assert worker.state is not None
        assert worker.load is not None
        batch = worker.state.plan_batch(plan)
        worker.state.check_integrity()
        contexts = self._write_and_read(worker, batch, worker.load.block_size)
        timings = [*timings, HopTiming(worker.name, 0, 0, 10, 0)]
        layout = worker.load.layout
        if hop + 1 < layout.num_hops:
            following = layout.segments[hop + 1].worker
            self._transmit(following, lambda w: self._step(w, hop + 1, raw, timings))
            return
        tokens = [next_token(c) for row, c in zip(plan.rows, contexts, strict=True) if row.sample]
        result = StepResult(plan.epoch, plan.ordinal, plan.microbatch, tokens, [], [], timings)
        self._to_head(worker, lambda: FromWorker(result, self.now))

    def _write_and_read(self, worker: SimWorker, batch: PlannedBatch, block_size: int) -> list[list[int]]:
        """Write the rows' tokens into the blocks, then read back each whole context and hold it against the truth."""
        contexts = []
        for index, row in enumerate(batch.plan.rows):
            table = batch.block_tables[index]
            for offset, token in enumerate(row.tokens):
                position = row.start + offset
                worker.kv.setdefault(int(table[position // block_size]), {})[position % block_size] = token
            length = int(batch.context_lens[index])
            context = [worker.kv[int(table[p // block_size])].get(p % block_size, -1) for p in range(length)]
            stream = self.streams.get(row.sequence)
            if stream is not None:
                known = stream.request.prompt + stream.tokens
                shared = min(len(known), length)
                assert context[:shared] == known[:shared], (
                    f"{worker.name} reads {context} for sequence {row.sequence}, whose tokens are {known}"
                )
            contexts.append(context)
        return contexts


def make_request(rng: random.Random, prompts: list[list[int]], *, max_prompt: int, max_output: int) -> Request:
    """A prompt of its own, or one that continues an earlier prompt (so that the prefix cache is hit)."""
    if prompts and rng.random() < 0.5:
        base = rng.choice(prompts)
        prompt = base[: rng.randint(1, len(base))] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 8))]
    else:
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, max_prompt))]
    prompt = prompt[:max_prompt]
    prompts.append(prompt)
    return Request(
        request_id="sim",
        prompt=prompt,
        sampling=Sampling(temperature=0.0),
        max_tokens=rng.randint(1, max_output),
        stop_token_ids=frozenset({STOP}) if rng.random() < 0.5 else frozenset(),
        use_prefix_cache=rng.random() < 0.9,
    )

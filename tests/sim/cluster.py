"""The real scheduler, reconfiguration, members, stages and page pools over a simulated clock, network and model.

The simulated model makes every mistake visible. Its embedding passes the token on; each layer writes the token (and its
own number) into the KV page, reads the whole context back from the pages, and mixes what it read into a hash; the
next token is that hash. So a block handed on too early, a wrong prefix hit, a row that a transition lost or an owner
that changed too soon gives another token than the reference, which needs no pipeline at all.
"""

import heapq
import math
import random
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import pytest
import torch

from kvstore import page_pool
from kvstore.ids import LayerRange
from kvstore.page_memory import HostMemory
from kvstore.page_pool import PagePool
from runtime.batch import LayerKV, StepBatch
from runtime.layout import Layout, Segment
from runtime.member import Member, Pace, UnitKey, transition_of, unit_keys
from runtime.messages import (
    Audit,
    Cancel,
    Copy,
    Fetch,
    Join,
    Load,
    Mirror,
    Open,
    Pages,
    Prepare,
    ProfilePoint,
    Retire,
    Sampling,
    StartMirror,
    Step,
    Taken,
    ToHead,
    Tokens,
    ToWorker,
    Weights,
    decode_to_head,
    decode_to_worker,
    encode,
)
from runtime.model.spec import ModelSpec
from runtime.stage import Units
from scheduler.batching import BatchingConfig
from scheduler.course import Change
from scheduler.events import (
    AbortChange,
    ChangeLayout,
    Emit,
    Event,
    EvictWorker,
    FromWorker,
    Look,
    PeerDown,
    Report,
    Send,
    SendStep,
    Submit,
    Tick,
    Wake,
)
from scheduler.request import AdmissionError, Request, TokenOutput
from scheduler.state import Cancel as CancelRequest
from scheduler.state import ClusterConfig, SchedulerState
from scheduler.transition import Refused, Strategy
from tests.sim.invariants import Invariants, audit
from tests.sim.network import HEAD, Network

VOCAB = 97
STOP = 96
NUM_LAYERS = 5
_LAYER_MARK = 1000


def mix(layer: int, context: Sequence[int], state: int) -> int:
    return zlib.crc32(bytes(context), state ^ layer) & 0xFFFFFF


def next_token(tokens: list[int]) -> int:
    """The simulated model."""
    state = 0
    for layer in range(NUM_LAYERS):
        state = mix(layer, tokens, state)
    return state % VOCAB


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
        hidden_size=2, num_heads=1, num_kv_heads=1, head_dim=1, vocab_size=VOCAB, max_context=200,
        tied_embeddings=True, layer_bytes=(100,) * num_layers, embedding_bytes=100, lm_head_bytes=300,
        layer_flops_per_token=(100,) * num_layers, lm_head_flops_per_token=300, eos_token_ids=(STOP,),
    )  # fmt: skip


class _Layer:
    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, hidden: torch.Tensor, batch: StepBatch, kv: LayerKV) -> torch.Tensor:
        pages, size = kv.data.numpy(), kv.data.shape[2]
        ids = hidden.numpy()
        result = ids.copy()
        for row in range(batch.num_rows):
            start, stop, length = batch.query_starts[row], batch.query_starts[row + 1], int(batch.context_lens[row])
            table = kv.page_of_block[batch.block_tables[row, : -(-length // size)]]
            assert (table >= 0).all(), f"layer {self.index} reads a block without a page"
            held = pages[table, 0].reshape(-1)  # a copy: [blocks * size]
            first = length - (stop - start)
            for offset in range(first, length):
                pages[table[offset // size], 0, offset % size, 0, 0] = ids[start + offset - first, 0] + (
                    _LAYER_MARK * (self.index + 1)
                )
            held[first:length] = ids[start:stop, 0] + _LAYER_MARK * (self.index + 1)
            context = (held[:length] - _LAYER_MARK * (self.index + 1)).astype(int)
            good = ((context >= 0) & (context < VOCAB)).all()
            result[stop - 1, 1] = mix(self.index, context.tolist(), int(ids[stop - 1, 1])) if good else 1
        return torch.from_numpy(result)


def _embed(tokens: torch.Tensor) -> torch.Tensor:
    return torch.stack([tokens.float(), torch.zeros(len(tokens))], dim=1)


def _head(hidden: torch.Tensor) -> torch.Tensor:
    logits = torch.zeros(len(hidden), VOCAB)
    logits[torch.arange(len(hidden)), hidden[:, 1].long() % VOCAB] = 1.0
    return logits


class _Store:
    """Units of the simulated model; shadows take simulated time, and sometimes fail.

    Half of the arriving units are asked of the peer that holds them; one that does not come in time comes from nowhere.
    """

    def __init__(self, worker: "SimWorker", cluster: "SimCluster") -> None:
        self.units = Units({})
        self.weight_bytes = 0
        self.room_bytes = 0
        self.implementation = "sim"
        self.profile: list[ProfilePoint] = []
        self.may_give_back: Callable[[], bool] | None = None
        self._worker = worker
        self._cluster = cluster
        self._token = self._ticket = 0
        self._missing: dict[int, int] = {}
        self._seen: set[tuple[int, str, int]] = set()

    def load(
        self, load: Load, keys: Sequence[UnitKey], num_layers: int, progress: Callable[[int, str], None]
    ) -> PagePool:
        self.retain(keys)
        self._add(keys)
        return self.make_pool(load, num_layers)

    def make_pool(self, load: Load, num_layers: int) -> PagePool:
        if self._worker.name in load.layout.workers and self._worker.has_no_memory:
            raise MemoryError("no page fits")
        num_pages, page_bytes = self._worker.num_pages, 8 * load.block_size
        if not self._cluster.is_elastic:
            return PagePool(num_pages, load.block_size, 1, 1, torch.float32, "cpu")
        weights = _weight_bytes(unit_keys(load.layout, self._worker.name))
        self._most_bytes = self.room_bytes = num_pages * page_bytes + weights
        memory = _SimMemory(self.room_bytes, self._cluster)
        return PagePool(num_pages, load.block_size, 1, 1, torch.float32, "cpu", memory)

    def fit_pool(self, pool: PagePool, keys: Iterable[UnitKey], *, in_pieces: bool = False) -> bool:
        """As `runtime.loading.Loader` does; sometimes the system has less than weights should have left."""
        if not self.room_bytes:
            return True
        weights = _weight_bytes(keys)
        wanted = max(0, self._most_bytes - weights) // pool.page_bytes
        self._cluster.num_resized += wanted != pool.num_pages
        self.room_bytes = self._most_bytes
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(page_pool._MOVED_BYTES, "cpu", 2 * pool.page_bytes)
            if pool.resize(wanted, in_pieces=in_pieces) < wanted:
                self.room_bytes = pool.num_pages * pool.page_bytes + weights
        pool.data[pool.num_pages :].fill_(torch.nan)
        return pool.num_pages <= wanted

    def parts(self, key: UnitKey, form: str) -> dict[str, torch.Tensor] | None:
        return {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3)} if form == "sim" and key in self.held() else None

    def shadow(self, load: Load, keys: Sequence[UnitKey], transition: int, pace: Pace) -> None:
        self._token += 1
        token = self._token
        random = self._cluster.random
        draw = random.random()
        began = self._cluster.now
        self._missing = {}
        for key in keys:
            holder = pace.holders.get(key)
            if key not in self.held() and holder not in (None, self._worker.name) and random.random() < 0.5:
                self._ticket += 1
                self._missing[self._ticket] = -1
                self._worker.to_peer(holder, Fetch(self._worker.name, self._ticket, key, "sim"), ())

        def done() -> None:
            if token != self._token or not self._worker.alive:
                return
            if self._missing and self._cluster.now < began + 2.0:
                self._cluster.at(0.05, done)
                return
            fails = draw < self._cluster.shadow_failures
            if not fails:
                self._add(keys)
            error = RuntimeError("no memory") if fails else None
            self._worker.member.shadow_built(transition, 0.1, 0, error)

        self._cluster.at(random.uniform(0.0, 0.3), done)

    def take(self, weights: Weights, tensors: list[torch.Tensor]) -> None:
        """Weights from a peer, in any order; a unit that the peer has lost meanwhile comes as nothing."""
        place = (weights.ticket, weights.name, weights.offset)
        if weights.ticket in self._missing and place not in self._seen:
            self._seen.add(place)
            before = self._missing[weights.ticket]
            left = (weights.num_bytes if before < 0 else before) - sum(tensor.nbytes for tensor in tensors)
            assert left >= 0, "a peer sent more than the unit has"
            self._missing[weights.ticket] = left
            if left == 0:
                del self._missing[weights.ticket]
                self._cluster.num_fetched += weights.num_bytes > 0

    def cancel_shadow(self) -> None:
        self._token += 1

    def retain(self, keys: Iterable[UnitKey]) -> None:
        keep = set(keys)
        self.units.layers = {key: unit for key, unit in self.units.layers.items() if key in keep}
        self.units.embedding = self.units.embedding if "embedding" in keep else None
        self.units.lm_head = self.units.lm_head if "lm_head" in keep else None

    def give_back(self, is_idle: Callable[[], bool]) -> None:
        self.may_give_back = is_idle

    def rss(self) -> int:
        return 0

    def held(self) -> set[UnitKey]:
        ends = {name for name in ("embedding", "lm_head") if getattr(self.units, name) is not None}
        return {*self.units.layers, *ends}

    def _add(self, keys: Iterable[UnitKey]) -> None:
        for key in keys:
            if isinstance(key, int):
                self.units.layers.setdefault(key, _Layer(key))
            elif key == "embedding":
                self.units.embedding = _embed
            else:
                self.units.lm_head = _head


class _SimMemory(HostMemory):
    """Grows by less than was asked for now and then, as a device with fragmented memory does."""

    def __init__(self, capacity: int, cluster: "SimCluster") -> None:
        super().__init__(capacity)
        self._cluster = cluster

    def resize(self, num_bytes: int) -> int:
        if 0 < self.num_bytes < num_bytes and self._cluster.random.random() < 0.2:
            num_bytes = self._cluster.random.randint(self.num_bytes, num_bytes)
        return super().resize(num_bytes)


def _weight_bytes(keys: Iterable[UnitKey]) -> int:
    held = set(keys)
    layers = [key for key in held if isinstance(key, int)]
    return make_spec(NUM_LAYERS).weight_bytes(layers, embedding="embedding" in held, lm_head="lm_head" in held)


class SimWorker:
    """A worker process: a member, its store and its mailbox."""

    def __init__(self, name: str, num_pages: int, cluster: "SimCluster") -> None:
        self.name = name
        self.num_pages = num_pages
        self.alive = True
        self.has_no_memory = False
        self._cluster = cluster
        self.store = _Store(self, cluster)
        self.member = Member(name, torch.device("cpu"), self.store, self, lambda: cluster.now)

    def to_head(self, message: ToHead) -> None:
        self._cluster.transmit_to_head(self, encode(message))

    def to_peer(
        self,
        worker: str,
        message: Step | Tokens | Mirror | Pages | Taken | Fetch | Weights,
        tensors: Sequence[torch.Tensor],
    ) -> None:
        transition = transition_of(message)

        def told(error: str) -> None:
            if transition is not None and self.alive:
                self.member.unreachable(worker, transition, error)

        self._cluster.transmit(self.name, worker, message, [tensor.clone() for tensor in tensors], told)

    def receive(self, message: ToWorker, tensors: list[torch.Tensor]) -> None:
        member = self.member
        match message:
            case Step():
                member.step(message, tensors, self._cluster.now)
            case Tokens():
                member.sampled(message, self._cluster.now)
            case Mirror() | Pages():
                member.arrive(message, tensors)
            case Taken():
                member.taken(message)
            case Load():
                member.load(message)
            case Prepare():
                member.prepare(message)
            case StartMirror():
                member.start_mirror(message)
            case Copy():
                member.copy(message)
            case Open():
                member.open(message)
            case Retire() | Cancel():
                member.retire(message)
            case Fetch():
                member.fetch(message)
            case Weights():
                self.store.take(message, tensors)
            case _:
                raise AssertionError(f"a worker got {message}")
        self.work()

    def work(self) -> None:
        """Background slices, spread over simulated time."""
        wait_s = self.member.background_wait_s()
        if wait_s is not None and self.alive:
            self._cluster.at(max(0.0, wait_s) + 0.001, self._slice)

    def _slice(self) -> None:
        if self.alive:
            self.member.background()
            self.work()


@dataclass
class Stream:
    request: Request
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    cancelled: bool = False


class SimCluster:
    """A head and its workers. `run` drives everything until nothing is left to do."""

    def __init__(
        self,
        seed: int,
        *,
        num_stages: int,
        batching: BatchingConfig,
        num_blocks: int,
        num_spares: int = 0,
        shadow_failures: float = 0.0,
        spares_without_memory: bool = False,
        is_elastic: bool = False,
        heartbeat_timeout_s: float = 15.0,
    ) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.num_stages = num_stages
        self.shadow_failures = shadow_failures
        self.spares_without_memory = spares_without_memory
        self.is_elastic = is_elastic
        """Whether pages and weights of a worker share its memory."""
        self.num_resized = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self.network = Network(self.random, self.at, lambda: self.now)
        self._refused: set[tuple[str, str]] = set()
        """(receiver, sender): the receiver knows that the sender is a member no more."""
        cluster = ClusterConfig(
            make_spec(NUM_LAYERS), num_stages, rejoin_timeout_s=3.0, heartbeat_timeout_s=heartbeat_timeout_s
        )
        self.head = SchedulerState(cluster, batching)
        self.invariants = Invariants(self)
        self.workers: dict[str, SimWorker] = {}
        self.streams: dict[int, Stream] = {}
        self.rejected: list[AdmissionError] = []
        self.refused: list[Refused] = []
        self.num_blocks = num_blocks
        self.num_fetched = 0
        self.restarts = 0
        self._has_alarm = False
        self.changes = 0
        self.page_shares: tuple[float, ...] = (1.0,)
        """Of the usual number of pages, what a worker may have."""
        self.num_to_damage = 0
        """Pieces of snapshots from now on that will not arrive as they were sent."""
        for index in range(num_stages + num_spares):
            at = 0.01 * index if index < num_stages else 0.4
            self.at(at, lambda index=index: self.start_worker(f"w{index}", ""))

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
        self.invariants.check()
        for effect in effects:
            match effect:
                case SendStep():
                    self._send(effect.worker, Step(0, encode(effect.plan), []))
                case Send():
                    self._send(effect.worker, effect.message)
                case Emit():
                    self._emit(effect.sequence, effect.output)
                case EvictWorker():
                    self._evict(effect.worker)
                case Report() | Look():
                    pass
        if not self._has_alarm and (wake_s := self.head.batcher.wake_s) < math.inf:
            self._has_alarm = True
            self.at(max(0.0, wake_s - self.now), self._wake)

    def _wake(self) -> None:
        self._has_alarm = False
        self.handle(Wake(self.now))

    def _send(self, to: str, message: ToWorker) -> None:
        """As the driver does: a worker that a message did not get to is lost."""
        self.transmit(HEAD, to, message, [], lambda error: self.handle(PeerDown(to, error, self.now)))

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
            self.handle(CancelRequest(sequence, "abort"))

    def change(
        self,
        layout: Layout,
        strategy: Strategy = "live",
        *,
        queue: bool = False,
        deadline_s: float = 1e9,
        rate: int | None = None,
    ) -> None:
        self.changes += 1
        change = Change(self.changes, layout, strategy, deadline_s, rate or 10_000, is_bound=rate is not None)
        try:
            self.handle(ChangeLayout(change, queue, self.now))
        except Refused as error:
            self.refused.append(error)

    def abort_change(self, change: int) -> None:
        self.handle(AbortChange(change, self.now))

    def _emit(self, sequence: int, output: TokenOutput) -> None:
        stream = self.streams[sequence]
        assert not stream.cancelled, f"sequence {sequence} was cancelled and still got {output}"
        assert stream.finish_reason is None, f"sequence {sequence} got {output} after its end"
        stream.tokens += output.tokens
        stream.finish_reason = output.finish_reason

    # -- workers --------------------------------------------------------------------------------------------

    def start_worker(self, name: str, replaces: str) -> None:
        share = self.random.choice(self.page_shares) if len(self.page_shares) > 1 else 1.0
        self.workers[name] = worker = SimWorker(name, int(self.num_blocks * NUM_LAYERS * share), self)
        worker.has_no_memory = self.spares_without_memory and int(name[1:].partition("-")[0]) >= self.num_stages
        join = Join(name, "host", 1, "cpu", "sim", 1, 1, 1, {}, replaces)
        self.transmit_to_head(worker, encode(join), twice=0.0)  # a call, of which the door sees to it

    def crash(self, name: str) -> None:
        """Kill a worker; the head learns of it later, and a new incarnation joins later still, or never."""
        worker = self.workers.get(name)
        if worker is None or not worker.alive:
            return
        self._end(worker, restarts=self.random.random() < 0.8)

    def break_off(self, sender: str, to: str) -> None:
        """Break a link between two members that live. Each end has an unanswered request at the head, the head one at each: a break of
        these links is noticed even if nothing is on its way."""
        self.network.break_off(sender, to)
        if sender == HEAD:
            self.at(self.random.uniform(0.0, 0.5), lambda: self.handle(PeerDown(to, "its connection ended", self.now)))
        elif to == HEAD:
            self.at(self.random.uniform(0.0, 0.5), lambda: self._head_lost(sender))

    def _head_lost(self, name: str) -> None:
        """As `runtime.worker` does: one that has no head, or finds itself evicted, ends and joins anew."""
        worker = self.workers.get(name)
        if worker is not None and worker.alive:
            self._end(worker, restarts=True)

    def _end(self, worker: SimWorker, *, restarts: bool) -> None:
        name = worker.name
        worker.alive = False
        for other in (HEAD, *self.workers):
            self.network.break_off(other, name)
        self.at(self.random.uniform(0.01, 0.5), lambda: self.handle(PeerDown(name, "killed", self.now)))
        if restarts:
            self.restarts += 1
            restarted = f"{name.partition('-')[0]}-r{self.restarts}"
            self.at(self.random.uniform(0.3, 2.0), lambda: self.start_worker(restarted, name))

    def _evict(self, name: str) -> None:
        """Its messages are refused from now on, by other members a little later; and so does it hear of it itself."""
        self._refused.add((HEAD, name))
        for other in self.workers:
            self.at(self.random.uniform(0.0, 0.1), lambda other=other: self._refused.add((other, name)))
        self.at(self.random.uniform(0.0, 1.0), lambda: self._head_lost(name))

    def tick(self) -> None:
        for worker in self.workers.values():
            if worker.alive and self.network.carries(worker.name, HEAD):
                self.head.members.seen(worker.name, self.now)
        self.handle(Tick(self.now))

    def transmit(
        self, sender: str, to: str, message: ToWorker, tensors: list[torch.Tensor], told: Callable[[str], None]
    ) -> None:
        """One message: any delay, any order, sometimes twice. `told` is called with what went wrong."""
        raw = encode(message)
        if isinstance(message, Pages) and self.num_to_damage:
            self.num_to_damage -= 1
            tensors = [tensor + 1 for tensor in tensors]
        self.network.send(sender, to, lambda: self._arrive(sender, to, raw, tensors), told, twice=0.05)

    def transmit_to_head(self, worker: SimWorker, raw: bytes, *, twice: float = 0.02) -> None:
        name = worker.name

        def arrive() -> None:
            if (HEAD, name) not in self._refused:
                self.handle(FromWorker(decode_to_head(raw), self.now))

        self.network.send(name, HEAD, arrive, lambda error: self._head_lost(name), twice=twice)

    def _arrive(self, sender: str, to: str, raw: bytes, tensors: list[torch.Tensor]) -> None:
        worker = self.workers.get(to)
        if worker is not None and worker.alive and (to, sender) not in self._refused:
            worker.receive(decode_to_worker(raw), tensors)

    def audit_at_work(self) -> None:
        """An audit of every worker, which may overtake anything."""
        newest = max(self.streams, default=0)
        audit = Audit(self.head.batcher.live_sequences(), newest)
        for worker in self.workers.values():
            self.at(self.network.delay(), lambda worker=worker: self._audited(worker, audit))

    def _audited(self, worker: SimWorker, audit: Audit) -> None:
        if worker.alive:
            found = worker.member.audit(audit)
            assert not found.problems, f"{worker.name}: {found.problems}"

    # -- the end --------------------------------------------------------------------------------------------

    def audit(self) -> None:
        audit(self)


def layout_of(*segments: tuple[str, int, int]) -> Layout:
    """By worker, the first layer and the one after the last."""
    return Layout(0, NUM_LAYERS, tuple(Segment(name, LayerRange(start, stop)) for name, start, stop in segments))


def submit_long(cluster: SimCluster, num_streams: int, max_tokens: int) -> None:
    """Streams that are long enough for whatever happens, from 0.5 s on, and time that goes on."""
    for sequence in range(num_streams):
        request = Request("sim", [1, 2, 3 + sequence], Sampling(temperature=0.0), max_tokens=max_tokens)
        cluster.at(0.5, lambda s=sequence, r=request: cluster.submit(s, r))
    for index in range(1, 60):
        cluster.at(0.5 * index, cluster.tick)


def end_long(cluster: SimCluster, num_streams: int) -> None:
    """Let them end; every one says what it should."""
    cluster.run(until=30.0)
    assert len(cluster.streams) == num_streams
    for stream in cluster.streams.values():
        assert stream.tokens == reference(stream.request)
    cluster.audit()


def serving_at_the_end(cluster: SimCluster, num_streams: int) -> list[str]:
    """`end_long`, and the workers that serve then; nothing of a recovery is left."""
    end_long(cluster, num_streams)
    head = cluster.head
    assert head.status == "serving"
    assert head.layout is not None
    assert not head.lineup.unfit
    return list(head.layout.workers)


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


def random_layout(rng: random.Random, names: list[str]) -> Layout:
    """Any chain over some of the workers; sometimes one of them twice, sometimes an end without layers."""
    chosen = rng.sample(names, rng.randint(1, len(names)))
    if len(chosen) >= 2 and rng.random() < 0.2:
        chosen.append(chosen[0])
    chosen = chosen[:NUM_LAYERS]
    cuts = sorted(rng.sample(range(1, NUM_LAYERS), len(chosen) - 1))
    if len(chosen) > 1 and rng.random() < 0.1:
        cuts[0] = 0
    bounds = [0, *cuts, NUM_LAYERS]
    segments = tuple(Segment(name, LayerRange(a, b)) for name, a, b in zip(chosen, bounds, bounds[1:], strict=False))
    return Layout(0, NUM_LAYERS, segments)

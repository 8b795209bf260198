"""Every message that crosses a process, as frozen msgspec structs in tagged unions.

A message is msgpack bytes; tensors travel beside it, never inside. What the head sends to a worker is a
`ToWorker`, what a worker sends to the head is a `ToHead`; each side decodes its union once, where the message
enters, and matches it exhaustively. Every message that concerns serving carries the epoch it was made under;
a receiver counts and drops what is stale.

A step travels ``head -> hop 0 -> hop 1 -> ... -> head``: `Step` wraps the immutable plan (`StepPlan`, encoded once
by the head and forwarded as raw bytes) and grows one `HopTiming` per hop. Steps of one epoch are numbered
0, 1, 2, ... (`StepPlan.ordinal`) and every hop runs them in exactly that order, whatever order they arrive in.
That order is what makes a KV row written by step n readable in step n+1 without any further handshake.
"""

from typing import TypeAlias

import msgspec

from kvstore.ids import BlockId, Epoch, LayerRange, SequenceId, WorkerName
from runtime.layout import Layout, Move

MIN_FREE_BYTES = 512 << 20
"""What a worker leaves alone when its pool follows the memory that is free, and when it loads a shadow; the head plans with it."""
MAX_BUSY_S = 120.0
"""How long a worker may be at one message before it counts as hung: far beyond what any takes, but for a `Load`, which has no limit."""
MAX_READING_S = 600.0
"""But each unit that is read for a `Load` has this one: a dead file system answers nobody, and a recovery would wait for it for ever."""
READING = "reading weights"
"""That phase of a `Load`."""
UNIT_OF_LOAD = "unit of a Load"
"""What a worker is busy with meanwhile."""


AHEAD = -1
"""In place of a token that is not known yet (`StepPlan`)."""


class Sampling(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """How the next token of a sequence is chosen. ``temperature == 0`` is greedy; 0 / 1.0 / -1 switch a filter off.

    `logprobs` is the number of alternatives reported beside the chosen token, -1 for none at all.
    `banned_until_min_tokens` are the token ids that may not be sampled before `min_tokens` tokens are out.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    banned_until_min_tokens: tuple[int, ...] = ()
    logprobs: int = -1

    @property
    def needs_history(self) -> bool:
        return self.frequency_penalty != 0.0 or self.presence_penalty != 0.0 or self.repetition_penalty != 1.0


class SequenceStart(msgspec.Struct, frozen=True, array_like=True):
    """What a worker must know of a sequence the first time it meets it (again after a preemption).

    `history` holds all known tokens (prompt, then output so far) when `sampling.needs_history`, else nothing.
    `blocks` is the whole block table so far, the blocks found in the prefix cache included.
    """

    num_prompt_tokens: int
    sampling: Sampling
    blocks: list[BlockId]
    history: list[int]


class Row(msgspec.Struct, frozen=True, array_like=True):
    """The part of one sequence in one step: tokens for positions ``start .. start + len(tokens)``.

    `new_blocks` extends the block table. With `sample` the last position's logits are sampled. With
    `prompt_logprobs >= 0` the log-probability of the token that follows each position is reported, with that many
    alternatives; `next_token` is the token that follows the last position (-1 when it is yet to be sampled).
    """

    sequence: SequenceId
    start: int
    tokens: list[int]
    new_blocks: list[BlockId]
    sample: bool
    begin: SequenceStart | None = None
    prompt_logprobs: int = -1
    next_token: int = -1


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """One pass of one microbatch through the pipeline. `released` sequences are forgotten before the rows run.

    `fence` matters while a transition is under way: a worker that receives layers runs this step only when the mirror of
    the previous epoch is complete through step `fence`.

    A step may be formed *ahead* of what a row reads: its token is `AHEAD` then, and is the one that step `oldest` samples for this
    sequence. The first hop runs the step when it has these `Tokens`, which the last hop of a step with `is_followed` sends it. `oldest`
    is the oldest step in flight, whether or not it is read from: the tokens of those before it are not wanted any more.
    """

    epoch: Epoch
    ordinal: int
    microbatch: int
    rows: list[Row]
    released: list[SequenceId]
    fence: int = -1
    oldest: int = -1
    is_ahead: bool = False
    is_followed: bool = False


class HopTiming(msgspec.Struct, frozen=True, array_like=True):
    """What a hop spent on a step, in microseconds: idle before it, waiting in its queue, computing, and sampling."""

    worker: WorkerName
    idle_us: int
    queued_us: int
    compute_us: int
    sample_us: int


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """The log-probability of `token`, its rank (0 is the most likely), and the most likely alternatives."""

    token: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


# -- head to worker -----------------------------------------------------------------------------------------


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """The reply to `Join`."""

    heartbeat_interval_s: float


class Load(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Hold the units that `layout` gives to you, then answer `Loaded`. Progress goes out as `LoadProgress`.

    `model` is a folder; `load_format` is "safetensors" or "dummy". `kv_bytes` bounds the page pool; 0 lets the
    worker have `memory_bytes` for pages, or, if that is not 0, `room_bytes` for weights and pages, as it had before; and of
    either no more than is free. `quantize` is "" or "int8".
    """

    layout: Layout
    model: str
    load_format: str
    dtype: str
    block_size: int
    kv_bytes: int
    memory_bytes: int
    max_context: int
    implementation: str = "auto"
    quantize: str = ""
    room_bytes: int = 0


class Step(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """A step at hop `hop`. Beside it travels the hidden state, ``[num_tokens, hidden_size]``, except to hop 0."""

    hop: int
    plan: bytes
    timings: list[HopTiming]


class Tokens(msgspec.Struct, frozen=True, array_like=True, tag=19):
    """From the last hop to the first: what step `ordinal` sampled, for the step that was formed ahead of it."""

    epoch: Epoch
    ordinal: int
    sequences: list[SequenceId]
    tokens: list[int]


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """End the process with exit code 0, so that its agent does not restart it."""

    reason: str


class Audit(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Run `check_integrity()` on everything and answer `Audited` (a call, not a message).

    Sequences up to `newest` that are not in `live_sequences` are forgotten first: they are released by the next
    step anyway, and an idle server has none.
    """

    live_sequences: list[SequenceId]
    newest: SequenceId


class Prepare(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """A transition begins. Give back the pages of `retired_blocks`, get ready for `load.layout`, answer `Prepared`.

    A worker that gains units loads them in the background as a shadow and answers `ShadowReady`. With `copies` the KV of the
    moving layers will follow. `ends` hold the embedding and the LM head in the old layout.
    """

    transition: int
    source_epoch: Epoch
    load: Load
    moves: tuple[Move, ...]
    retired_blocks: list[BlockId]
    copies: bool
    ends: tuple[WorkerName, WorkerName]


class Copy(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """Send the snapshot of `blocks`, in this order, for every move of which you are the source.

    `bytes_per_s` bounds it while steps run here, and so does the limiter; an idle worker copies as fast as it can, unless
    `is_bound`: then it holds always. The flip waits for the first `num_awaited` blocks of every move.
    """

    transition: int
    blocks: list[BlockId]
    bytes_per_s: int
    num_awaited: int
    is_bound: bool = False


class Open(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """Steps of the next epoch may run. ``starts[i]`` is the step with which the mirror of move i began."""

    transition: int
    starts: list[int]


class Retire(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """The transition is committed: forget the old epoch, drop what the new layout does not need, answer `Retired`.

    `through` is the old epoch's last step: a target does it when the mirror is complete through there.
    """

    transition: int
    through: int


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """The transition is off: drop the shadow and its pages, stop mirroring, answer `Retired`."""

    transition: int


class Mirror(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """From source to target: the rows that steps `first` to `last` wrote in the layers of move `move`.

    `start` is the first step of this mirror. `blocks` and `offsets` are int32 arrays as bytes, one entry per row; beside it
    travels ``[num_layers, T, 2, num_kv_heads, head_dim]``: the rows as they were after step `last`.
    """

    transition: int
    move: int
    start: int
    first: int
    last: int
    blocks: bytes
    offsets: bytes
    checksum: int


class Pages(msgspec.Struct, frozen=True, array_like=True, tag=12):
    """From source to target: a piece of the snapshot, the blocks from index `first` of the list that `Copy` gave.

    Beside it travels ``[num_layers, num_blocks, 2, block_size, num_kv_heads, head_dim]``.
    """

    transition: int
    move: int
    first: int
    blocks: bytes
    checksum: int


class Taken(msgspec.Struct, frozen=True, array_like=True, tag=17):
    """From target to source: the first `count` blocks of the snapshot of move `move` are in place. So much more may be sent."""

    transition: int
    move: int
    count: int


class Fetch(msgspec.Struct, frozen=True, array_like=True, tag=13):
    """From a worker to a peer that holds `unit`: lend its tensors to `worker` (`Lent`), or send them (`Weights`).

    `form` says which unit of which model, and how it is held: `runtime.model.builder.UnitBuilder.form`. `ticket` is the
    asker's own number, `place` where it is (`runtime.pages.place`); empty when it takes no loans.
    """

    worker: WorkerName
    ticket: int
    unit: int | str
    form: str
    place: str = ""


class Loan(msgspec.Struct, frozen=True, array_like=True):
    """Memory that another process of the same host can map: `descriptor` of process `pid`, a file of this random name, from byte `offset` on."""

    pid: int
    descriptor: int
    file: str
    offset: int = 0


class LentPart(msgspec.Struct, frozen=True, array_like=True):
    """A tensor of a unit that is lent. Without a loan it travels beside the message, being small."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    loan: Loan | None


class Lent(msgspec.Struct, frozen=True, array_like=True, tag=18):
    """The answer to `Fetch` by a peer in the same place: all tensors of the unit; beside it travel those without a loan, in their order."""

    ticket: int
    parts: list[LentPart]


class Weights(msgspec.Struct, frozen=True, array_like=True, tag=14):
    """The other answer to `Fetch`: bytes of the tensor `name`, from byte `offset` on; beside it travel these bytes (uint8).

    `num_bytes` is the size of the whole unit. Without a name: the peer has no such unit of this form.
    """

    ticket: int
    num_bytes: int = 0
    name: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    offset: int = 0
    checksum: int = 0


class StartMirror(msgspec.Struct, frozen=True, array_like=True, tag=16):
    """The shadow is up: from now on send the rows that steps write in leaving layers to their targets. Answer `Mirroring`."""

    transition: int


class Trace(msgspec.Struct, frozen=True, array_like=True, tag=15):
    """Record spans from now on, or no more, and answer `Traced` at once, whatever runs (a call, not a message)."""

    on: bool


ToWorker: TypeAlias = (
    Welcome
    | Load
    | Step
    | Tokens
    | Shutdown
    | Audit
    | Prepare
    | Copy
    | Open
    | Retire
    | Cancel
    | Mirror
    | Pages
    | Taken
    | Fetch
    | Weights
    | Lent
    | StartMirror
    | Trace
)


# -- worker to head -----------------------------------------------------------------------------------------


class Join(msgspec.Struct, frozen=True, array_like=True, tag=32):
    """A worker announces itself. `name` is unique per incarnation: a restarted worker joins as a new member.

    `pace` or `roofline` is set when it emulates another device (`runtime.pace`): by how much it slows prompt tokens and
    decode rows; seconds to read a layer and for a row's arithmetic in it.
    """

    name: WorkerName
    host: str
    pid: int
    device: str
    device_name: str
    memory_total: int
    memory_available: int
    num_threads: int
    versions: dict[str, str]
    replaces: WorkerName = ""
    pace: tuple[float, float] | None = None
    roofline: tuple[float, float] | None = None


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, tag=33):
    """It says that the process lives, and for how long its compute thread has been at one thing: `busy_with` names the message ("" and
    0 seconds between messages)."""

    worker: WorkerName
    rss: int
    pages_used: int
    num_sequences: int
    num_stale: int
    busy_with: str = ""
    busy_s: float = 0.0

    @property
    def is_hung(self) -> bool:
        limit_s = MAX_READING_S if self.busy_with == UNIT_OF_LOAD else MAX_BUSY_S
        return self.busy_s > limit_s and self.busy_with != Load.__name__


class LoadProgress(msgspec.Struct, frozen=True, array_like=True, tag=34):
    worker: WorkerName
    epoch: Epoch
    units_loaded: int
    units_total: int
    phase: str


class ProfilePoint(msgspec.Struct, frozen=True, array_like=True):
    """What a worker measured on itself: so many `seconds` for these rows in these layers, or, with `samples`, for the LM
    head and as many draws. Contexts are positions attended to; a prompt's tokens begin at its first position.
    """

    decode_rows: int
    decode_context: int
    prefill_tokens: int
    samples: int
    layers: LayerRange
    seconds: float


class Loaded(msgspec.Struct, frozen=True, array_like=True, tag=35):
    """The units of `epoch` are up and warm. `num_pages` is the size of the page pool, `page_bytes` that of a page.

    `room_bytes` is what weights and pages share: the pool has as many pages as fit beside the units that the worker holds
    (`ModelSpec.weight_bytes`); 0 when their number is fixed. `profile` is there the first time that the worker loads
    this model.
    """

    worker: WorkerName
    epoch: Epoch
    weight_bytes: int
    num_pages: int
    page_bytes: int
    seconds: float
    implementation: str
    profile: list[ProfilePoint] = []
    room_bytes: int = 0


class LoadFailed(msgspec.Struct, frozen=True, array_like=True, tag=36):
    worker: WorkerName
    epoch: Epoch
    error: str


class StepResult(msgspec.Struct, frozen=True, array_like=True, tag=37):
    """What the last hop found: one token per sampled row, in the order of the rows.

    `logprobs` aligns with `tokens` when any row asked for them (None where a row did not), else it is empty.
    `prompt_logprobs` holds (sequence, start, entries) for rows that asked, one entry per position with a known
    next token. `failed` names the sequences whose logits were not finite.
    """

    epoch: Epoch
    ordinal: int
    microbatch: int
    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    prompt_logprobs: list[tuple[SequenceId, int, list[TokenLogprobs]]]
    timings: list[HopTiming]
    failed: list[SequenceId] = []


class StepFailed(msgspec.Struct, frozen=True, array_like=True, tag=38):
    """A worker could not run a step (our bug, or a device error). The head treats the worker as lost."""

    worker: WorkerName
    epoch: Epoch
    ordinal: int
    error: str


class Span(msgspec.Struct, frozen=True, array_like=True):
    """What a process did on `track`, a thread, from `begin_s` to `end_s` of its own clock (`time.perf_counter`).

    `step` is (epoch, ordinal, hop), each -1 where it means nothing. `amounts` are numbers worth showing, units in
    their names.
    """

    track: str
    name: str
    begin_s: float
    end_s: float
    step: tuple[int, int, int]
    amounts: dict[str, int]


class Leave(msgspec.Struct, frozen=True, array_like=True, tag=39):
    """A worker is about to end on purpose (it got SIGTERM)."""

    worker: WorkerName
    reason: str


class Audited(msgspec.Struct, frozen=True, array_like=True, tag=40):
    worker: WorkerName
    num_sequences: int
    pages_used: int
    rss: int
    problems: list[str]


class Prepared(msgspec.Struct, frozen=True, array_like=True, tag=41):
    """There is room for the arriving layers, and they are being loaded. `num_pages` is the size of the pool from now on.

    `room_bytes` is as in `Loaded`.
    """

    worker: WorkerName
    transition: int
    num_pages: int
    page_bytes: int
    room_bytes: int = 0


class ShadowProgress(msgspec.Struct, frozen=True, array_like=True, tag=48):
    """How many of the units that arrive are loaded, and what they weigh as the model has them."""

    worker: WorkerName
    transition: int
    units_loaded: int
    units_total: int
    bytes_loaded: int
    bytes_total: int


class ShadowReady(msgspec.Struct, frozen=True, array_like=True, tag=42):
    """All units that the next layout gives to this worker are loaded and warm.

    `weight_bytes` is what it holds now, `peer_bytes` how much of that came from peers just now; `seconds` is what loading
    took, the limiter's rests included. `implementation` is that of its layers.
    """

    worker: WorkerName
    transition: int
    weight_bytes: int
    seconds: float
    peer_bytes: int = 0
    implementation: str = ""


class TransitionFailed(msgspec.Struct, frozen=True, array_like=True, tag=43):
    worker: WorkerName
    transition: int
    error: str


class Unreachable(msgspec.Struct, frozen=True, array_like=True, tag=49):
    """A message from one worker to another, `peer`, was lost: its connection broke, or nobody took the message in time.

    It was a step, or of `transition`; -1 for a step. Both workers live, as far as the sender knows. A broken connection
    stays broken as long as both do, and of what was sent shortly before some may have arrived.
    """

    worker: WorkerName
    peer: WorkerName
    transition: int
    error: str


class Copied(msgspec.Struct, frozen=True, array_like=True, tag=44):
    """From a target: the first `count` blocks of the snapshot of `move` are in place."""

    worker: WorkerName
    transition: int
    move: int
    count: int
    num_bytes: int


class Retired(msgspec.Struct, frozen=True, array_like=True, tag=45):
    """The answer to `Retire` and `Cancel`: what this worker saw of the transition.

    `pauses_us` has, for each flipped sequence, the time between its last forward in the old epoch and its first in
    the new one on this worker, where it had both; `excesses_us` the same less the sequence's mean gap between steps,
    for those that had run here at least twice before; `ordinary_us` that of gaps between steps of the old epoch. `weight_bytes` is what it holds now; -1 when nothing changed.
    `copy_us` is how long it sent the snapshot, the limiter's rests included. `num_pages` is the size of the pool from now
    on, 0 when it has none any more; `room_bytes` is as in `Loaded`.
    """

    worker: WorkerName
    transition: int
    row_bytes: int
    page_bytes: int
    fence_waits: int
    fence_wait_us: int
    pauses_us: list[int]
    weight_bytes: int = -1
    excesses_us: list[int] = []
    copy_us: int = 0
    num_pages: int = 0
    room_bytes: int = 0
    ordinary_us: list[int] = []


class Mirroring(msgspec.Struct, frozen=True, array_like=True, tag=47):
    """`starts` pairs each move of which the worker is the source with the first step that it mirrors."""

    worker: WorkerName
    transition: int
    starts: list[tuple[int, int]]


class Traced(msgspec.Struct, frozen=True, array_like=True, tag=46):
    """The answer to `Trace`: the clock as it was read, and the spans since the tracer was started.

    `num_lost` more found no room.
    """

    worker: WorkerName
    clock_s: float
    spans: list[Span]
    num_lost: int


ToHead: TypeAlias = (
    Join
    | Heartbeat
    | LoadProgress
    | Loaded
    | LoadFailed
    | StepResult
    | StepFailed
    | Leave
    | Audited
    | Prepared
    | ShadowProgress
    | ShadowReady
    | TransitionFailed
    | Unreachable
    | Copied
    | Retired
    | Mirroring
    | Traced
)

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_to_head = msgspec.msgpack.Decoder(ToHead).decode
decode_plan = msgspec.msgpack.Decoder(StepPlan).decode

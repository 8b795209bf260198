"""A request as the scheduler sees it, what it gives back, and the engine's contract with the API.

Text never gets here: prompts and outputs are token ids. Stop *strings* are the API's business (it calls
`Engine.finish`); stop *tokens* are ours.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias

import msgspec

from kvstore.ids import SequenceId
from runtime.messages import Sampling, Span, TokenLogprobs

FinishReason: TypeAlias = Literal["stop", "length", "abort", "error"]


class Request(msgspec.Struct, frozen=True):
    """One sequence to generate.

    `stop_token_ids` end the sequence (the end-of-sequence tokens included, unless they are to be ignored); the
    token that stopped it is reported in the output's `tokens`. ``max_tokens == 0`` only reads the prompt, which is
    of use with `prompt_logprobs`. `prompt_logprobs >= 0` reports the prompt's log-probabilities with that many
    alternatives and bypasses the prefix cache.
    """

    request_id: str
    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    prompt_logprobs: int = -1
    use_prefix_cache: bool = True


class TokenOutput(msgspec.Struct, frozen=True):
    """What one step brought to one sequence. Exactly one output of a sequence has a `finish_reason`, the last one.

    `logprobs` aligns with `tokens` when the request asked for them. `prompt_logprobs` (one entry per prompt position
    but the first) comes whole, with the output that ends the prefill. `error` is a sentence for the client. `queue_s` is
    the time from `submit` to the first step that computed the sequence, in seconds, with its first output; else -1.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    stopped_by: int | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs] | None = None
    queue_s: float = -1.0


Sink: TypeAlias = Callable[[TokenOutput], None]


class AdmissionError(Exception):
    """The request cannot be taken; `status` is the HTTP status that fits, `param` the field that is at fault."""

    def __init__(
        self, message: str, *, status: int, code: str, param: str | None = None, retry_after_s: int | None = None
    ):
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s


class Limits(msgspec.Struct, frozen=True):
    """What a request may ask for. `max_context` is the smaller of the model's and what the KV pages hold."""

    max_context: int
    model_max_context: int
    kv_tokens: int
    vocab_size: int
    max_queue: int
    max_running: int


class Health(msgspec.Struct, frozen=True):
    """`status` is "starting", "waiting_for_workers", "loading", "serving", "recovering", "draining" or "failed"."""

    status: str
    detail: str
    workers_joined: int
    workers_wanted: int
    units_loaded: int
    units_total: int


class StageStats(msgspec.Struct, frozen=True):
    """Sums since the start for one hop of the present layout; times in seconds."""

    worker: str
    hop: int
    steps: int
    idle_s: float
    queued_s: float
    compute_s: float
    sample_s: float


class EngineStats(msgspec.Struct, frozen=True):
    """A snapshot for `/metrics`; counters are sums since the start."""

    waiting: int
    running: int
    kv_blocks_total: int
    kv_blocks_used: int
    kv_blocks_cached: int
    prefix_queries_tokens: int
    prefix_hit_tokens: int
    prompt_tokens: int
    generated_tokens: int
    steps: int
    steps_ahead: int
    discarded_tokens: int
    preemptions: int
    finished: dict[str, int]
    rejected: int
    stale_results: int
    workers_lost: int
    stages: list[StageStats]


class ProcessTrace(msgspec.Struct, frozen=True):
    """What the threads of one process did. Its clock is `ahead_s` ahead of the head's, give or take `error_s`.

    0 when no difference could be measured, as on one host. `num_lost` spans found no room.
    """

    name: str
    ahead_s: float
    error_s: float
    spans: list[Span]
    num_lost: int


class TraceRun(msgspec.Struct, frozen=True):
    """All processes that took part, the head first, from `begun_s` to `ended_s` of the head's clock.

    `head_cpu_s` is the processor time of all of the head's threads meanwhile, in which `generated_tokens` came out.
    """

    begun_s: float
    ended_s: float
    processes: list[ProcessTrace]
    head_cpu_s: float
    generated_tokens: int


class PilotStats(msgspec.Struct, frozen=True):
    """What the autopilot says of itself, for `/metrics`. Errors are relative; `trust`, `gain` and `regret_s` as it uses them."""

    mode: str
    gain: float
    trust: float
    regret_s: float
    entries: dict[str, int]
    stage_errors: list[tuple[str, int, float, float]]
    """Worker, steps, mean absolute and mean signed relative error of the predicted step times."""
    stages: list[tuple[str, int, str, float]]
    """Layout ("present" or "proposed"), hop, worker, predicted seconds per mean step."""
    service: dict[str, tuple[float, float]]
    """Predicted and measured seconds: ttft, tpot, per_token."""
    workers: dict[str, int]
    """How many are present, used, wanted and spare; empty while nobody has looked."""


class Engine(Protocol):
    """What the API calls. All of it is synchronous and runs on the head's event loop; sinks are called there too."""

    def submit(self, request: Request, sink: Sink) -> SequenceId:
        """Queue a request. `sink` is called once per step that brought tokens, and exactly once with a finish reason.

        Raises:
            AdmissionError: 429 when the queue is full, 400 when it can never fit, 503 when not serving.
        """
        ...

    def abort(self, sequence: SequenceId) -> None:
        """The client is gone: free everything before the next step. The sink is not called again. Idempotent."""
        ...

    def finish(self, sequence: SequenceId) -> None:
        """The API found a stop string: end the sequence now. The sink is not called again. Idempotent."""
        ...

    def limits(self) -> Limits:
        """Raises `AdmissionError` (503) before the first layout is up."""
        ...

    def health(self) -> Health: ...

    def stats(self) -> EngineStats: ...

    def layout_view(self) -> dict[str, Any]:
        """The body of ``GET /admin/layout``."""
        ...

    def workers_view(self) -> list[dict[str, Any]]:
        """The body of ``GET /admin/workers`` (its ``workers`` list)."""
        ...

    async def audit(self) -> dict[str, Any]:
        """The body of ``POST /admin/audit``: ``problems`` in words (none is good), and what is in use where."""
        ...

    async def trace(self, seconds: float) -> TraceRun:
        """Record what every process does for so long. Raises `Refused` while another trace is being recorded."""
        ...

    def change_layout(self, wish: dict[str, Any]) -> int:
        """Begin (or queue) a change of layout; its id. `wish` is the body of ``POST /admin/layout``.

        Raises:
            scheduler.wishes.LayoutError: it is no layout of this model over these workers, or an option is wrong.
            scheduler.reconfiguration.Refused: it cannot be made now; nothing has changed.
        """
        ...

    def drain_worker(self, name: str, wish: dict[str, Any]) -> int:
        """Move everything off a worker; the id of the change. `wish` has options only. Raises as `change_layout`."""
        ...

    def resume_worker(self, name: str) -> None:
        """Let a drained worker have layers again. Raises `scheduler.wishes.LayoutError` when there is no such worker."""
        ...

    def abort_change(self, change: int) -> bool:
        """Abort a change that is queued or has not flipped anything, or leave one that is being aborted to it.

        False when it is too late or unknown.
        """
        ...

    def change_view(self, change: int) -> dict[str, Any] | None:
        """The report of a change so far, with its ``progress`` while it is under way; None when it is not known."""
        ...

    def changes_view(self) -> list[dict[str, Any]]:
        """The reports of the last changes, oldest first."""
        ...

    async def wait_change(self, change: int) -> dict[str, Any]:
        """The report of a known change, once it has ended."""
        ...

    async def plan_view(self) -> dict[str, Any]:
        """The body of ``GET /admin/plan``. Raises TimeoutError while the planner is not ready."""
        ...

    def pilot_stats(self) -> PilotStats: ...

    def set_autopilot(self, mode: Literal["off", "advise", "on"]) -> None: ...

    def listen(self, listener: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        """Call `listener` on the loop with every event for operators, until the returned function is called.

        Events have a ``type``: ``transition`` (``transition`` as in ``GET /admin/layout``, null once it has ended),
        ``report`` (the ``report`` of a change that has ended), ``workers`` (how many are wanted, as in ``GET /admin/plan``),
        ``note`` (``level`` and ``text``). A listener never raises.
        """
        ...

    def begin_drain(self) -> None:
        """Refuse new requests with 503 and let the running ones end."""
        ...

    def num_unfinished(self) -> int: ...

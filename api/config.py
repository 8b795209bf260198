"""What `midflight serve` was asked to do, as one frozen value.

The command line builds it (`api.cli`), the composition root consumes it (`api.head`); nothing below reads an
environment variable or a global. Zero means "choose for me" where a field says so.
"""

from dataclasses import dataclass
from pathlib import Path

LOAD_FORMATS = ("safetensors", "dummy")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZE = ("int8",)
IMPLEMENTATIONS = ("auto", "lean", "transformers")
STRATEGIES = ("live", "stop-copy", "drain", "recompute")
"""The same as `scheduler.transition.STRATEGIES`, without importing it."""
LOOK_AHEAD = ("auto", "never", "idle", "always")
"""The same as `scheduler.lanes.LookAhead`, without importing it, and what picks one of them."""
AUTOPILOT_MODES = ("off", "advise", "on")
OBJECTIVES = ("throughput", "latency", "goodput")
"""The same as `scheduler.planning.autopilot.MODES` and `scheduler.planning.traffic.Objective`, without importing them."""
SIMULATED_POLICIES = ("static", "oracle", "autopilot")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Everything the head needs to start. Sizes in bytes, times in seconds."""

    model: str
    """A folder in Hugging Face form, or a name that `api.pull.resolve_model` knows."""
    home: Path
    """Where pulled models and caches live."""
    served_model_name: str = ""
    """The name that clients use; empty: the folder's name."""

    num_stages: int = 2
    layers: tuple[int, ...] = ()
    """Layers per stage, first to last; empty: balanced by cost. Its length equals `num_stages`."""
    num_local_workers: int = 2
    """Workers started on this host. Fewer than `num_stages`: the head waits for others to join."""
    num_threads: int = 0
    """Compute threads per local worker; 0: the cores divided among the local workers."""

    host: str = "127.0.0.1"
    port: int = 8000
    rpc_host: str = "127.0.0.1"
    rpc_port: int = 0
    """Where workers rendezvous; 0: a free port."""
    paces: tuple[str, ...] = ()
    """What each local worker emulates (`runtime.pace.parse_pace`), empty for nothing; of no or all local workers."""
    allow_public_rpc: bool = False
    """The workers' RPC neither authenticates nor encrypts; a public `rpc_host` is refused without this."""

    dtype: str = "auto"
    device: str = "auto"
    device_tensors: bool = False
    """Let local workers on CUDA hand large hidden states from device to device."""
    load_format: str = "safetensors"
    implementation: str = "auto"
    quantize: str = ""
    """ "int8": weights of the lean CPU layers and the LM head as 8-bit integers; empty: in the dtype."""
    kv_memory: int = 0
    """Bytes of KV pages per worker; 0: follow the memory that is free."""
    memory_fraction: float = 0.5
    """Without `kv_memory`: of what is free once the weights are in, what pages may have; weights that arrive later need the rest."""
    block_size: int = 0
    """Positions of a KV block; 0: 16 on the CPU, 256 on CUDA, as FlashAttention 2 wants its pages."""
    max_context: int = 0
    """Tokens of prompt and output together; 0: what the model was trained for."""
    max_running: int = 256
    max_queue: int = 1024
    step_tokens: int = 512
    """Tokens in one step of one microbatch, at most."""
    num_microbatches: int = 0
    """Microbatches in flight; 0: as many as it takes to keep every stage busy."""
    look_ahead: str = "auto"
    """Whether the first stage has its next step before the tokens for it have been to the head and back: a `scheduler.lanes.LookAhead`, or
    "auto" for "idle" beside local workers on CPUs, which need the same cores, and "always" elsewhere."""
    prefix_cache: bool = True
    tpot_goal_s: float = 0.0
    """Prompts are read in chunks so small that running streams get a token that often, where they can; 0: no goal."""

    autopilot: str = "off"
    objective: str = "throughput"
    slo_ttft_s: float = 2.0
    slo_tpot_s: float = 0.1
    """What a request must meet to count for the goodput: seconds to the first token, and per further token."""
    elastic: bool = False
    """Let the autopilot use no more workers than the load needs."""
    scale_command: str = ""
    """Run by the shell when another number of workers is wanted; see `api.scaling`."""

    command: str = "midflight"
    """How a user reaches this command line."""
    api_key: str = ""
    admin_key: str = ""
    max_body_bytes: int = 8 << 20
    drain_timeout_s: float = 30.0
    log_level: str = "info"

    @property
    def shown_model_name(self) -> str:
        return self.served_model_name or Path(self.model).name or "model"

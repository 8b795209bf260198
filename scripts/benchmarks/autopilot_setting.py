"""What `scripts/bench autopilot` serves, on what, and what is asked of it: a small model, two emulated devices, patterns.

The two workers follow the roofline law of `runtime.pace` with the figures of an A100 80 GB and an L40S from the device table,
slowed alike, so that the host's own time disappears in the wait. Everything that has to do with lengths is `SCALE` times
smaller than on the real ones: prompts, outputs, sequences in service, tokens in a step. So that reading weights and
arithmetic keep their proportion, a token costs `SCALE` times as much of the time of reading a layer.

Rates are a share (`LOAD`, if nothing else is asked) of what the cost model says the best layout sustains; the planner that picks it for this is told
nothing but the law.

What is never true: that these figures are those of an A100 or of an L40S.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from servers import ROOT
from shift_client import Arrival

sys.path.insert(0, str(ROOT))

from kvstore.ids import LayerRange
from runtime.layout import Layout, Segment
from runtime.model.config import inspect_model
from runtime.pace import Roofline
from scheduler.planning.cost import Facts, Speed
from scheduler.planning.devices import lookup
from scheduler.planning.emulation import by_roofline
from scheduler.planning.forecast import Device, Pipeline
from scheduler.planning.traffic import Serving, Slo, Traffic
from scheduler.simulation.trace import read_trace

SCALE = 8
NUM_LAYERS = 10
READ_S = 0.008
"""What reading a layer's weights takes the A100-like worker."""
KINDS = ("a100", "l40s")
MAX_RUNNING, STEP_TOKENS = 24, 512 // SCALE
LOAD = 0.87
SLO = Slo(ttft_s=2.0, tpot_s=0.5)
VOCAB = 512
CODE, CONVERSATION = (
    ROOT.parent / "shared/data/azure_llm_2023_code.csv",
    ROOT.parent / "shared/data/azure_llm_2023_conv.csv",
)


@dataclass(frozen=True)
class Phase:
    """A part of a pattern over which the load stays the same: its requests, and when it is over (trace's clock)."""

    name: str
    arrivals: tuple[Arrival, ...]
    start_s: float
    stop_s: float
    rate: float


def laws() -> dict[str, Roofline]:
    """The two devices' laws."""
    found, fastest = {}, lookup(KINDS[0])
    for name in KINDS:
        kind = lookup(name)
        read_s = READ_S * (fastest.bandwidth * fastest.bandwidth_fraction) / (kind.bandwidth * kind.bandwidth_fraction)
        # of bfloat16 weights each byte is met by one FLOP of each token
        ratio = (kind.bandwidth * kind.bandwidth_fraction) / (kind.flops * kind.flops_fraction)
        found[name] = Roofline(read_s, read_s * ratio * SCALE, name)
    return found


def write_model(folder: Path) -> Path:
    """A Llama of `NUM_LAYERS` layers, so small that a step takes a host a millisecond; one word for each token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    words = {f"w{index}": index for index in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0", bos_token="w1").save_pretrained(folder)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


class Oracle:
    """What the cost model says of layouts when the law is all that is known."""

    def __init__(self, model: Path) -> None:
        self.facts = Facts(inspect_model(model, dtype="float32", load_format="dummy"))
        host = Speed(lookup("cpu"))
        self.devices = [
            Device(f"w{i}", by_roofline(self.facts.spec, host, name, law.read_s, law.token_s))
            for i, (name, law) in enumerate(laws().items())
        ]
        self.serving = Serving(max_step_tokens=STEP_TOKENS, max_running=MAX_RUNNING)

    def capacity(self, counts: tuple[int, int], prompt: float, output: float) -> float:
        """Requests per second."""
        traffic = Traffic(prompt_tokens=prompt, output_tokens=output, concurrency=MAX_RUNNING)
        return Pipeline(self.facts, self.devices, _layout(counts), traffic, self.serving).forecast().requests_per_s

    def best(self, prompt: float, output: float) -> tuple[tuple[int, int], float]:
        """The best static layout, and what it sustains."""
        rates = {counts: self.capacity(counts, prompt, output) for counts in all_splits()}
        best = max(rates, key=lambda counts: rates[counts])
        return best, rates[best]


def all_splits() -> list[tuple[int, int]]:
    """Layers on the A100-like and on the L40S-like worker, every division of them, one alone included.

    Their order makes no difference here, as the embedding and the LM head cost nothing.
    """
    return [(count, NUM_LAYERS - count) for count in range(NUM_LAYERS + 1)]


def patterns(oracle: Oracle, seconds: float, load: float, seed: int) -> dict[str, list[Phase]]:
    """Those that can be played here: the Azure traces are not everywhere."""
    prompts, answers, between = (512 // SCALE, 16 // SCALE), (128 // SCALE, 512 // SCALE), (48, 24)
    found = {
        "pipelive": _phases(
            oracle, [("prompts", prompts), ("answers", answers), ("prompts again", prompts)], seconds, load, seed
        ),
        "steady": _phases(oracle, [("steady", between)], seconds, load, seed),
    }
    if CODE.is_file() and CONVERSATION.is_file():
        found["azure"] = _azure(oracle, seconds, load, seed)
    return found


def _phases(
    oracle: Oracle, parts: list[tuple[str, tuple[int, int]]], seconds: float, load: float, seed: int
) -> list[Phase]:
    draw, phases = np.random.default_rng(seed), []
    for index, (name, (prompt, output)) in enumerate(parts):
        _, capacity = oracle.best(prompt, output)
        rate, start_s = load * capacity, index * seconds
        gaps = draw.exponential(1 / rate, int(3 * rate * seconds) + 10).cumsum()
        arrivals = tuple(Arrival(start_s + float(at), prompt, output) for at in gaps[gaps < seconds])
        phases.append(Phase(name, arrivals, start_s, start_s + seconds, rate))
    return phases


def _azure(oracle: Oracle, seconds: float, load: float, seed: int) -> list[Phase]:
    """An excerpt of each trace: lengths over `SCALE`, its own order and gaps, stretched to the rate."""
    phases = []
    for index, (name, path) in enumerate((("code", CODE), ("conversation", CONVERSATION))):
        trace = read_trace(path)
        prompt, output = _lengths(trace.prompt_tokens), _lengths(trace.output_tokens)
        _, capacity = oracle.best(float(prompt.mean()), float(output.mean()))
        rate, start_s = load * capacity, index * seconds
        count = round(rate * seconds)
        first = (7919 * (seed + 1)) % (len(trace) - count - 1)
        chosen = slice(first, first + count)
        times = trace.arrival_s[first : first + count + 1] - trace.arrival_s[first]
        times = times[:-1] * seconds / times[-1]
        arrivals = tuple(
            Arrival(start_s + float(at), int(p), int(o))
            for at, p, o in zip(times, prompt[chosen], output[chosen], strict=True)
        )
        phases.append(Phase(name, arrivals, start_s, start_s + seconds, rate))
    return phases


def _lengths(tokens: np.ndarray) -> np.ndarray:
    return np.maximum(1, np.rint(tokens / SCALE)).astype(int)


def _layout(counts: tuple[int, int]) -> Layout:
    segments, start = [], 0
    for worker, count in enumerate(counts):
        if count:
            segments.append(Segment(f"w{worker}", LayerRange(start, start + count)))
            start += count
    return Layout(0, NUM_LAYERS, tuple(segments))

"""`scripts/bench scheduler`: the pure scheduler alone, from one sequence to ten thousand and one stage to 64.

No process, no socket, no model: `scheduler.state` is driven by hand, with the collector set up as in the head. Simulated workers join, load and answer each step with
one token per sampled row and one timing per hop, as the real ones do, always the oldest step in flight. A *step* is what
the head does for one: the result's event, the next plan, and encoding that plan as it is sent. Sequences decode all the time
that is measured; prompts and outputs are so long that none ends in it. One thread; the clock is that of the processor.
"""

import argparse
import gc
import json
import sys
import time
from collections import deque
from pathlib import Path

from arms import machine_now, note

from runtime.garbage import settle
from runtime.messages import HopTiming, Join, Loaded, Sampling, Step, StepPlan, StepResult, decode_to_head, encode
from runtime.model.spec import ModelSpec
from scheduler.batching import BatchingConfig
from scheduler.events import FromWorker, SendStep, Submit
from scheduler.request import Request
from scheduler.state import ClusterConfig, SchedulerState

_PROMPT_TOKENS = 16
_BLOCK_SIZE = 16
_MAX_TOKENS = 100_000
_PAGE_BYTES = 6144
_PARTS = ("decode", "decide", "encode")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench scheduler", description="The pure scheduler alone.")
    parser.add_argument("--sequences", default="1,10,100,1000,10000", help="comma separated")
    parser.add_argument("--stages", default="1,2,4,16,64", help="comma separated")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each combination")
    parser.add_argument("--repeats", type=int, default=3, help="the least time of so many counts")
    parser.add_argument("--out", type=Path, help="write the JSON here instead of to stdout")
    args = parser.parse_args()

    machine, runs = machine_now(), []
    settle()
    for stages in map(int, args.stages.split(",")):
        for sequences in map(int, args.sequences.split(",")):
            runs.append(measure(sequences, stages, args.seconds, args.repeats))
    note(format_table(runs))
    text = json.dumps({"benchmark": "scheduler", "machine": machine, "command": sys.argv, "runs": runs}, indent=2)
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text + "\n", encoding="utf-8")
    return 0


def measure(num_sequences: int, num_stages: int, seconds: float, repeats: int) -> dict:
    """Cost of a decode step and of its tokens, in microseconds; bytes of a plan and of a result per token."""
    pipeline = _Pipeline(num_sequences, num_stages)
    pipeline.fill()
    best_us, tokens_per_step, parts = float("inf"), 0.0, {}
    most_tokens = (_MAX_TOKENS + 900 * num_sequences) // (
        repeats + 1
    )  # what the blocks hold, so that none is preempted
    for _ in range(repeats):
        gc.collect()
        steps = tokens = 0
        spent: dict[str, int] = {name: 0 for name in _PARTS}
        stop_ns = time.process_time_ns() + int(1e9 * seconds / repeats)
        while tokens < most_tokens and (time.process_time_ns() < stop_ns or steps < 2 * num_stages):
            tokens += pipeline.turn(spent)
            steps += 1
        per_step_us = sum(spent.values()) / steps / 1e3
        if per_step_us < best_us:
            best_us, tokens_per_step = per_step_us, tokens / steps
            parts = {f"{name}_us_per_step": value / steps / 1e3 for name, value in spent.items()}
    pipeline.state.check_integrity()
    assert not pipeline.state.batcher.counters.preemptions
    return {
        "sequences": num_sequences,
        "stages": num_stages,
        "tokens_per_step": tokens_per_step,
        "us_per_step": best_us,
        "us_per_token": best_us / tokens_per_step,
        **parts,
        "plan_bytes_per_token": pipeline.plan_bytes / pipeline.num_tokens,
        "result_bytes_per_token": pipeline.result_bytes / pipeline.num_tokens,
    }


class _Pipeline:
    """A scheduler and the simulated workers around it."""

    def __init__(self, num_sequences: int, num_stages: int) -> None:
        spec = _spec(max(num_stages, 2))
        self._num_sequences = num_sequences
        self._names = [f"w{index}" for index in range(num_stages)]
        batching = BatchingConfig(
            num_microbatches=num_stages,
            max_step_tokens=max(512, num_sequences),
            max_running=num_sequences,
            max_queue=num_sequences,
            block_size=_BLOCK_SIZE,
            prefix_cache=True,
        )
        self.state = SchedulerState(ClusterConfig(spec=spec, num_stages=num_stages), batching)
        self._in_flight: deque[StepPlan] = deque()
        self.plan_bytes = self.result_bytes = self.num_tokens = 0
        pages = spec.num_layers * (_MAX_TOKENS // _BLOCK_SIZE + 1024 // _BLOCK_SIZE * num_sequences)
        for name in self._names:
            self._take(self.state.step(FromWorker(_join(name), 0.0)))
        for name in self._names:
            loaded = Loaded(name, self.state.epoch, 1, pages, _PAGE_BYTES, 0.0, "lean")
            self._take(self.state.step(FromWorker(loaded, 0.0)))
        assert self.state.status == "serving", self.state.detail

    def fill(self) -> None:
        """Submit every sequence and run until all of them decode."""
        sampling = Sampling(temperature=0.0)
        for index in range(self._num_sequences):
            prompt = [index % 40_000 + 1, *range(1, _PROMPT_TOKENS)]
            request = Request(f"r{index}", prompt, sampling, _MAX_TOKENS)
            self._take(self.state.step(Submit(index + 1, request, 0.0)))
        spent: dict[str, int] = {name: 0 for name in _PARTS}
        while self.state.batcher.counters.generated_tokens < self._num_sequences or self.state.batcher.num_waiting:
            self.turn(spent)
        for _ in range(2 * len(self._names)):
            self.turn(spent)
        assert self.state.batcher.num_running == self._num_sequences
        self.plan_bytes = self.result_bytes = self.num_tokens = 0

    def turn(self, spent: dict[str, int]) -> int:
        """The oldest step comes back; what the head does then is added to `spent`, in nanoseconds. Its tokens."""
        plan = self._in_flight.popleft()
        tokens = [7 + row.sequence % 1000 for row in plan.rows if row.sample]
        timings = [HopTiming(name, 100, 20, 9000, 0) for name in self._names]
        result = encode(StepResult(plan.epoch, plan.ordinal, plan.microbatch, tokens, [], [], timings))
        begun_ns = time.perf_counter_ns()
        message = decode_to_head(result)
        decoded_ns = time.perf_counter_ns()
        effects = self.state.step(FromWorker(message, 1.0))
        decided_ns = time.perf_counter_ns()
        payloads = [encode(Step(0, encode(e.plan), [])) for e in effects if isinstance(e, SendStep)]
        spent["decode"] += decoded_ns - begun_ns
        spent["decide"] += decided_ns - decoded_ns
        spent["encode"] += time.perf_counter_ns() - decided_ns
        self._take(effects)
        self.plan_bytes += sum(map(len, payloads))
        self.result_bytes += len(result)
        self.num_tokens += len(tokens)
        return len(tokens)

    def _take(self, effects: list) -> None:
        self._in_flight.extend(effect.plan for effect in effects if isinstance(effect, SendStep))


def _spec(num_layers: int) -> ModelSpec:
    return ModelSpec(
        name="none",
        folder="none",
        architecture="llama",
        dtype="bfloat16",
        load_format="dummy",
        num_layers=num_layers,
        hidden_size=576,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
        max_context=1 << 20,
        tied_embeddings=True,
        layer_bytes=(7_000_000,) * num_layers,
        embedding_bytes=56_000_000,
        lm_head_bytes=56_000_000,
        layer_flops_per_token=(7_000_000,) * num_layers,
        lm_head_flops_per_token=56_000_000,
        eos_token_ids=(2,),
    )


def _join(name: str) -> Join:
    return Join(name, "host", 1, "cpu", "cpu", 1 << 40, 1 << 40, 1, {})


def format_table(runs: list[dict]) -> str:
    lines = [
        "| stages | sequences | tokens a step | µs a step | µs a token | decode, decide, encode µs a step | plan bytes a token |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        parts = ", ".join(f"{run[f'{name}_us_per_step']:.1f}" for name in _PARTS)
        lines.append(
            f"| {run['stages']} | {run['sequences']:,} | {run['tokens_per_step']:.1f} | {run['us_per_step']:.1f} | "
            f"{run['us_per_token']:.2f} | {parts} | {run['plan_bytes_per_token']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

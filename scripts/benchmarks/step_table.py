"""What a trace of the server says in numbers: the shares of a stage's time, and the head's processor time per token.

A stage's time is the length of the recording; its compute thread is always in exactly one of these, in percent of it:

    waiting          the inbox was empty. This is the stage's bubble: what a pipeline that never waits would not have
    decode message   from bytes to a plan
    attention        paged attention (inside the fused layer kernel, timed by it)
    products         matrix products, the LM head and the final norm with them
    sampling         from logits to tokens
    sending          encoding and handing over what goes to the next hop or to the head
    transition       mirror, snapshot, weights sent and received KV; 0 unless a layout changes
    else             all that remains: norms, rotary embedding, KV writes, the batch's arrays, Python between the kernels

All are wall time: on a machine whose cores are shared, a thread that was made to wait for a core stretches the part that it was
in. *Off the processor* says how much of the steps' wall time that was. Layers of the `transformers` implementation cannot
tell their products from the rest; there *else* has both.
"""

from collections.abc import Iterable

SHARES = ("waiting", "decode message", "attention", "products", "else", "sampling", "sending", "transition")
_TRANSITION = frozenset(("mirror", "handover", "rows applied", "pages applied", "snapshot slice", "weights sent"))


def breakdown(trace: dict) -> dict:
    """The figures of one trace, as `POST /admin/trace` answers it."""
    facts, events = trace["midflight"], [event for event in trace["traceEvents"] if event["ph"] == "X"]
    window_us, tokens = 1e6 * facts["seconds"], max(1, facts["generated_tokens"])
    stages = [
        _stage(process["name"], [e for e in events if e["pid"] == pid], window_us)
        for pid, process in enumerate(facts["processes"])
        if pid > 0
    ]
    steps = max((stage["steps"] for stage in stages), default=0)
    return {
        "seconds": facts["seconds"],
        "tokens_per_s": facts["generated_tokens"] / facts["seconds"],
        "tokens_per_step": tokens / max(1, steps),
        "spans_lost": sum(process["spans_lost"] for process in facts["processes"]),
        "head_cpu_us_per_token": 1e6 * facts["head_cpu_s"] / tokens,
        "head_wall_us_per_token": _head([e for e in events if e["pid"] == 0], window_us, tokens),
        "stages": [stage for stage in stages if stage["steps"]],
    }


def _stage(worker: str, events: list[dict], window_us: float) -> dict:
    """One worker. Workers that ran no step are spares."""
    compute = [event for event in events if event["tid"] == 1]
    steps = [event for event in compute if event["cat"] == "step"]

    def total(names: Iterable[str]) -> float:
        return sum(_inside(event, window_us) for event in compute if event["cat"] in names)

    def noted(name: str) -> float:
        return sum(event["args"][name] for event in steps) / 1e3

    sampled_us = total(("sample",))
    spent = {
        "waiting": total(("wait",)),
        "decode message": total(("decode",)),
        "attention": noted("attention_ns"),
        "products": noted("products_ns") + noted("lm_head_ns"),
        "sampling": max(0.0, sampled_us - noted("lm_head_ns")),
        "sending": total(("send",)),
        "transition": total(_TRANSITION),
    }
    spent["else"] = max(0.0, window_us - sum(spent.values()))
    in_steps_us = sum(event["dur"] for event in steps)
    return {
        "worker": worker,
        "hop": min((event["args"]["hop"] for event in steps), default=-1),
        "steps": len(steps),
        "step_ms": in_steps_us / max(1, len(steps)) / 1e3,
        "share_percent": {name: 100 * spent[name] / window_us for name in SHARES},
        "bubble_percent": 100 * spent["waiting"] / window_us,
        "off_processor_percent": 100 * (1 - noted("cpu_ns") / in_steps_us) if in_steps_us else 0.0,
        "rpc_thread_percent": 100 * sum(e["dur"] for e in events if e["tid"] == 2) / window_us,
    }


def _inside(event: dict, window_us: float) -> float:
    """The part of a span that lies in the recording; a wait may have begun before it."""
    return max(0.0, min(window_us, event["ts"] + event["dur"]) - max(0.0, event["ts"]))


def _head(events: list[dict], window_us: float, tokens: int) -> dict[str, float]:
    """Wall time of the head's own code by what it was for, per generated token."""
    sums = dict.fromkeys(("receive", "decide", "send", "emit"), 0.0)
    for event in events:
        kind = event["cat"].partition(" ")[0]
        if kind in sums:
            sums[kind] += _inside(event, window_us)
    return {kind: us / tokens for kind, us in sums.items()}


def format_stages(runs: list[dict]) -> str:
    lines = [
        f"| workload | stage | steps | ms a step | {' | '.join(SHARES)} | off the processor |",
        "|" + "---|" * (len(SHARES) + 5),
    ]
    for run in runs:
        for stage in sorted(run["stages"], key=lambda stage: stage["hop"]):
            shares = " | ".join(f"{stage['share_percent'][name]:.1f}" for name in SHARES)
            lines.append(
                f"| {run['workload']} | {stage['hop']} ({stage['worker']}) | {stage['steps']} | {stage['step_ms']:.2f} | "
                f"{shares} | {stage['off_processor_percent']:.0f} |"
            )
    return "\n".join(lines)


def format_head(runs: list[dict]) -> str:
    lines = [
        "| workload | tokens/s | tokens a step | head CPU µs a token | wall µs a token: receive, decide, send, emit |",
        "|---|---|---|---|---|",
    ]
    for run in runs:
        wall = ", ".join(f"{run['head_wall_us_per_token'][kind]:.1f}" for kind in ("receive", "decide", "send", "emit"))
        lines.append(
            f"| {run['workload']} | {run['tokens_per_s']:.0f} | {run['tokens_per_step']:.1f} | "
            f"{run['head_cpu_us_per_token']:.1f} | {wall} |"
        )
    return "\n".join(lines)

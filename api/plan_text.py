"""`midflight plan` and `midflight autopilot`: what a running server's planner says, as text. Standard library only."""

import json
import sys
from typing import Any

from api.client import ServerError, ask

_SHOWN_ENTRIES = 12


def show_plan(url: str, admin_key: str, as_json: bool) -> int:
    """Print the plan; 1 when the server cannot be asked."""
    try:
        view = ask(url + "/admin/plan", admin_key)
    except ServerError as error:
        print(f"midflight: {error}", file=sys.stderr)
        return 1
    print(json.dumps(view, indent=1) if as_json else "\n".join(plan_lines(view)))
    return 0


def set_autopilot(url: str, admin_key: str, mode: str, as_json: bool) -> int:
    """Switch the autopilot; 1 when the server does not take it."""
    try:
        answer = ask(url + "/admin/autopilot", admin_key, {"mode": mode})
    except ServerError as error:
        print(f"midflight: {error}", file=sys.stderr)
        return 1
    print(json.dumps(answer) if as_json else f"the autopilot is now: {answer['mode']}")
    return 0


def plan_lines(view: dict[str, Any]) -> list[str]:
    """The body of ``GET /admin/plan`` for people."""
    lines = [f"autopilot {view['mode']}, objective {view['objective']}" + ", elastic" * view["elastic"]]
    lines += _load_lines(view)
    if view["plan"] is None:
        lines.append("no plan: the server does not serve, or the model does not fit on its workers")
    else:
        lines += view["plan"]["text"].splitlines()
    if view["cost"] and view["plan"] and view["plan"]["is_change"]:
        cost = view["cost"]
        moved = (cost["weight_bytes"] + cost["kv_bytes"]) / 1e6
        lines.append(f"the change: {cost['num_layers']} layers, {moved:.0f} MB, about {cost['seconds']:.1f} s")
        lines.append(
            f"believed to be worth {view['worth']:.1%} (predictions are trusted to {view['trust']:.0%});"
            f" the autopilot acts from {view['threshold']:.1%} on, lost so far {view['regret_s']:.1f} s"
        )
    lines += _error_lines(view["errors"])
    if workers := view["workers"]:
        spare = f", spare: {', '.join(workers['spare'])}" if workers["spare"] else ""
        lines.append(f"workers: {workers['wanted']} wanted, {workers['used']} used of {workers['present']}{spare}")
    if view["log"]:
        lines.append("log:")
    lines += [
        f"  {_ago(entry['age_s']):>9}  {entry['kind']:8}{entry['text']}" for entry in view["log"][-_SHOWN_ENTRIES:]
    ]
    return lines


def _load_lines(view: dict[str, Any]) -> list[str]:
    load = view["load"]
    if view["load_is_assumed"] or load is None:
        return ["load: too little was asked yet; what follows is for 128 tokens in and out, 16 sequences a stage"]
    traffic = load["traffic"]
    if load["is_idle"]:
        return [
            f"load: nothing was asked for {load['age_s']:.0f} s; before it was {traffic['prompt_tokens']:.0f} tokens in,"
            f" {traffic['output_tokens']:.0f} out"
        ]
    loop = (
        f"{traffic['concurrency']:.0f} clients in a closed loop"
        if load["is_closed"]
        else f"{traffic['requests_per_s']:.2f} requests/s (CV {traffic['arrival_cv']:.1f})"
    )
    return [
        f"load over {load['age_s']:.0f} s: {loop}, {traffic['prompt_tokens']:.0f} tokens in"
        f" ({load['prefix_hit_ratio']:.0%} cached), {traffic['output_tokens']:.0f} out;"
        f" {load['in_service']:.1f} in service, {load['waiting']:.1f} waiting, {load['tokens_per_s']:.0f} tokens/s"
    ]


def _error_lines(errors: dict[str, Any]) -> list[str]:
    lines = []
    if service := errors["service"]:
        parts = [
            f"{what} {service[f'{name}_predicted_s'] * 1e3:.1f} / {service[f'{name}_measured_s'] * 1e3:.1f} ms"
            for what, name in (("TTFT", "ttft"), ("TPOT", "tpot"), ("time in service per token", "per_token"))
            if service[f"{name}_measured_s"] > 0
        ]
        lines += [f"predicted / measured: {', '.join(parts)}"] if parts else []
    for stage in errors["stages"]:
        if stage["num_steps"]:
            lines.append(
                f"step times of {stage['worker']}: predicted to within {stage['mape']:.1%} (bias {stage['bias']:+.1%},"
                f" {stage['num_steps']} steps)"
            )
    return lines


def _ago(age_s: float) -> str:
    return f"{age_s:.0f} s ago" if age_s < 600 else f"{age_s / 60:.0f} min ago"

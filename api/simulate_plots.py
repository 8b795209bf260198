"""A picture of a simulated run: what came, how long it took, and when the layout changed. Needs matplotlib."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from scheduler.simulation.simulator import Outcome

importlib.import_module("matplotlib").use("Agg")  # an optional dependency, and no window
plt = importlib.import_module("matplotlib.pyplot")

_NUM_WINDOWS = 60


def plot(path: Path, summary: dict[str, Any], outcome: Outcome) -> None:
    """Write the picture to `path`."""
    served = [record for record in outcome.records if record.outcome == "length"]
    arrival = np.array([record.arrival_s for record in served])
    figure, panels = plt.subplots(3, 1, figsize=(10, 8), sharex=True, layout="constrained")
    figure.suptitle(
        f"simulated: {summary['model']} on {summary['cluster']}, {summary['trace']}, policy {summary['policy']}"
    )
    edges = np.linspace(0.0, max(outcome.end_s, 1e-3), _NUM_WINDOWS + 1)
    width = edges[1] - edges[0]
    for name, key in (("prompt tokens", "prompt_tokens"), ("output tokens", "output_tokens")):
        weights = [getattr(record, key) for record in outcome.records]
        rate, _ = np.histogram([record.arrival_s for record in outcome.records], edges, weights=weights)
        panels[0].stairs(rate / width, edges, label=f"{name} asked for")
    panels[0].set_ylabel("tokens/s")
    panels[0].legend()
    many = [record for record in served if record.num_tokens > 1]
    for panel, label, x, y, limit in (
        (panels[1], "TTFT (s)", arrival, [record.ttft_s for record in served], summary["slo"]["ttft_s"]),
        (
            panels[2],
            "TPOT (ms)",
            np.array([record.arrival_s for record in many]),
            [1e3 * record.tpot_s for record in many],
            1e3 * summary["slo"]["tpot_s"],
        ),
    ):
        panel.plot(x, y, ".", markersize=2, alpha=0.5)
        panel.axhline(limit, color="grey", linestyle=":", label="SLO")
        panel.set_ylabel(label)
        panel.set_yscale("log")
    for entry in summary["layouts"][1:]:
        for panel in panels:
            panel.axvline(entry["at_s"], color="tab:red", linewidth=0.8)
    panels[2].set_xlabel("seconds of the trace; a red line is a new layout")
    figure.savefig(path, dpi=120)
    plt.close(figure)

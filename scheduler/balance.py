"""The default layout: which split of the layers keeps every stage equally busy. Pure.

The cost of a unit is what it adds to a step in a typical mix: a decode step of `batch` rows reads the unit's weights
or computes on them, whichever takes longer (the roofline: Williams et al., CACM 2009), and each generated token
comes with `prefill_ratio` prompt tokens, of which the LM head computes none. Only the *ratio* of memory bandwidth to
arithmetic matters for a split. The partition that minimises the largest stage is exact (dynamic programming over
prefix sums, O(stages * layers^2)).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """Memory bandwidth in bytes/s, matrix products in FLOP/s."""

    bandwidth: float
    flops: float


CPU_CORE = DeviceSpeed(bandwidth=30e9, flops=430e9)
"""One core with avx512_bf16 in bfloat16, as our kernels reach it (measured)."""
GPU = DeviceSpeed(bandwidth=2.0e12, flops=312e12)
"""An A100 80 GB by its data sheet."""


@dataclass(frozen=True, slots=True)
class Mix:
    """The traffic that a default layout is made for."""

    batch: int = 16
    prefill_ratio: float = 1.0


@dataclass(frozen=True, slots=True)
class UnitCosts:
    """Seconds per generated token: the embedding, each layer, the final norm and LM head."""

    embedding: float
    layers: tuple[float, ...]
    lm_head: float


def unit_costs(spec: ModelSpec, speed: DeviceSpeed, mix: Mix = Mix()) -> UnitCosts:
    """What each unit costs per generated token on a device of `speed` under `mix`."""

    def cost(num_bytes: int, flops: int, prefill_ratio: float) -> float:
        decode = max(num_bytes / speed.bandwidth, mix.batch * flops / speed.flops) / mix.batch
        return decode + prefill_ratio * flops / speed.flops

    layers = tuple(
        cost(num_bytes, flops, mix.prefill_ratio)
        for num_bytes, flops in zip(spec.layer_bytes, spec.layer_flops_per_token, strict=True)
    )
    return UnitCosts(0.0, layers, cost(spec.lm_head_bytes, spec.lm_head_flops_per_token, 0.0))


def balanced_counts(costs: UnitCosts, num_stages: int) -> tuple[int, ...]:
    """Layers per stage that minimise the largest stage's cost; every stage gets at least one layer.

    Raises:
        ValueError: when there are more stages than layers.
    """
    num_layers = len(costs.layers)
    if not 1 <= num_stages <= num_layers:
        raise ValueError(f"{num_stages} stages for {num_layers} layers; between 1 and {num_layers} are possible")
    prefix = [0.0]
    for cost in costs.layers:
        prefix.append(prefix[-1] + cost)

    def stage_cost(stage: int, start: int, stop: int) -> float:
        ends = (costs.embedding if stage == 0 else 0.0) + (costs.lm_head if stage == num_stages - 1 else 0.0)
        return prefix[stop] - prefix[start] + ends

    best: list[float] = [stage_cost(0, 0, stop) if stop else float("inf") for stop in range(num_layers + 1)]
    choice: list[list[int]] = []
    for stage in range(1, num_stages):
        row, cuts = [float("inf")] * (num_layers + 1), [0] * (num_layers + 1)
        for stop in range(stage + 1, num_layers + 1):
            for cut in range(stage, stop):
                worst = max(best[cut], stage_cost(stage, cut, stop))
                if worst < row[stop]:
                    row[stop], cuts[stop] = worst, cut
        best = row
        choice.append(cuts)
    return _counts(choice, num_layers)


def _counts(choice: Sequence[Sequence[int]], num_layers: int) -> tuple[int, ...]:
    counts, stop = [], num_layers
    for cuts in reversed(choice):
        counts.append(stop - cuts[stop])
        stop = cuts[stop]
    counts.append(stop)
    return tuple(reversed(counts))

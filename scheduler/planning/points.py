"""Operating points: so many stages with so many sequences in service, and the problem that this makes of the devices. Pure.

The number of stages decides how many microbatches the running sequences are divided among, and so what a step is and what units cost in it;
the sequences in service decide how much memory KV takes beside the weights. `Setting` is what all points of one plan share; it
makes R of them at once (`Points`), and the search takes those that are promising one by one (`Point`).

Never true: a point has more sequences in service than their KV has room for on some choice of so many devices, unless it has one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from scheduler.planning import compiled
from scheduler.planning.cost import Facts
from scheduler.planning.forecast import Cluster, Device, Forecaster
from scheduler.planning.rounds import Rounds, StepTimes
from scheduler.planning.search import Solver
from scheduler.planning.splits import Problem, Split
from scheduler.planning.traffic import Serving, Traffic

FAST, SLOW, MEAN, EVEN = range(4)
"""Kinds of steps: those that only decode, those that also prefill, their mean, and *even* ones, whose busiest stage times the steps in flight is
the convoy's round if stages are even."""
_EVEN_SHARE = 0.97


@dataclass(frozen=True)
class Points:
    """R operating points: ``ks [R]`` stages each. ``in_service``, ``in_flight``, ``requests`` (that a step finishes) and ``share`` (of slow steps) ``[R]``;
    ``stage [4, R, n]``, ``layers [4, R, n, U]``, ``last [4, R, n]`` are seconds of each kind of step; ``memory [R, 4, n]`` layers in each role,
    None where layers differ."""

    ks: np.ndarray
    in_service: np.ndarray
    in_flight: np.ndarray
    requests: np.ndarray
    share: np.ndarray
    stage: np.ndarray
    layers: np.ndarray
    last: np.ndarray
    memory: list[np.ndarray] | None
    num_layers: int

    @property
    def served(self) -> np.ndarray:
        """``[R]``: requests that a round finishes."""
        return self.requests * self.in_flight

    def times(self, row: int) -> StepTimes:
        """Of one point, a fast and a slow step."""
        return StepTimes(self.stage[:MEAN, row], self.layers[:MEAN, row], self.last[:MEAN, row])

    @cached_property
    def busiest_s(self) -> np.ndarray:
        """``[R]``: for equal layers, no stage that is the busiest in mean is below."""
        return self._relaxed(MEAN)

    @cached_property
    def even_rounds_s(self) -> np.ndarray:
        """``[R]``: for equal layers, rounds that no split is expected to go below: what even stages would take, less a little (what uneven ones may
        gain; planning with no such bound gave the same plans)."""
        return self.in_flight * np.maximum(self.busiest_s, _EVEN_SHARE * self._relaxed(EVEN))

    def round_bounds_s(self, limits: np.ndarray) -> np.ndarray:
        """``[R]``: for equal layers, no split has a round that is shorter than this and than ``limits [R]``."""
        return compiled.bottlenecks.round_bounds(
            self.stage[:EVEN], self.layers[:EVEN, :, :, 0], self.last[:EVEN], self.busiest_s, self._relaxed(FAST),
            self.share, self.in_flight, self.ks, self.num_layers, limits,
        )  # fmt: skip

    def _relaxed(self, kind: int) -> np.ndarray:
        return compiled.bottlenecks.relaxed_bottlenecks(
            self.stage[kind], self.layers[kind, :, :, 0], self.last[kind], self.num_layers, self.ks
        )


@dataclass(frozen=True)
class Point:
    """One of them: `served` requests a round, `num_sequences` in service, and the problem for k stages in mean steps."""

    k: int
    num_sequences: float
    served: float
    problem: Problem
    share: float
    times: StepTimes
    kind_of_layer: np.ndarray
    memory: np.ndarray | None

    @cached_property
    def solver(self) -> Solver:
        return Solver(self.problem, self.k, self.memory)

    @cached_property
    def rounds(self) -> Rounds:
        return Rounds(self.problem, self.times, self.kind_of_layer, self.share)

    def split(self, order: Sequence[int], counts: Sequence[int]) -> Split:
        """Of equal layers."""
        problem, devices, counts_ = self.problem, np.array(order), np.array(counts)
        times = problem.stage[devices] + counts_ * problem.layers[devices, 0]
        times[-1] += problem.last[devices[-1]]
        return Split(tuple(order), tuple(counts), float(times.max()), float(times.sum()))


class Setting:
    """A model, devices and a load, and what memory is left for both: ``rooms [n]`` bytes, inf without a limit.

    `headroom` is the share of each device's memory that stays empty, where page pools are yet to be made.
    """

    def __init__(
        self, facts: Facts, devices: Sequence[Device], traffic: Traffic, serving: Serving, headroom: float
    ) -> None:
        self.facts, self.devices, self.traffic, self.serving = facts, devices, traffic, serving
        self.names = [device.worker for device in devices]
        self.cluster = Cluster(facts, devices)
        self.forecaster = Forecaster(facts, self.cluster, traffic, serving)
        self.is_uniform = len(facts.flops) == 1
        has_pools = all(device.pool_bytes for device in devices)
        if has_pools:  # what is to grow has grown: the pools are the worker's to keep, beside what it leaves alone
            headroom = 0.0
        memory = self.cluster.memory
        free = memory * (1.0 - headroom) - (self.cluster.pools if has_pools else 0.0)
        self.rooms = np.where(memory > 0.0, free, np.inf)
        self._has_room = not memory.any()
        self._kv_per_sequence = 0.0 if has_pools else float(serving.kv_tokens(traffic, 1.0) * facts.kv_bytes)
        self._ends = float(facts.spec.embedding_bytes), float(facts.spec.lm_head_bytes)
        self._weight_bytes = float(facts.layer_bytes.sum()) + sum(self._ends)

    def points(self, ks: Sequence[int], in_service: float | Sequence[float]) -> Points:
        """So many stages each, with so many sequences in service, or fewer where they have no room."""
        ks_ = np.array(ks, dtype=np.int64)
        wanted = self._with_room(ks_, np.maximum(1.0, np.full(len(ks), in_service)))
        shape, num_kinds = (4, len(ks), len(self.names)), len(self.facts.flops)
        steps, stage, layers, last = (
            np.empty((3, len(ks))),
            np.empty(shape),
            np.empty((*shape, num_kinds)),
            np.empty(shape),
        )
        microbatches = np.maximum(float(self.serving.num_microbatches), ks_)
        compiled.steps.unit_rows(self.forecaster.law, ks_, microbatches, wanted, steps, stage, layers, last)
        memory = [self._memory(in_service) for in_service in wanted.tolist()] if self.is_uniform else None
        in_flight, requests, share = steps
        return Points(ks_, wanted, in_flight, requests, share, stage, layers, last, memory, self.facts.num_layers)

    def point(self, points: Points, row: int) -> Point:
        """The problem of one of them."""
        facts, num_sequences = self.facts, float(points.in_service[row])
        layers, in_flight = points.layers[MEAN, row], float(points.in_flight[row])
        problem = Problem(
            stage=points.stage[MEAN, row],
            layers=layers.repeat(facts.num_layers, axis=1) if self.is_uniform else layers[:, facts.kind_of_layer],
            last=points.last[MEAN, row],
            room=self.rooms,
            layer_bytes=facts.layer_bytes + self._kv_per_sequence * num_sequences,
            first_bytes=self._ends[0],
            last_bytes=self._ends[1],
            in_flight=in_flight,
        )
        return Point(
            int(points.ks[row]), num_sequences, float(points.requests[row]) * in_flight, problem, float(points.share[row]),
            points.times(row), facts.kind_of_layer, points.memory[row] if points.memory is not None else None,
        )  # fmt: skip

    def alone(self, k: int, in_service: float) -> Point:
        """One operating point by itself."""
        return self.point(self.points([k], in_service), 0)

    def why_nothing_fits(self, most: int) -> str:
        """What is missing on the `most` devices that have most memory."""
        need = self._weight_bytes + self._kv_per_sequence * self.facts.num_layers
        room = float(np.sort(self.rooms)[::-1][:most].sum())
        return (
            f"{self.facts.spec.name} needs {need / 1e9:.1f} GB for its weights and the KV of one sequence of"
            f" {self.traffic.mean_context:.0f} tokens, in pieces of whole layers; the devices have {room / 1e9:.1f} GB"
            f" ({', '.join(f'{name} {bytes_ / 1e9:.1f}' for name, bytes_ in zip(self.names, self.rooms, strict=True))})."
            " Add devices, or lower the headroom"
        )

    def _memory(self, in_service: float) -> np.ndarray:
        """``[4, n]``: for how many layers there is memory in each role, with the KV of so many."""
        layer_bytes = float(self.facts.layer_bytes[0]) + self._kv_per_sequence * in_service
        return compiled.bottlenecks.memory_caps(self.rooms, *self._ends, layer_bytes, self.facts.num_layers)

    def _with_room(self, ks: np.ndarray, in_service: np.ndarray) -> np.ndarray:
        """``[R]``: the sequences in service, halved until the KV of so many has room on some ``ks [R]`` of the devices; 1 at least."""
        if self._has_room:
            return in_service
        kv = self._kv_per_sequence
        if self.is_uniform:
            layer_bytes = float(self.facts.layer_bytes[0])
            return compiled.bottlenecks.with_room(
                self.rooms, *self._ends, layer_bytes, kv, self.facts.num_layers, ks, in_service
            )
        loads = np.maximum(1.0, in_service[:, None] / 2.0 ** np.arange(math.ceil(math.log2(in_service.max())) + 1))
        fits = (
            self._weight_bytes + kv * loads * self.facts.num_layers <= np.sort(self.rooms)[::-1].cumsum()[ks - 1, None]
        )
        fits[:, -1] = True
        return loads[np.arange(len(ks)), fits.argmax(axis=1)]

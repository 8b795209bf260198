"""What a step, a hop and a migration cost: a roofline with coefficients. Pure.

A step is a `Work`: so many decoding sequences at such a context, so many prompt tokens at such a context, so many rows
that are sampled. What it costs a stage is a sum over the units that the stage holds:

    stage    = step + sum over its layers (layer + products + attention) + [last: head + sample * rows * vocabulary]
    products = norm_p(bytes read / bandwidth, FLOP / rate)                      of a layer's matrices
    attention = norm_p(KV bytes read / bandwidth, FLOP / rate)
    head     = norm_p(...) of the LM head, for the sampled rows only

`norm_p(a, b) = (a^p + b^p)^(1/p)` is the roofline (Williams, Waterman and Patterson, CACM 2009) with its corner rounded: with
p = infinity it is the larger of the two, as if memory and arithmetic overlapped perfectly, with p = 1 their sum. Of a
layer of experts only those are read that some token is routed to: of E experts with k chosen per token, T tokens
touch E (1 - (1 - k/E)^T) when routing is uniform.

Each of the eight terms has a coefficient (`Speed.scale`), 1 as long as nothing was measured; `planning.calibration`
learns them. Every function works on arrays of devices and of works alike, since the planner asks for thousands at once.

Never true: a cost depends on anything but its arguments. The embedding costs nothing but memory (a lookup).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import msgspec
import numpy as np

from kvstore.ids import LayerRange
from runtime.layout import Layout, moves_between
from runtime.model.spec import ModelSpec
from scheduler.planning.devices import DeviceKind

TERMS = ("step", "layer", "weights", "products", "kv", "scores", "head", "sample")
"""The terms of a stage's time, in the order of `Speed.scale`."""

QUERY_TILE = 64
"""Rows of one prompt that share a reading of its KV, as tiled attention kernels do (ours, FlashAttention)."""


class Work(msgspec.Struct, frozen=True):
    """What one step asks of a pipeline. Means may be fractions; contexts are positions attended to, per row."""

    decode_rows: float = 0.0
    decode_context: float = 0.0
    prefill_tokens: float = 0.0
    prefill_context: float = 0.0
    samples: float = 0.0

    @property
    def num_tokens(self) -> float:
        return self.decode_rows + self.prefill_tokens


@dataclass(frozen=True, slots=True)
class Works:
    """Works as columns, ``[K]`` each."""

    decode_rows: np.ndarray
    decode_context: np.ndarray
    prefill_tokens: np.ndarray
    prefill_context: np.ndarray
    samples: np.ndarray

    @classmethod
    def of(cls, works: Sequence[Work]) -> "Works":
        return cls(*np.array([msgspec.structs.astuple(work) for work in works]).T)

    @property
    def num_tokens(self) -> np.ndarray:
        return self.decode_rows + self.prefill_tokens


def work_of_rows(rows: Iterable[tuple[int, int, bool]]) -> Work:
    """The work of a step whose rows are ``(start, num_tokens, is_sampled)``: one token is decoding, more are prefill."""
    decode_rows = decode_sum = prefill_tokens = prefill_sum = samples = 0
    for start, num_tokens, is_sampled in rows:
        samples += is_sampled
        if num_tokens == 1:
            decode_rows += 1
            decode_sum += start + 1
        else:
            prefill_tokens += num_tokens
            prefill_sum += num_tokens * start + num_tokens * (num_tokens + 1) // 2
    return Work(
        decode_rows=decode_rows,
        decode_context=decode_sum / max(decode_rows, 1),
        prefill_tokens=prefill_tokens,
        prefill_context=prefill_sum / max(prefill_tokens, 1),
        samples=samples,
    )


class Speed(msgspec.Struct, frozen=True):
    """A device as the cost model sees it: its kind, and a coefficient for each of `TERMS` (2.0 is twice as slow)."""

    kind: DeviceKind
    scale: tuple[float, ...] = (1.0,) * len(TERMS)


class Facts:
    """What the cost model needs of a model, once: its layers fall into few kinds, each costed once."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.num_layers = spec.num_layers
        experts = spec.layer_expert_bytes or (0,) * spec.num_layers
        windows = spec.layer_windows or (spec.sliding_window,) * spec.num_layers
        rows = list(zip(spec.layer_bytes, experts, spec.layer_flops_per_token, windows, strict=True))
        kinds = list(dict.fromkeys(rows))
        self.kind_of_layer = np.array([kinds.index(row) for row in rows], dtype=np.intp)
        self.dense_bytes = np.array([float(total - expert) for total, expert, _, _ in kinds])
        self.expert_bytes = np.array([float(expert) for _, expert, _, _ in kinds])
        self.flops = np.array([float(flops) for _, _, flops, _ in kinds])
        self.windows = np.array([np.inf if window is None else float(window) for _, _, _, window in kinds])
        self.untouched = 1.0 - spec.experts_per_token / spec.num_experts if spec.num_experts else 0.0
        self.until = np.zeros((spec.num_layers + 1, len(kinds) + 1))
        """``[num_layers + 1, U + 1]``: how many layers of each kind there are before each layer, and their bytes; for `planning.compiled`."""
        np.cumsum(self.kind_of_layer[:, None] == np.arange(len(kinds)), axis=0, out=self.until[1:, :-1])
        np.cumsum(spec.layer_bytes, out=self.until[1:, -1])
        self._rows = list(
            zip(*map(np.ndarray.tolist, (self.dense_bytes, self.expert_bytes, self.flops, self.windows)), strict=True)
        )
        self._within: dict[tuple[int, int], list[tuple[float, float, float, float, float]]] = {}
        self.kv_bytes = float(spec.kv_bytes_per_token_layer())
        self.score_flops = 4.0 * spec.num_heads * spec.head_dim
        self.hidden_bytes = spec.hidden_size * (4 if spec.dtype == "float32" else 2)
        self.kinds = np.stack([self.dense_bytes, self.expert_bytes, self.flops, self.windows], axis=1)
        """``[U, 4]``: the same of each kind of layer, for `planning.compiled`."""
        self.model = np.array(
            [
                self.untouched,
                self.kv_bytes,
                self.score_flops,
                spec.lm_head_bytes,
                spec.lm_head_flops_per_token,
                spec.vocab_size,
            ],
            dtype=float,
        )
        """``[6]``: what all layers share, and the LM head."""

    def kinds_within(self, layers: LayerRange) -> list[tuple[float, float, float, float, float]]:
        """Of each kind of layer among `layers`: how many, bytes without experts, of all experts, FLOP a token, window."""
        key = layers.start, layers.stop
        if key not in self._within:
            counts = np.bincount(self.kind_of_layer[layers.start : layers.stop], minlength=len(self.flops)).tolist()
            self._within[key] = [(float(c), *row) for c, row in zip(counts, self._rows, strict=True) if c]
        return self._within[key]

    @cached_property
    def layer_bytes(self) -> np.ndarray:
        """Weights of each layer, ``[num_layers]``."""
        return (self.dense_bytes + self.expert_bytes)[self.kind_of_layer]


@dataclass(frozen=True, slots=True)
class UnitTimes:
    """Seconds per step: K works, n devices, U kinds of layer. A stage is ``fixed + its layers (+ last)``."""

    fixed: np.ndarray
    """``[n]``"""
    layers: np.ndarray
    """``[K, n, U]``"""
    last: np.ndarray
    """``[K, n]``: what the LM head and the sampling add to the last stage."""


def unit_times(facts: Facts, speeds: "Sequence[Speed] | Speeds", works: Sequence[Work] | Works) -> UnitTimes:
    """What every unit costs on every device in every one of the works."""
    device = speeds if isinstance(speeds, Speeds) else Speeds.of(speeds)
    columns = works if isinstance(works, Works) else Works.of(works)
    elements = np.stack(layer_elements(facts, device, columns))
    products, attention = corner(elements[0::2], elements[1::2], device.sharpness[:, None])
    head, sample = head_elements(facts, device, columns)
    return UnitTimes(device.step, device.layer[:, None] + products + attention, head + sample)


def stage_seconds(facts: Facts, speed: Speed, work: Work, layers: Sequence[int], is_last: bool) -> float:
    """What one step costs a stage that holds `layers` (indices), and the LM head if `is_last`."""
    times = unit_times(facts, [speed], [work])
    kinds = facts.kind_of_layer[np.asarray(layers, dtype=np.intp)]
    return float(times.fixed[0] + times.layers[0, 0, kinds].sum() + (times.last[0, 0] if is_last else 0.0))


def stage_terms(
    facts: Facts, speed: Speed, work: Work, layers: LayerRange, *, with_step: bool = True, with_head: bool = False
) -> np.ndarray:
    """The same time taken apart, ``[8]`` seconds in the order of `TERMS`; they add up to it.

    A term's share is also the derivative of the time's logarithm by the logarithm of the term's coefficient (Euler's
    theorem on homogeneous functions, for the rounded corner too).
    """
    kind, scale = speed.kind, speed.scale
    byte_s, flop_s = 1.0 / (kind.bandwidth * kind.bandwidth_fraction), 1.0 / (kind.flops * kind.flops_fraction)
    kv_s = facts.kv_bytes * scale[4] / (kind.bandwidth * kind.kv_fraction)
    score_s = facts.score_flops * scale[5] / (kind.flops * kind.attention_fraction)
    tokens, rows, prompt = work.num_tokens, work.decode_rows, work.prefill_tokens
    terms = [with_step * kind.step_s * scale[0], len(layers) * kind.layer_s * scale[1], *([0.0] * 6)]
    for count, dense, experts, flops, window in facts.kinds_within(layers) if tokens > 0 else ():
        read = dense + experts * (1.0 - facts.untouched**tokens) if experts else dense
        decode, context = rows * min(work.decode_context, window), min(work.prefill_context, window)
        products = _shares(read * byte_s * scale[2], flops * tokens * flop_s * scale[3], kind.sharpness)
        attention = _shares(
            (decode + prompt * context / QUERY_TILE) * kv_s, (decode + prompt * context) * score_s, kind.sharpness
        )
        for at, seconds in enumerate((*products, *attention), start=2):
            terms[at] += count * seconds
    if with_head:
        spec, sampled = facts.spec, max(work.samples, 1.0)
        reading, product = spec.lm_head_bytes * byte_s, spec.lm_head_flops_per_token * sampled * flop_s
        terms[6] = min(work.samples, 1.0) * sum(_shares(reading * scale[6], product * scale[6], kind.sharpness))
        terms[7] = work.samples * spec.vocab_size * kind.logit_s * scale[7]
    return np.array(terms)


def hop_seconds(facts: Facts, kind: DeviceKind, num_tokens: float) -> float:
    """One hop out of a device: the hidden state of `num_tokens` rows on the wire, and its latency."""
    return kind.link_latency_s + num_tokens * facts.hidden_bytes / kind.link_bytes_per_s


# -- migrations ---------------------------------------------------------------------------------------------


class MigrationCost(msgspec.Struct, frozen=True):
    """What a change of layout moves, and for how long it goes on in the background. It stops nothing."""

    num_layers: int
    weight_bytes: int
    kv_bytes: int
    seconds: float


def migration_cost(
    facts: Facts,
    present: Layout,
    proposed: Layout,
    *,
    kv_tokens: float,
    kv_bytes_per_s: float,
    load_bytes_per_s: float,
    overhead_s: float = 0.5,
) -> MigrationCost:
    """The change from `present` to `proposed` while `kv_tokens` tokens are live or cached.

    Targets load weights at `load_bytes_per_s` each, sources copy KV at `kv_bytes_per_s` each (the limiter's rate); all of
    them at once, and the copy begins while weights load, so the slowest of either decides. `overhead_s` is for the
    phases that move nothing.
    """
    loads: dict[str, float] = {}
    copies: dict[str, float] = {}
    num_layers = 0
    for move in moves_between(present, proposed):
        num_layers += len(move.layers)
        weights = float(facts.layer_bytes[move.layers.start : move.layers.stop].sum())
        loads[move.target] = loads.get(move.target, 0.0) + weights
        copies[move.source] = copies.get(move.source, 0.0) + len(move.layers) * kv_tokens * facts.kv_bytes
    for worker, before, num_bytes in (
        (proposed.embedding_worker, present.embedding_worker, facts.spec.embedding_bytes),
        (proposed.lm_head_worker, present.lm_head_worker, facts.spec.lm_head_bytes),
    ):
        if worker != before:
            loads[worker] = loads.get(worker, 0.0) + num_bytes
    slowest = max(
        max(loads.values(), default=0.0) / load_bytes_per_s, max(copies.values(), default=0.0) / kv_bytes_per_s
    )
    moved = bool(loads) or present.segments != proposed.segments
    return MigrationCost(
        num_layers, round(sum(loads.values())), round(sum(copies.values())), slowest + overhead_s if moved else 0.0
    )


# -- the elements, which calibration takes apart --------------------------------------------------------------


class Speeds(NamedTuple):
    """Speeds as columns ``[n]``; seconds per unit of each element."""

    step: np.ndarray
    layer: np.ndarray
    weights: np.ndarray
    products: np.ndarray
    kv: np.ndarray
    scores: np.ndarray
    head_bytes: np.ndarray
    head_flops: np.ndarray
    sample: np.ndarray
    sharpness: np.ndarray

    @classmethod
    def of(cls, speeds: Sequence[Speed]) -> "Speeds":
        rows = []
        for speed in speeds:
            kind, scale = speed.kind, speed.scale
            byte_s = 1.0 / (kind.bandwidth * kind.bandwidth_fraction)
            flop_s = 1.0 / (kind.flops * kind.flops_fraction)
            rows.append((
                kind.step_s * scale[0],
                kind.layer_s * scale[1],
                byte_s * scale[2],
                flop_s * scale[3],
                scale[4] / (kind.bandwidth * kind.kv_fraction),
                scale[5] / (kind.flops * kind.attention_fraction),
                byte_s * scale[6],
                flop_s * scale[6],
                kind.logit_s * scale[7],
                kind.sharpness,
            ))  # fmt: skip
        return cls(*np.array(rows).T.copy())

    def of_devices(self, devices: np.ndarray) -> "Speeds":
        """Only these devices, by their indices, in this order."""
        return Speeds(*(column[devices] for column in self))


def layer_elements(facts: Facts, device: Any, work: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Seconds ``[K, n, U]`` of reading weights, of products, of reading KV, and of attention's arithmetic."""
    weights, products, kv, scores = layer_amounts(
        facts.dense_bytes, facts.expert_bytes, facts.flops, facts.windows,
        facts.untouched, facts.kv_bytes, facts.score_flops,
        work.decode_rows[:, None], work.decode_context[:, None],
        work.prefill_tokens[:, None], work.prefill_context[:, None],
    )  # fmt: skip
    return (
        weights[:, None, :] * device.weights[:, None],
        products[:, None, :] * device.products[:, None],
        kv[:, None, :] * device.kv[:, None],
        scores[:, None, :] * device.scores[:, None],
    )


def layer_amounts(
    dense: Any, experts: Any, flops: Any, window: Any, untouched: float, kv_bytes: float, score_flops: float,
    decode_rows: Any, decode_context: Any, prefill_tokens: Any, prefill_context: Any,
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """The law of a layer: bytes of weights read, FLOP of products, bytes of KV read, FLOP of attention.

    For numbers or for arrays, which numba compiles into the planner's loops as it is.
    """
    tokens = decode_rows + prefill_tokens
    decode = decode_rows * np.minimum(decode_context, window)
    context = np.minimum(prefill_context, window)
    weights = pick(tokens > 0.0, dense + experts * (1.0 - untouched**tokens), 0.0)
    kv = (decode + prefill_tokens * context / QUERY_TILE) * kv_bytes
    return weights, flops * tokens, kv, (decode + prefill_tokens * context) * score_flops


def _shares(a: float, b: float, p: float) -> tuple[float, float]:
    """Two elements as parts of their rounded corner: they add up to its `corner`."""
    high, low = (a, b) if a > b else (b, a)
    if high <= 0.0:
        return 0.0, 0.0
    total = high * (1.0 + (low / high) ** p) ** (1.0 / p)
    return a * (a / total) ** (p - 1), b * (b / total) ** (p - 1)


def head_elements(facts: Facts, device: Any, work: Any) -> tuple[np.ndarray, np.ndarray]:
    """Seconds ``[K, n]`` of the LM head for the sampled rows, and of drawing their tokens.

    A fraction of a row is a share of the steps: in mean, that share of them reads the head's weights.
    """
    samples = work.samples[:, None]
    share = np.minimum(samples, 1.0)
    rows = np.maximum(samples, 1.0)
    reading = facts.spec.lm_head_bytes * device.head_bytes
    product = facts.spec.lm_head_flops_per_token * rows * device.head_flops
    return share * corner(reading, product, device.sharpness), samples * facts.spec.vocab_size * device.sample


def corner(a: Any, b: Any, p: Any) -> Any:
    """The roofline with its corner rounded, ``(a^p + b^p)^(1/p)``; for numbers or for arrays, like `layer_amounts`."""
    high, low = np.maximum(a, b), np.minimum(a, b)
    return high * root(1.0 + power(low / np.maximum(high, 1e-300), p), p)


def power(x: Any, p: Any) -> Any:
    """``x^p``; numba has a shorter way for the p of most devices (`compiled.build`)."""
    return x**p


def root(x: Any, p: Any) -> Any:
    """``x^(1/p)``, likewise."""
    return x ** (1.0 / p)


def pick(condition: Any, yes: Any, no: Any) -> Any:
    """`yes` where the condition holds, else `no`; for numbers or for arrays, like `layer_amounts`."""
    return np.where(condition, yes, no)

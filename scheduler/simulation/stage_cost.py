"""What a step costs one stage, for one step at a time and fast. Pure.

The same sums as `planning.cost`, which costs thousands of steps at once in arrays; here everything that does not depend
on the step is multiplied out beforehand, and a step takes some microseconds. A test holds the two together.
"""

from dataclasses import dataclass

import numpy as np

from kvstore.ids import LayerRange
from scheduler.planning.cost import QUERY_TILE, Facts, Speed, Work


@dataclass(frozen=True, slots=True)
class _Kind:
    """Layers of one kind on a device; seconds for a step's fixed parts, and per token or row."""

    index: int
    count: int
    layer_s: float
    dense_s: float
    expert_s: float
    token_s: float
    window: float


class StageCost:
    """The compute and sampling time of a segment on a device. `is_last`: it holds the LM head."""

    def __init__(self, facts: Facts, speed: Speed, layers: LayerRange, *, is_last: bool) -> None:
        kind, scale = speed.kind, speed.scale
        byte_s = 1.0 / (kind.bandwidth * kind.bandwidth_fraction)
        flop_s = 1.0 / (kind.flops * kind.flops_fraction)
        counts = np.bincount(facts.kind_of_layer[layers.start : layers.stop], minlength=len(facts.flops))
        self.counts = counts.tolist()
        """Layers of each kind."""
        self._kinds = [
            _Kind(
                i,
                count,
                kind.layer_s * scale[1],
                float(facts.dense_bytes[i]) * byte_s * scale[2],
                float(facts.expert_bytes[i]) * byte_s * scale[2],
                float(facts.flops[i]) * flop_s * scale[3],
                float(facts.windows[i]),
            )
            for i, count in enumerate(self.counts)
        ]
        self.is_last = is_last
        self.num_hops = 1
        """Of its layout, and whether each of them is on another worker."""
        self.is_only = False
        self.speed = speed
        self.step_s = kind.step_s * scale[0]
        self._kv_s = facts.kv_bytes * scale[4] / (kind.bandwidth * kind.kv_fraction)
        self._score_s = facts.score_flops * scale[5] / (kind.flops * kind.attention_fraction)
        self._head_bytes_s = facts.spec.lm_head_bytes * byte_s * scale[6]
        self._head_row_s = facts.spec.lm_head_flops_per_token * flop_s * scale[6]
        self._sample_s = facts.spec.vocab_size * kind.logit_s * scale[7]
        self._untouched = facts.untouched
        self._p = kind.sharpness

    def compute_s(self, work: Work, known: dict[int, list[float]]) -> float:
        """The forward pass of the stage's layers. `known` is kept from stage to stage of the same step."""
        layers_s = known.get(id(self.speed))
        if layers_s is None:
            layers_s = known[id(self.speed)] = self.layers_s(work)
        seconds = self.step_s
        for kind in self._kinds:
            seconds += kind.count * layers_s[kind.index]
        return seconds

    def layers_s(self, work: Work) -> list[float]:
        """One layer of each kind, on this device."""
        return [self._one_layer_s(kind, work) for kind in self._kinds]

    def sample_s(self, work: Work) -> float:
        """The LM head and the sampling; nothing on a stage that is not the last."""
        if not self.is_last or not work.samples:
            return 0.0
        share, rows = min(work.samples, 1.0), max(work.samples, 1.0)
        return share * self._norm(self._head_bytes_s, self._head_row_s * rows) + work.samples * self._sample_s

    def _one_layer_s(self, kind: _Kind, work: Work) -> float:
        tokens = work.decode_rows + work.prefill_tokens
        if not tokens:
            return kind.layer_s
        decode = work.decode_rows * min(work.decode_context, kind.window)
        context = min(work.prefill_context, kind.window)
        weights = kind.dense_s + kind.expert_s * (1.0 - self._untouched**tokens)
        kv = (decode + work.prefill_tokens * context / QUERY_TILE) * self._kv_s
        scores = (decode + work.prefill_tokens * context) * self._score_s
        return kind.layer_s + self._norm(weights, kind.token_s * tokens) + self._norm(kv, scores)

    def _norm(self, a: float, b: float) -> float:
        high, low = (a, b) if a > b else (b, a)
        return high * (1.0 + (low / high) ** self._p) ** (1.0 / self._p) if high else 0.0

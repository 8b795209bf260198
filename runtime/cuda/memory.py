"""How a device's memory is shared out between the page pool and everything else. Pure.

The pool never moves, and may have a fixed size, so what will be needed beside it is left free from the start: room for the layers
that a change of layout brings (or, where the pool shrinks for those, for what building them takes), graphs with their inputs, the
largest step's activations, and the sampler's tables. Within the pool, layers that come and go take and return pages, so
what a worker holds per layer grows and shrinks with the number of its layers.
"""

from dataclasses import dataclass

from runtime.cuda.spans import LONGEST_SPAN, Buckets, static_bytes
from runtime.model.spec import ModelSpec

GRAPH_BYTES = 512 << 10
"""One captured span: its nodes and their arguments. An assumption; the driver does not say."""
CONTEXT_BYTES = 256 << 20
"""cuBLAS workspaces of three streams and the allocator's rounding."""
SAMPLING_BYTES = 512 << 20
"""Temporaries of a draw, which `runtime.draw` bounds."""
STEP_TOKENS = 2048
"""The largest step that is reckoned with; the server's default is a quarter of that."""
ARRIVING_LAYERS = 2
"""A change in place moves as few layers at a time as fit; so many always do."""


@dataclass(frozen=True, slots=True)
class Reserve:
    """Bytes that the pool leaves free."""

    arriving: int
    graphs: int
    activations: int
    fixed: int

    @property
    def total(self) -> int:
        return self.arriving + self.graphs + self.activations + self.fixed


def reserve_for(spec: ModelSpec, buckets: Buckets | None, block_size: int) -> Reserve:
    """What a worker of this model needs beside its weights and its pool, with graphs of `buckets` or without any."""
    element = 4 if spec.dtype == "float32" else 2
    # Weights of a layer tell its widest activation: gate and up have hidden_size inputs each.
    widest = max(spec.layer_bytes) // (element * spec.hidden_size)
    token = (widest + 8 * spec.hidden_size) * element
    graphs = 0
    if buckets is not None:
        num_spans = spec.num_layers // LONGEST_SPAN + 4 + LONGEST_SPAN  # cut at both ends, and what `cover` allows
        graphs = num_spans * len(buckets.all()) * GRAPH_BYTES
        graphs += static_bytes(buckets, spec.num_layers, spec.hidden_size * element, block_size)
        graphs += 2 * (buckets.most_positions or 0) * spec.kv_bytes_per_token_layer()
        graphs += sum(buckets.of_head()) * spec.vocab_size * (4 + element)  # logits stay where graphs left them
        graphs += max(buckets.tokens, default=0) * token
    return Reserve(ARRIVING_LAYERS * max(spec.layer_bytes), graphs, STEP_TOKENS * token, CONTEXT_BYTES + SAMPLING_BYTES)


def kv_budget(free_bytes: int, reserve: Reserve) -> int:
    """Bytes for the page pool of a worker at most, when so many are free and its weights are loaded."""
    return max(0, free_bytes - reserve.total)

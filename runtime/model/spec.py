"""What the head and the planner must know of a model, read from its folder without building it."""

from collections.abc import Iterable

import msgspec


class ModelSpec(msgspec.Struct, frozen=True):
    """Shapes and sizes of a decoder-only model. FLOP count a multiply-add as 2.

    Bytes are those of the serving dtype, with `quantize` "int8" those of the matrices' integers and their scales.
    """

    name: str
    folder: str
    architecture: str
    dtype: str
    load_format: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    tied_embeddings: bool
    layer_bytes: tuple[int, ...]
    embedding_bytes: int
    lm_head_bytes: int
    layer_flops_per_token: tuple[int, ...]
    lm_head_flops_per_token: int
    eos_token_ids: tuple[int, ...]
    sliding_window: int | None = None
    layer_windows: tuple[int | None, ...] = ()
    """The positions that each layer attends to, None for all; empty: `sliding_window` for every layer."""
    num_experts: int = 0
    experts_per_token: int = 0
    layer_expert_bytes: tuple[int, ...] = ()
    """The part of `layer_bytes` that is routed experts, of which a token meets `experts_per_token`; empty: none."""
    quantize: str = ""

    def weight_bytes(self, layers: Iterable[int], *, embedding: bool, lm_head: bool) -> int:
        """Bytes of some layers and perhaps ends on one worker. Of tied ends that share a matrix, the larger counts."""
        ends = (self.embedding_bytes * embedding, self.lm_head_bytes * lm_head)
        return sum(self.layer_bytes[layer] for layer in layers) + (max(ends) if self.tied_embeddings else sum(ends))

    def kv_bytes_per_token_layer(self) -> int:
        """K and V of one position in one layer, in bytes."""
        return 2 * self.num_kv_heads * self.head_dim * (4 if self.dtype == "float32" else 2)

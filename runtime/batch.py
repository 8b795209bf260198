"""What the model needs to know of one step on one worker: built once per step, read by every layer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

NOT_TIMED = np.empty(0, np.int64)


@dataclass(slots=True)
class StepBatch:
    """A ragged batch of R rows, T tokens in all, flattened along the token axis.

    Row r holds tokens ``query_starts[r] : query_starts[r + 1]``, at positions
    ``context_lens[r] - query_len .. context_lens[r]``. Decode rows are simply rows of length 1.
    """

    positions: torch.Tensor
    """int64 ``[T]``, on the device."""
    query_starts: np.ndarray
    """int32 ``[R + 1]``."""
    context_lens: np.ndarray
    """int32 ``[R]``: KV rows of the sequence once this step has written its own."""
    block_tables: np.ndarray
    """int32 ``[R, max_blocks]`` of block ids, zero padded."""
    prompt_lens: np.ndarray | None = None
    """int32 ``[R]``: tokens of the row's prompt. A position takes the CPU kernel of prefill when it is below, that of decode
    when it is not, so that its rounding follows from the request alone: not from chunks, cached prefixes or recomputation.
    None: rows of one token decode, all others are prompts."""
    memo: dict[Any, Any] = field(default_factory=dict)
    """Room for what is derived once per step (rotary tables, page tables, masks). Keys are the users' own."""
    spent: np.ndarray = field(default_factory=lambda: NOT_TIMED)
    """int64: where the nanoseconds of products and attention are added (`runtime.kernels.clock`); empty when nobody asks."""
    paged: Any = None
    """The step as tensors (`runtime.cuda.step.PagedStep`), on devices that have no kernels of ours; else None."""

    def __post_init__(self) -> None:
        if self.prompt_lens is None:
            self.prompt_lens = np.where(np.diff(self.query_starts) > 1, self.context_lens, 0)

    @property
    def num_rows(self) -> int:
        return len(self.context_lens)

    @property
    def num_tokens(self) -> int:
        return int(self.query_starts[-1])


@dataclass(slots=True)
class LayerKV:
    """The KV pages of one layer on one worker.

    `data` is the worker's whole page pool, ``[capacity, 2, block_size, num_kv_heads, head_dim]`` (0 is K, 1 is V);
    `page_of_block` maps a block id to its page for this layer, int32 ``[num_blocks]``, -1 where there is none.
    """

    layer: int
    data: torch.Tensor
    page_of_block: np.ndarray


def run_layers(layers: Sequence[Any], hidden: torch.Tensor, batch: StepBatch, kvs: Sequence[LayerKV]) -> torch.Tensor:
    """One layer after the other, or all in one call where they can be (`runtime.model.lean.LeanLayer.run_together`)."""
    if layers and (together := getattr(layers[0], "run_together", None)) is not None:
        return together(layers, hidden, batch, kvs)
    for layer, kv in zip(layers, kvs, strict=True):
        hidden = layer(hidden, batch, kv)
    return hidden

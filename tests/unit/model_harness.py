"""Runs built units over real KV pages, and the same tokens through `transformers`, for tests of the model rooms."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime.batch import LayerKV, StepBatch
from runtime.model.spec import ModelSpec

BLOCK_SIZE = 8


def reference_logits(folder: Path, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits ``[R, T, vocab]`` of the whole model, by `transformers`' eager attention."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits.float()


def assert_equal_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to float32 rounding at the scale of the logits; the greedy choice equal unless it is a tie."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=1e-5 * scale, rtol=0)
    best, second = expected.topk(2, -1).values.unbind(-1)
    clear = best - second > 1e-4
    assert clear.float().mean() > 0.99
    assert torch.equal(found.argmax(-1)[clear], expected.argmax(-1)[clear])


@dataclass
class Chain:
    """All units of a model, run one after the other as the workers of a pipeline would."""

    spec: ModelSpec
    embedding: Any
    layers: dict[int, Any]
    lm_head: Any

    def run(self, tokens: torch.Tensor, chunks: Sequence[int]) -> torch.Tensor:
        """Logits ``[R, T, vocab]`` of `tokens` ``[R, T]``, fed in steps of so many tokens a row, all rows in each step."""
        num_rows, length = tokens.shape
        assert sum(chunks) == length
        kvs = self._pages(num_rows, length)
        done, parts = 0, []
        for chunk in chunks:
            batch = self._batch(num_rows, length, done, chunk)
            hidden = self.embedding(tokens[:, done : done + chunk].reshape(-1))
            for index, layer in sorted(self.layers.items()):
                hidden = layer(hidden, batch, kvs[index])
            parts.append(self.lm_head(hidden).view(num_rows, chunk, -1))
            done += chunk
        return torch.cat(parts, dim=1)

    def _pages(self, num_rows: int, length: int) -> dict[int, LayerKV]:
        """Pages in a scrambled order, so that a mix-up of blocks, layers and pages shows."""
        num_blocks = num_rows * -(-length // BLOCK_SIZE)
        num_pages = num_blocks * len(self.layers)
        shape = (num_pages, 2, BLOCK_SIZE, self.spec.num_kv_heads, self.spec.head_dim)
        data = torch.zeros(shape, dtype=getattr(torch, self.spec.dtype))
        order = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
        return {
            layer: LayerKV(layer, data, np.ascontiguousarray(order[place * num_blocks : (place + 1) * num_blocks]))
            for place, layer in enumerate(sorted(self.layers))
        }

    def _batch(self, num_rows: int, length: int, done: int, chunk: int) -> StepBatch:
        per_row = -(-length // BLOCK_SIZE)
        return StepBatch(
            positions=torch.arange(done, done + chunk).repeat(num_rows),
            query_starts=np.arange(num_rows + 1, dtype=np.int32) * np.int32(chunk),
            context_lens=np.full(num_rows, done + chunk, dtype=np.int32),
            block_tables=np.arange(num_rows * per_row, dtype=np.int32).reshape(num_rows, per_row)[:, ::-1].copy(),
        )

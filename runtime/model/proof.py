"""Shows on a tiny model that an architecture can be served unit by unit, before anybody relies on it.

`prove` shrinks the config at hand, keeping everything that changes the architecture (layer types, biases, caps,
multipliers, experts), saves a random model of it with `transformers`, loads it back unit by unit through the very code
that serves, and compares logits over two rows, fed in chunks and single tokens, with the model's own forward. It
covers names in the checkpoint, rotary tables, masks, and what happens between the layers. It takes about a second, and
is only run for architectures that the tests do not cover.
"""

import copy
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from runtime.batch import LayerKV, StepBatch
from runtime.kernels import has_kernels
from runtime.model.checkpoint import ModelError, SafetensorsWeights
from runtime.model.generic import GenericModel, build_skeleton
from runtime.model.rules import rope_parameters

_CHUNKS = (13, 1, 10, 1)
_NUM_ROWS = 2
_BLOCK_SIZE = 8
_VOCAB = 96
_MAX_LAYERS = 8
_WINDOW = 8
_TOLERANCE = 1e-4
_SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "vocab_size": _VOCAB,
}


def prove(config: Any) -> None:
    """Compare a tiny model of the same kind, unit by unit, with `transformers`.

    Raises:
        ModelError: the logits differ, or the architecture cannot be built or run this way at all.
    """
    name = (config.architectures or [config.model_type])[0]
    build_skeleton(config, torch.float32)  # first, because it refuses by name what is not shaped like a chain
    try:
        difference = _difference(_shrink(config))
    except Exception as error:  # anything at all that a foreign architecture may raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(
            f"{name} cannot be served: a tiny model of it does not run layer by layer ({reason})"
        ) from error
    if not difference <= _TOLERANCE:  # also when it is not a number
        raise ModelError(
            f"{name} cannot be served: run layer by layer, a tiny model of it differs from transformers by"
            f" {difference:.1e} of the logits' scale (limit {_TOLERANCE:.0e})"
        )


def _shrink(config: Any) -> Any:
    """A tiny config of the same architecture: fewer and smaller layers, everything else as it is."""
    fields = copy.deepcopy(config.to_dict())
    num_layers = fields["num_hidden_layers"]
    kept = min(num_layers, _MAX_LAYERS)
    for field, value in fields.items():
        if isinstance(value, list) and len(value) == num_layers:
            fields[field] = value[:kept]
        elif field.endswith("token_id") and value is not None:
            fields[field] = 0
    full_heads = fields.get("num_key_value_heads") == fields["num_attention_heads"]
    for field, size in _SIZES.items():
        if isinstance(fields.get(field), int) and not isinstance(fields[field], bool):
            fields[field] = size
    if fields.get("num_key_value_heads"):
        fields["num_key_value_heads"] = 4 if full_heads else 2
    if fields.get("num_experts_per_tok"):
        fields["num_experts_per_tok"] = min(2, fields["num_experts_per_tok"])
    if fields.get("sliding_window"):
        fields["sliding_window"] = _WINDOW
    for parameters in rope_parameters(SimpleNamespace(**fields)):
        num_frequencies = int(_SIZES["head_dim"] * parameters.get("partial_rotary_factor", 1.0)) // 2
        for name in ("short_factor", "long_factor"):
            if name in parameters:
                parameters[name] = parameters[name][:num_frequencies]
    fields["num_hidden_layers"] = kept
    fields["dtype"] = "float32"
    fields.pop("architectures", None)
    return type(config)(**fields)


def _difference(config: Any) -> float:
    """The largest difference of any logit, as a share of the largest logit."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory(prefix="midflight-proof-") as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            for parameter in model.parameters():  # wide, and no bias zero or norm one: what is ignored must show
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.eval().save_pretrained(folder)
        weights = SafetensorsWeights(
            Path(folder), num_layers=config.num_hidden_layers, tied_embeddings=bool(config.tie_word_embeddings)
        )
        tokens = torch.randint(1, _VOCAB, (_NUM_ROWS, sum(_CHUNKS)))
        with torch.inference_mode():
            expected = model(tokens, use_cache=False).logits.float()
        forms = (False, True) if has_kernels("cpu", torch.float32) else (False,)  # weights are packed in some workers
        models = [GenericModel(config, dtype=torch.float32, device="cpu", packs=packs) for packs in forms]
        found = torch.stack([_run(model, weights, tokens) for model in models])
    return float((found - expected).abs().max() / expected.abs().max())


def _run(model: GenericModel, weights: SafetensorsWeights, tokens: torch.Tensor) -> torch.Tensor:
    config = model.config
    num_rows, length = tokens.shape
    per_row = -(-length // _BLOCK_SIZE)
    num_blocks = num_rows * per_row
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pages = torch.zeros(num_blocks * config.num_hidden_layers, 2, _BLOCK_SIZE, heads, head_dim)
    order = np.arange(len(pages), dtype=np.int32).reshape(config.num_hidden_layers, num_blocks)
    embedding, lm_head = model.embedding(weights), model.lm_head(weights)
    layers = [model.layer(index, weights) for index in range(config.num_hidden_layers)]
    done, parts = 0, []
    for chunk in _CHUNKS:
        batch = StepBatch(
            positions=torch.arange(done, done + chunk).repeat(num_rows),
            query_starts=np.arange(num_rows + 1, dtype=np.int32) * np.int32(chunk),
            context_lens=np.full(num_rows, done + chunk, dtype=np.int32),
            block_tables=np.arange(num_blocks, dtype=np.int32).reshape(num_rows, per_row),
        )
        hidden = embedding(tokens[:, done : done + chunk].reshape(-1))
        for index, layer in enumerate(layers):
            hidden = layer(hidden, batch, LayerKV(index, pages, order[index]))
        parts.append(lm_head(hidden).view(num_rows, chunk, -1))
        done += chunk
    return torch.cat(parts, dim=1)

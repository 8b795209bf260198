"""Models as shapes: a `ModelSpec` from a ``config.json`` alone, by arithmetic, without building anything. Pure.

Shapes of some models are shipped (`models/*.json`: the hyperparameters of the published configs). Only the Llama-like
family is counted here, dense or with experts in every layer; the head's own way (`runtime.model.config.inspect_model`) reads
any model it serves, but needs its weights or a skeleton. Both agree where both work.

Never true: a shape is a model that could be served; it has no weights.
"""

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from runtime.model.spec import ModelSpec

_FAMILY = ("llama", "mistral", "qwen3", "qwen3_moe")
_QK_NORM = ("qwen3", "qwen3_moe")
_SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "max_position_embeddings")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def known_shapes() -> list[str]:
    """The names of the shapes that are shipped."""
    return sorted(entry.name.removesuffix(".json") for entry in _shipped().iterdir() if entry.name.endswith(".json"))


def load_shape(name: str) -> ModelSpec:
    """A shipped shape by its name, or that of a folder or file with a ``config.json``.

    Raises:
        ValueError: there is no such shape, or it is not of a family that is counted here.
    """
    if name.lower() in known_shapes():
        return spec_of_config(json.loads(_shipped().joinpath(f"{name.lower()}.json").read_text()), name.lower())
    path = Path(name).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"no model shape {name!r}; shipped are {', '.join(known_shapes())}, or give a folder with a config"
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    return spec_of_config(config, path.resolve().parent.name)


def spec_of_config(config: Mapping[str, Any], name: str) -> ModelSpec:
    """The spec of a model with these hyperparameters.

    Raises:
        ValueError: when a field is missing, or the family is not counted here.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"{name}: a config is an object of JSON")
    kind = config.get("model_type")
    if kind not in _FAMILY or config.get("attention_bias") or config.get("mlp_only_layers"):
        raise ValueError(f"{name}: the shape of a {kind!r} model cannot be counted; possible are {', '.join(_FAMILY)}")
    try:
        return _count(config, name, str(kind))
    except KeyError as error:
        raise ValueError(f"{name}: the config has no {error.args[0]}") from error


def _count(config: Mapping[str, Any], name: str, kind: str) -> ModelSpec:
    for field in _SIZES:
        if not isinstance(size := config[field], int) or size < 1:
            raise ValueError(f"{name}: {field} is {size!r}, which is no number from 1 up")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    layers, vocab = config["num_hidden_layers"], config["vocab_size"]
    experts, chosen = config.get("num_experts") or 0, config.get("num_experts_per_tok") or 0
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    size = _BYTES.get(dtype, 2)
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    mlp = 3 * hidden * config["moe_intermediate_size" if experts else "intermediate_size"]
    router = experts * hidden
    norms = 2 * hidden + (2 * head_dim if kind in _QK_NORM else 0)
    met = attention + router + mlp * (chosen if experts else 1)
    held = attention + router + mlp * max(experts, 1) + norms
    eos = config.get("eos_token_id")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return ModelSpec(
        name=name,
        folder=name,
        architecture=(config.get("architectures") or [kind])[0],
        dtype=dtype if dtype in _BYTES else "bfloat16",
        load_format="dummy",
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        max_context=config["max_position_embeddings"],
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        layer_bytes=(size * held,) * layers,
        embedding_bytes=size * vocab * hidden,
        lm_head_bytes=size * (vocab * hidden + hidden),
        layer_flops_per_token=(2 * met,) * layers,
        lm_head_flops_per_token=2 * vocab * hidden,
        eos_token_ids=tuple(eos if isinstance(eos, list) else [] if eos is None else [eos]),
        sliding_window=window,
        num_experts=experts,
        experts_per_token=chosen if experts else 0,
        layer_expert_bytes=(size * mlp * experts,) * layers,
    )


def _shipped() -> Any:
    return resources.files("scheduler.simulation") / "models"

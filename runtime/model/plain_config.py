"""A config read without `transformers`, for the commonest models in their commonest form.

Importing a config class of `transformers` costs about two seconds of processor time, in the head and in every worker,
before a byte of the model is read. For Llama, Mistral, Qwen2 and Qwen3 with plain rotary embeddings everything that the
lean implementation needs stands in ``config.json`` literally. `read_plain` takes it from there, and answers None
whenever anything is left to a default or has an unusual form; then `transformers` reads it. So what it returns is never
a guess, and the tests compare it with what `transformers` makes of the same file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_REQUIRED: dict[str, type] = {
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "vocab_size": int,
    "max_position_embeddings": int,
    "rms_norm_eps": float,
    "hidden_act": str,
    "tie_word_embeddings": bool,
    "initializer_range": float,
}
_MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


@dataclass(frozen=True)
class PlainConfig:
    """The fields of a `transformers` config that serving needs, under the same names."""

    model_type: str
    architectures: list[str]
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    initializer_range: float
    rope_parameters: dict[str, Any]
    eos_token_id: int | list[int] | None
    dtype: str | None
    mlp_bias: bool = False
    attention_bias: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None


def read_plain(raw: Mapping[str, Any]) -> PlainConfig | None:
    """The config in a ``config.json``, or None when `transformers` should read it."""
    kind = raw.get("model_type")
    rope = _rope_parameters(raw)
    complete = all(type(raw.get(name)) is wanted for name, wanted in _REQUIRED.items())
    if kind not in _MODEL_TYPES or not complete or rope is None or not raw.get("architectures"):
        return None
    # What each model type does with fields that the others do not have.
    if kind.startswith("qwen") and (raw.get("use_sliding_window") is not False or _slides(raw)):
        return None
    if kind == "mistral" and "sliding_window" not in raw:
        return None
    head_dim = raw.get("head_dim")
    if head_dim is None and kind != "qwen3" and raw["hidden_size"] % raw["num_attention_heads"] == 0:
        head_dim = raw["hidden_size"] // raw["num_attention_heads"]
    if type(head_dim) is not int:
        return None
    return PlainConfig(
        model_type=kind,
        architectures=list(raw["architectures"]),
        head_dim=head_dim,
        rope_parameters=rope,
        eos_token_id=raw.get("eos_token_id"),
        dtype=raw.get("dtype") or raw.get("torch_dtype"),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        attention_bias=bool(raw.get("attention_bias", False)),
        sliding_window=raw["sliding_window"] if kind == "mistral" else None,
        layer_types=["full_attention"] * raw["num_hidden_layers"] if kind.startswith("qwen") else None,
        **{name: raw[name] for name in _REQUIRED},
    )


def _rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """The unscaled rotary parameters of a file of either age, or None for any others."""
    given = raw.get("rope_parameters")
    if given is None and raw.get("rope_scaling") is None and isinstance(raw.get("rope_theta"), int | float):
        given = {"rope_type": "default", "rope_theta": raw["rope_theta"]}
    if not isinstance(given, dict) or given.keys() != {"rope_type", "rope_theta"} or given["rope_type"] != "default":
        return None
    return (
        {"rope_type": "default", "rope_theta": float(given["rope_theta"])}
        if "partial_rotary_factor" not in raw
        else None
    )


def _slides(raw: Mapping[str, Any]) -> bool:
    return any(kind != "full_attention" for kind in raw.get("layer_types") or ())

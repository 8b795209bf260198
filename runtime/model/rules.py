"""Which attention and rotary forms a worker can compute, told from the config alone, before any model code is loaded."""

from typing import Any

from runtime.model.checkpoint import ModelError

LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn", "dynamic", "longrope"})


def refuse_unservable(config: Any) -> None:
    """Raises `ModelError` for layers and rotary tables that no worker can compute."""
    if unknown := set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES:
        raise ModelError(
            f"{config.model_type} cannot be served: it has layers of type {min(unknown)}; known are"
            f" {' and '.join(sorted(LAYER_TYPES))}"
        )
    for parameters in rope_parameters(config):
        kind = parameters.get("rope_type", "default")
        if kind not in ROPE_TYPES:
            raise ModelError(
                f"{config.model_type} cannot be served with rope scaling {kind!r}; known are {', '.join(sorted(ROPE_TYPES))}"
            )


def trained_context(config: Any) -> int | None:
    """The longest sequence, in tokens, for which a token's rotary angle depends on its position alone; None: no limit.

    yarn counts its factor from the length before scaling. "dynamic" and "longrope" change their tables once some
    sequence of the batch grows past the original length, so a key would depend on who else is being served; up to that
    length they are exact.
    """
    limit = getattr(config, "max_position_embeddings", None)
    for parameters in rope_parameters(config):
        original = parameters.get("original_max_position_embeddings") or limit
        if limit is None or original is None:
            continue
        if parameters.get("rope_type") == "yarn":
            limit = max(limit, int(original * parameters.get("factor", 1.0)))
        elif parameters.get("rope_type") == "longrope":
            limit = min(limit, original)
    return limit


def rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The rotary parameters of a config: one set, or one per layer type."""
    found = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in found or "rope_theta" in found:
        return [found]
    return [entry for entry in found.values() if isinstance(entry, dict)]

"""Any decoder-only architecture that `transformers` defines with its attention interface, unit by unit.

The whole model is built on the meta device, where it costs no memory. A unit takes its modules out of that skeleton
and gives them real tensors; the other layers never exist. Attention inside a layer goes through `transformers`' own
registry: the function registered here hands q, k and v to the paged attention, so the layer's code is the
architecture's own, unchanged, and so are its numbers. On the CPU the weights of linear layers are packed for our own
kernels (`runtime.model.packed_linear`).

What `transformers` does between the layers (embedding, final norm, LM head, scaling and capping of logits) is done
here by hand, for the few forms there are. An architecture outside the tested list must therefore pass
`runtime.model.proof` first. Positions that do not come from a rotary table, state other than K and V, and rotary
tables that depend on the batch (dynamic, longrope) cannot be served at all and are refused by name.
"""

import copy
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from runtime.attention import attend
from runtime.batch import LayerKV, StepBatch
from runtime.model import packed_linear
from runtime.model.checkpoint import ModelError, Unit, Weights
from runtime.model.rules import refuse_unservable
from runtime.pages import empty, together

Parts: TypeAlias = Mapping[str, torch.Tensor]
Rest: TypeAlias = Callable[[], None]
ATTENTION_NAME = "midflight_paged"

_STEP = "midflight_step"
_HARMLESS = frozenset(
    {"dropout", "is_causal", "use_cache", "position_ids", "output_attentions", "output_hidden_states"}
)
_EXPERT = re.compile(r"^(?P<experts>.*\bexperts)\.(?P<index>\d+)\.(?P<part>\w+)\.weight$")
_EXPERT_PARTS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


class GenericModel:
    """The skeleton of one architecture. Units are made one at a time and hold only their own tensors.

    `config` is the `transformers` config; `dtype` and `device` those of the units; `packs` says whether weights are packed, for kernels that
    must know the dtype on this device.

    Raises:
        ModelError: the architecture cannot be served through the attention interface.
    """

    def __init__(self, config: Any, *, dtype: torch.dtype, device: str, packs: bool = False) -> None:
        self.device = torch.device(device)
        self.packs = packs
        self.dtype = dtype
        self.skeleton = build_skeleton(config, dtype)
        self.config = self.skeleton.config
        self.base = self.skeleton.base_model
        self._rotary = _Rotary(self.base, self.config, self.device, dtype)

    def layer(
        self, index: int, weights: Weights, parts: Parts | None = None, rest: Rest = lambda: None
    ) -> "GenericLayer":
        """With `parts`, those of an equal layer, nothing is read. `rest` is called between pieces of the reading, as in the next two."""
        module = self._materialise(self._fresh(self.base.layers[index]), weights, index, parts, rest)
        return GenericLayer(module, self._rotary, _layer_type(self.config, index))

    def embedding(self, weights: Weights, parts: Parts | None = None, rest: Rest = lambda: None) -> "GenericEmbedding":
        """Tensors in `parts` (``weight``: ``[vocab, hidden]``) are taken from there, and not read."""
        module = self._materialise(self._fresh(self.base.embed_tokens), weights, "embedding", parts, rest)
        return GenericEmbedding(module, float(getattr(self.config, "embedding_multiplier", 1.0)))

    def lm_head(self, weights: Weights, parts: Parts | None = None, rest: Rest = lambda: None) -> "GenericHead":
        """Tensors in `parts` (``lm_head.weight``: ``[vocab, hidden]``) are taken from there, and not read."""
        holder = nn.Module()
        name = norm_name(self.base)
        holder.add_module(name, self._fresh(getattr(self.base, name)))
        holder.add_module("lm_head", self._fresh(self.skeleton.lm_head))
        return GenericHead(self._materialise(holder, weights, "lm_head", parts, rest), name, self.config)

    def _fresh(self, module: nn.Module) -> nn.Module:
        """A copy on the meta device, tied to nothing, so that the skeleton never holds a real tensor."""
        return copy.deepcopy(module, {id(self.config): self.config})

    def _materialise(
        self, module: nn.Module, weights: Weights, unit: Unit, given: Parts | None, rest: Rest
    ) -> nn.Module:
        state = {name: tensor.to(self.device) for name, tensor in (given or {}).items()}
        wanted = {name: tensor for name, tensor in module.state_dict().items() if name not in state}
        if wanted:
            state.update(self._collect(wanted, weights, unit, tuple(state), rest))
        if self.packs:
            _pack(module, state, rest)
        module.load_state_dict(state, strict=True, assign=True)
        if self.packs:
            packed_linear.bind(module)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        self._fill_buffers(module)
        return module.eval()

    def _collect(
        self, wanted: Parts, weights: Weights, unit: Unit, without: tuple[str, ...], rest: Rest
    ) -> dict[str, torch.Tensor]:
        """The tensors that a unit's modules want, from those that the checkpoint has under the names it uses."""
        state: dict[str, torch.Tensor] = {}
        missing = set(wanted)
        fused: dict[str, set[tuple[int, str]]] = {}
        for name, stored in weights.stored(unit, self.dtype, rest).items():
            if name in without:
                continue
            tensor = stored.whole()
            if name not in wanted:
                name = name.replace("block_sparse_moe.", "mlp.")
            if name in wanted:
                state[name] = tensor.to(self.device)
                missing.discard(name)
            else:
                self._fuse_expert(name, tensor, wanted, state, fused)
        for name, seen in fused.items():
            num_parts = wanted[name].shape[0] * (2 if name.endswith("gate_up_proj") else 1)
            if len(seen) == num_parts:
                missing.discard(name)
        place = f"layer {unit}" if isinstance(unit, int) else f"the {unit.replace('_', ' ')}"
        if missing:
            raise ModelError(
                f"the weights of {place} lack {', '.join(sorted(missing)[:3])} ({len(missing)} in all), which"
                f" {type(self.skeleton).__name__} needs; the checkpoint does not fit its config"
            )
        for name, tensor in state.items():
            if tensor.shape != wanted[name].shape:
                raise ModelError(
                    f"{name} of {place} has shape {list(tensor.shape)}, the config asks for {list(wanted[name].shape)}"
                )
        return state

    def _fuse_expert(
        self,
        name: str,
        tensor: torch.Tensor,
        wanted: Mapping[str, torch.Tensor],
        state: dict[str, torch.Tensor],
        fused: dict[str, set[tuple[int, str]]],
    ) -> None:
        """Copy one expert's matrix into the tensor that holds all experts; checkpoints keep them apart."""
        match = _EXPERT.match(name)
        part = _EXPERT_PARTS.get(match["part"]) if match else None
        if match is None or part is None:
            return
        target = f"{match['experts']}.{'down_proj' if part == 'down' else 'gate_up_proj'}"
        index = int(match["index"])
        if target not in wanted or index >= wanted[target].shape[0]:
            return
        if target not in state:
            state[target] = self._empty(tuple(wanted[target].shape))
        slot = state[target][index]
        if part != "down":
            half = slot.shape[0] // 2
            slot = slot[:half] if part == "gate" else slot[half:]
        if slot.shape != tensor.shape:
            raise ModelError(f"{name} has shape {list(tensor.shape)}, the config asks for {list(slot.shape)}")
        slot.copy_(tensor)
        fused.setdefault(target, set()).add((index, part))

    def _empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        if torch.device(self.device).type == "cpu":
            return empty(shape, self.dtype)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _fill_buffers(self, module: nn.Module) -> None:
        """Give values to what is no weight but computed from the config, by the architecture's own code."""
        for child in module.modules():
            hollow = [name for name, buffer in child.named_buffers(recurse=False) if buffer.is_meta]
            for name in hollow:
                child._buffers[name] = torch.empty_like(child._buffers[name], device="cpu")  # type: ignore[arg-type]
            if hollow:
                self.skeleton._init_weights(child)
                for name in hollow:
                    child._buffers[name] = child._buffers[name].to(self.device)  # type: ignore[union-attr]


def _pack(module: nn.Module, state: dict[str, torch.Tensor], rest: Rest) -> None:
    """Have `module` ready for packed weights, and pack those of `state`, of which each is dropped when it is. What is flat was packed by somebody
    else."""
    linears = packed_linear.packable(module)
    for name in (f"{name}.weight" for name in linears):
        if state[name].ndim == 2:
            state[name] = packed_linear.pack_flat(state[name], rest)
    packed_linear.replace(module, linears)
    state.update(together(state, rest))


class GenericLayer:
    """One decoder layer of `transformers`. Call: hidden ``[T, hidden]`` to ``[T, hidden]``; K and V go to `kv`."""

    captures = True
    """A graph of a decode step may be tried: all inputs are the step's tensors."""
    is_foreign = True
    """What the architecture does with them is not known here, and is looked at before (`runtime.cuda.guard`)."""

    def __init__(self, module: nn.Module, rotary: "_Rotary", layer_type: str) -> None:
        self.module = module
        self._rotary = rotary
        self._layer_type = layer_type
        self.parts = module.state_dict()
        self.nbytes = num_bytes(module)

    def __call__(self, hidden: torch.Tensor, batch: StepBatch, kv: LayerKV) -> torch.Tensor:
        position_ids = batch.positions[None]
        out = self.module(
            hidden[None],
            attention_mask=None,
            position_ids=position_ids,
            past_key_values=None,
            use_cache=False,
            position_embeddings=self._rotary(batch, self._layer_type),
            **{_STEP: (batch, kv)},
        )
        return (out[0] if isinstance(out, tuple) else out)[0]


class GenericEmbedding:
    """Call: tokens int64 ``[T]`` to hidden ``[T, hidden]``."""

    def __init__(self, module: nn.Module, multiplier: float) -> None:
        self.module = module
        self._multiplier = multiplier
        self.parts = module.state_dict()
        self.nbytes = num_bytes(module)

    @property
    def weight(self) -> torch.Tensor:
        return self.module.weight  # type: ignore[return-value]

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.module(tokens)
        return hidden if self._multiplier == 1.0 else hidden * self._multiplier


class GenericHead:
    """Final norm and LM head. Call: hidden ``[N, hidden]`` to float32 logits ``[N, vocab]``.

    `nbytes` counts the LM weight also where it is shared with the embedding.
    """

    def __init__(self, module: nn.Module, norm: str, config: Any) -> None:
        self._norm = getattr(module, norm)
        self._lm_head = module.lm_head
        self._divisor = float(getattr(config, "logits_scaling", None) or 1.0)
        self._factor = float(getattr(config, "logit_scale", None) or 1.0)
        self._cap = getattr(config, "final_logit_softcapping", None)
        self.parts = module.state_dict()
        self.nbytes = num_bytes(module)

    @property
    def weight(self) -> torch.Tensor | None:
        """``[vocab, hidden]``, for an embedding that is tied to it; None where it is packed."""
        return None if isinstance(self._lm_head, packed_linear.PackedLinear) else self._lm_head.weight  # type: ignore[return-value]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._lm_head(self._norm(hidden))  # type: ignore[operator]
        if self._divisor != 1.0:
            logits = logits / self._divisor
        if self._factor != 1.0:
            logits = logits * self._factor
        if self._cap is not None:
            logits = torch.tanh(logits / self._cap) * self._cap
        return logits.float()


class _Rotary:
    """Rotary tables of a step, computed once per layer type and kept in the step's memo."""

    def __init__(self, base: Any, config: Any, device: torch.device, dtype: torch.dtype) -> None:
        with torch.device("cpu"):
            self._module = type(base.rotary_emb)(config=config).to(device)
        self._typed = "layer_type" in inspect.signature(type(base.rotary_emb).forward).parameters
        self._like = torch.empty(0, dtype=dtype, device=device)

    def __call__(self, batch: StepBatch, layer_type: str) -> Any:
        key = ("generic_rotary", id(self), layer_type if self._typed else None)
        if key not in batch.memo:
            typed = {"layer_type": layer_type} if self._typed else {}
            batch.memo[key] = self._module(self._like, batch.positions[None], **typed)
        return batch.memo[key]


def build_skeleton(config: Any, dtype: torch.dtype) -> Any:
    """The causal language model of `config` on the meta device, its attention bound to the paged one.

    Raises:
        ModelError: `transformers` has no such model, or it is not built the way a unit needs.
    """
    from transformers import AutoModelForCausalLM

    _register()
    refuse_unservable(config)
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME)
    except Exception as error:  # anything that a foreign architecture may raise on a config it was not made for
        raise ModelError(
            f"transformers cannot build a {config.model_type} model from this config: {error!r}"
        ) from error
    base = skeleton.base_model
    parts = [hasattr(base, part) for part in ("embed_tokens", "layers", "rotary_emb")]
    if not all(parts) or not hasattr(skeleton, "lm_head") or norm_name(base) is None:
        raise ModelError(
            f"{type(skeleton).__name__} cannot be served: it is not a chain of embed_tokens, layers with rotary"
            " positions, a final norm and an lm_head"
        )
    if not type(skeleton)._supports_attention_backend:
        raise ModelError(
            f"{type(skeleton).__name__} cannot be served: it does not use transformers' attention interface"
        )
    return skeleton


def unit_shapes(skeleton: Any) -> dict[Unit, dict[str, tuple[int, ...]]]:
    """Every tensor of every unit by its relative name, as the modules want them."""
    base = skeleton.base_model
    name = norm_name(base)
    head = {**_shapes(getattr(base, name), f"{name}."), **_shapes(skeleton.lm_head, "lm_head.")}
    units: dict[Unit, dict[str, tuple[int, ...]]] = {"embedding": _shapes(base.embed_tokens, ""), "lm_head": head}
    units.update({index: _shapes(layer, "") for index, layer in enumerate(base.layers)})
    return units


def norm_name(base: Any) -> Any:
    """What the architecture calls its final norm, or None."""
    return next((name for name in ("norm", "final_layernorm") if hasattr(base, name)), None)


def num_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _shapes(module: nn.Module, prefix: str) -> dict[str, tuple[int, ...]]:
    return {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _layer_type(config: Any, index: int) -> str:
    kinds = getattr(config, "layer_types", None)
    return kinds[index] if kinds else "full_attention"


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _paged_attention)


def _paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What a layer calls: q, k, v ``[1, heads, T, head_dim]`` in, ``[1, T, heads, head_dim]`` out."""
    batch, kv = others.pop(_STEP)
    if strange := [name for name, given in others.items() if given is not None and name not in _HARMLESS]:
        raise ModelError(
            f"{type(module).__name__} passes {strange[0]} to its attention, which paged attention cannot honour"
        )
    _check_shapes(module, query, key, value, kv)
    out = attend(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        batch,
        kv,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    return out[None], None


def _check_shapes(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kv: LayerKV) -> None:
    """The kernels trust their shapes, and a foreign architecture may have heads of its own per layer, or for V."""
    heads, head_dim = kv.data.shape[3:]
    fits = key.shape == value.shape and key.shape[1] == heads and key.shape[3] == query.shape[3] == head_dim
    if not fits or query.shape[1] % heads or query.shape[2] != key.shape[2] or len(query) != 1:
        raise ModelError(
            f"{type(module).__name__} attends with q {list(query.shape)}, k {list(key.shape)} and v {list(value.shape)},"
            f" which does not fit KV pages of {heads} heads of {head_dim}"
        )

"""The lean decoder layer of the Llama family: Llama, Qwen2, Qwen3, Mistral and what shares their shape.

How it works: q, k and v are one product, gate and up another. On the CPU the weights are packed for the kernels of
`runtime.kernels` and all layers of a stage are one kernel call; the packed weights are the only copy. On other devices the same layer
is a handful of plain torch operations. Scaled rotary frequencies come from `transformers`; the tables are computed once
per step, in float32, and shared by all layers through the step's memo. A configuration is a `transformers` one or any
object with the same fields.

What is never true: a lean layer is never an approximation. In float32 it differs from `transformers`' own layer only by
the order in which sums are rounded, and a configuration that it does not know exactly is refused by `supports`.
"""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.nn import functional as F

from runtime import attention
from runtime.attention import attend, attention_scratch, pool_storage, step_arrays
from runtime.batch import LayerKV, StepBatch
from runtime.cuda import fused
from runtime.cuda.attention import attend_pages
from runtime.kernels import has_kernels, storage, team
from runtime.kernels.layer import ROW_LENGTH, decoder_layers, layer_row, rms_norm
from runtime.kernels.products import (
    PANEL,
    ROW_BLOCK,
    pack,
    pack_gate_up,
    pack_gate_up_int8,
    pack_int8,
    product_by_blocks,
    product_scratch,
)
from runtime.kernels.quantized import GROUP, quantized_tile_address
from runtime.kernels.tiles import tile_address
from runtime.model.checkpoint import Stored
from runtime.pages import together

Parts: TypeAlias = Mapping[str, torch.Tensor]
"""The tensors of a unit as it holds them, by names of its own."""
State: TypeAlias = Mapping[str, torch.Tensor | Stored]
"""The tensors of a unit under `transformers`' names."""
MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn", "dynamic"})
"""`dynamic` equals `default` up to the trained context, beyond which nothing is served."""

_NOTHING = np.empty(0, np.float32)


def supports(config: Any) -> bool:
    """Whether every layer of this model can be a `LeanLayer`."""
    rope = getattr(config, "rope_parameters", None) or {}
    layer_types = getattr(config, "layer_types", None) or []
    sizes = (
        (config.hidden_size, config.intermediate_size, _head_dim(config)) if config.model_type in MODEL_TYPES else ()
    )
    return (
        config.model_type in MODEL_TYPES
        and config.hidden_act in ("silu", "swish")
        and not getattr(config, "mlp_bias", False)
        and rope.get("rope_type", "default") in ROPE_TYPES
        and rope.get("partial_rotary_factor", 1.0) in (None, 1.0)
        and getattr(config, "quantization_config", None) is None
        and all(kind in ("full_attention", "sliding_attention") for kind in layer_types)
        and all(size % 2 == 0 for size in sizes)
    )


class LeanLayer:
    """One decoder layer: ``layer(hidden [T, hidden_size], batch, kv) -> [T, hidden_size]`` in the serving dtype.

    Args:
        config: a configuration that `supports` accepts.
        state: the layer's tensors under `transformers`' names (``self_attn.q_proj.weight``, ...), on any device, or stored in the
            serving dtype: what is packed is then read in blocks, and there at once only as a block.
        device: where the layer runs.
        dtype: the serving dtype; the tensors are cast to it.
        quantize: "int8" for weights of that kind (norms and biases stay as they are), "" for the serving dtype.
        rest: called between pieces of the packing.

    `parts` are the tensors as the layer holds them, packed where it packs; `from_parts` makes an equal layer of them on
    any machine of the same `form`.

    Raises:
        ValueError: when the configuration is not supported, or no kernel serves `quantize` on this device.
        KeyError: when a tensor is missing.
    """

    def __init__(
        self,
        config: Any,
        layer_index: int,
        state: State,
        device: torch.device | str,
        dtype: torch.dtype,
        quantize: str = "",
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        if not supports(config):
            raise ValueError(
                f"the lean layer does not cover this {config.model_type} model; use --implementation transformers"
            )
        parts = _layer_parts(layer_index, state, torch.device(device), dtype, quantize, rest)
        self._set_up(config, layer_index, parts, device, dtype)

    @classmethod
    def from_parts(
        cls, config: Any, layer_index: int, parts: Parts, device: torch.device | str, dtype: torch.dtype
    ) -> "LeanLayer":
        layer = cls.__new__(cls)
        layer._set_up(config, layer_index, parts, device, dtype)
        return layer

    def _set_up(
        self, config: Any, layer_index: int, parts: Parts, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.layer_index = layer_index
        self.device = torch.device(device)
        self.dtype = dtype
        self.hidden_size = config.hidden_size
        self.intermediate_size = config.intermediate_size
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = _head_dim(config)
        self.scale = self.head_dim**-0.5
        self.sliding_window = _sliding_window(config, layer_index)
        self.eps = config.rms_norm_eps
        self.rotary = Rotary(config, self.device)
        self.prepare = self.rotary.tables
        """Puts into a batch's memo what all layers derive from its positions. It does not hold this layer."""
        self.parts = {name: part.to(self.device) for name, part in parts.items()}
        self._has_kernels = has_kernels(self.device, dtype)
        if self._has_kernels:
            self._row = self._make_kernel_row()
            self._tiles = tile_address(storage(torch.empty(0, dtype=dtype)).dtype)
            self._product_tiles = _tiles_for(self.parts["o"], dtype)

    @property
    def captures(self) -> bool:
        """Whether a step through it may be captured in a graph: everything that it reads is on the device."""
        return not self._has_kernels

    @property
    def nbytes(self) -> int:
        """What the layer holds in memory, padding included."""
        return sum(part.nbytes for part in self.parts.values())

    def __call__(self, hidden: torch.Tensor, batch: StepBatch, kv: LayerKV) -> torch.Tensor:
        return self.run_together((self,), hidden, batch, (kv,))

    def run_together(
        self, layers: Sequence["LeanLayer"], hidden: torch.Tensor, batch: StepBatch, kvs: Sequence[LayerKV]
    ) -> torch.Tensor:
        """`layers`, of which this is the first, one after the other: with kernels, all of them in one call."""
        if self._has_kernels:
            return self._run_kernel(layers, hidden, batch, kvs)
        pending: torch.Tensor | None = None
        for layer, kv in zip(layers, kvs, strict=True):
            hidden, pending = layer._run_torch(hidden, pending, batch, kv)
        return hidden if pending is None else hidden + pending

    def _make_kernel_row(self) -> np.ndarray:
        def floats(name: str) -> np.ndarray:
            part = self.parts.get(name)
            return _NOTHING if part is None else part.float().numpy()

        self._arrays = (
            floats("norm.input"),
            self.parts["qkv"].numpy(),
            floats("bias.qkv"),
            floats("norm.q"),
            floats("norm.k"),
            self.parts["o"].numpy(),
            floats("bias.o"),
            floats("norm.post_attention"),
            self.parts["gate_up"].numpy(),
            self.parts["down"].numpy(),
        )
        return layer_row(*self._arrays, self.sliding_window or 0)

    def _run_kernel(
        self, layers: Sequence["LeanLayer"], hidden: torch.Tensor, batch: StepBatch, kvs: Sequence[LayerKV]
    ) -> torch.Tensor:
        out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        rows = np.empty((len(layers), ROW_LENGTH), np.int64)
        for row, layer, kv in zip(rows, layers, kvs, strict=True):
            row[:] = layer._row
            row[-3:-1] = kv.page_of_block.ctypes.data, kv.page_of_block.size
        without = decoder_layers(
            team.current(),
            self._tiles,
            self._product_tiles,
            storage(hidden.contiguous()),
            storage(out),
            rows,
            self._arrays[1],
            np.float32(self.eps),
            *self.rotary.arrays(batch),
            pool_storage(batch, kvs[0]),
            *step_arrays(batch),
            np.float32(self.scale),
            *self._scratch(batch),
            batch.spent,
        )
        assert without < 0, f"layer {kvs[without].layer} has no page for a block of this step"
        return out

    def _scratch(self, batch: StepBatch) -> tuple:
        key = ("lean.scratch", self.hidden_size, self.intermediate_size, self.num_heads, self.num_kv_heads, self.dtype)
        scratch = batch.memo.get(key)
        if scratch is None:
            tokens = batch.num_tokens
            rows = min(tokens, ROW_BLOCK)

            def make(*shape: int) -> np.ndarray:
                return storage(torch.empty(shape, dtype=self.dtype))

            scratch = batch.memo[key] = (
                make(team.num_threads(), rows, self.hidden_size),
                np.empty((rows, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim), np.float32),
                make(tokens, self.num_heads, self.head_dim),
                make(tokens, self.num_heads, self.head_dim),
                make(rows, self.intermediate_size),
                *product_scratch(rows),
                *attention_scratch(batch, self.num_heads, self.num_kv_heads, self.head_dim, self.dtype),
            )
        return scratch

    def _run_torch(
        self, hidden: torch.Tensor, pending: torch.Tensor | None, batch: StepBatch, kv: LayerKV
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A hidden state and what is still to be added to it, before and after: the sum is made with the norm that comes next."""
        num_tokens, parts = len(hidden), self.parts
        if pending is None:
            x = fused.rms_norm(hidden, parts["norm.input"], self.eps)
        else:
            hidden, x = fused.add_rms_norm(pending, hidden, parts["norm.input"], self.eps)
        qkv = F.linear(x, parts["qkv"], parts.get("bias.qkv")).view(num_tokens, -1, self.head_dim)
        cos, sin = self.rotary.tables(batch)
        norms = (parts["norm.q"], parts["norm.k"]) if "norm.q" in parts else None
        if batch.paged is not None:
            q = fused.rotate_into_pages(qkv, cos, sin, batch.paged, kv, self.num_heads, norms, self.eps)
            attended = attend_pages(q, batch.paged, kv, scale=self.scale, sliding_window=self.sliding_window)
        else:
            q, k, v = fused.rotate_torch(qkv, cos, sin, self.num_heads, norms, self.eps)
            attended = attend(q, k, v, batch, kv, scale=self.scale, sliding_window=self.sliding_window)
        x = F.linear(attended.reshape(num_tokens, -1), parts["o"], parts.get("bias.o"))
        hidden, x = fused.add_rms_norm(x, hidden, parts["norm.post_attention"], self.eps)
        return hidden, F.linear(fused.silu_mul(F.linear(x, parts["gate_up"])), parts["down"])


class LeanEmbedding:
    """Token ids, int64 ``[T]``, to hidden states ``[T, hidden_size]`` in the serving dtype."""

    def __init__(self, weight: torch.Tensor, device: torch.device | str, dtype: torch.dtype) -> None:
        self.weight = weight.detach().to(device, dtype)

    @property
    def parts(self) -> Parts:
        return {"weight": self.weight}

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(token_ids, self.weight)


class LeanHead:
    """The final norm and the LM head: hidden states ``[N, hidden_size]`` to float32 logits ``[N, vocab_size]``.

    Pass only the rows whose logits are wanted. On the CPU the weight is packed: with tied embeddings, a worker that
    holds both ends of the model holds the matrix in both forms. `rest` is called between pieces of the packing.
    """

    def __init__(
        self,
        norm_weight: torch.Tensor,
        weight: torch.Tensor | Stored,
        eps: float,
        device: torch.device | str,
        dtype: torch.dtype,
        quantize: str = "",
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        check_quantize(device, dtype, quantize)
        if not has_kernels(device, dtype):
            packed = _whole(weight, device, dtype)
        elif quantize:
            packed = torch.from_numpy(pack_int8(_whole(weight, device, dtype), rest).data)
        else:
            packed = torch.from_numpy(pack(_rows(weight, dtype), rest=rest).data)
        parts = {"norm": norm_weight.detach().to(device, dtype), "weight": packed}
        self._set_up(parts, weight.shape[0], eps, device, dtype)

    @classmethod
    def from_parts(
        cls, parts: Parts, vocab_size: int, eps: float, device: torch.device | str, dtype: torch.dtype
    ) -> "LeanHead":
        """The head that `parts` came from."""
        head = cls.__new__(cls)
        head._set_up(parts, vocab_size, eps, device, dtype)
        return head

    def _set_up(
        self, parts: Parts, vocab_size: int, eps: float, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.device, self.dtype, self.eps = torch.device(device), dtype, eps
        self.vocab_size = vocab_size
        self.parts = {name: part.to(self.device) for name, part in parts.items()}
        self._has_kernels = has_kernels(self.device, dtype)
        if self._has_kernels:
            self._weight = parts["weight"].numpy()
            self._tiles = _tiles_for(parts["weight"], dtype)
            self._norm_floats = parts["norm"].float().numpy()

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    @property
    def captures(self) -> bool:
        """As that of a layer."""
        return not self._has_kernels

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self._has_kernels:
            return F.linear(fused.rms_norm(hidden, self.parts["norm"], self.eps), self.parts["weight"]).float()
        normed = storage(torch.empty_like(hidden, memory_format=torch.contiguous_format))
        rms_norm(storage(hidden.contiguous()), 0, len(hidden), self._norm_floats, np.float32(self.eps), normed, 0)
        logits = torch.empty(len(hidden), self.vocab_size)
        product_by_blocks(self._tiles, normed, self._weight, _NOTHING, logits.numpy())
        return logits


class Rotary:
    """cos and sin of a step's positions, float32 ``[T, head_dim / 2]``."""

    def __init__(self, config: Any, device: torch.device) -> None:
        inv_freq, self._attention_scaling = _frequencies(config)
        self._inv_freq = inv_freq.float().to(device)
        self._key = ("lean.rotary", inv_freq.float().numpy().tobytes(), self._attention_scaling)

    def tables(self, batch: StepBatch) -> tuple[torch.Tensor, torch.Tensor]:
        tables = batch.memo.get(self._key)
        if tables is None:
            angles = batch.positions[:, None].float() * self._inv_freq
            tables = angles.cos() * self._attention_scaling, angles.sin() * self._attention_scaling
            batch.memo[self._key] = tables
        return tables

    def arrays(self, batch: StepBatch) -> tuple[np.ndarray, np.ndarray]:
        """`tables` as numpy arrays (CPU only)."""
        key = ("lean.rotary.arrays", self._key)
        arrays = batch.memo.get(key)
        if arrays is None:
            cos, sin = self.tables(batch)
            arrays = batch.memo[key] = cos.numpy(), sin.numpy()
        return arrays


def warm_up(device: torch.device | str, dtype: torch.dtype, quantize: str = "") -> None:
    """Compile every CPU kernel for this dtype, or load it from the disk cache; call it while loading.

    Seconds the first time on a machine, a fraction of one after that. The layers themselves may be loaded meanwhile.
    """
    attention.warm_up(device, dtype)
    if not has_kernels(device, dtype):
        return
    config = SimpleNamespace(
        model_type="llama",
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        hidden_act="silu",
        rms_norm_eps=1e-5,
    )
    shapes = {"q": (8, 8), "k": (4, 8), "v": (4, 8), "o": (8, 8)}
    state = {f"self_attn.{x}_proj.weight": torch.zeros(shape) for x, shape in shapes.items()}
    state |= {f"mlp.{x}_proj.weight": torch.zeros(8, 8) for x in ("gate", "up", "down")}
    state |= {f"{_NORM_PATHS[x]}.weight": torch.ones(8) for x in ("input", "post_attention")}
    layer = LeanLayer(config, 0, state, device, dtype, quantize)
    batch, kv = attention.tiny_step(device, dtype, num_kv_heads=1, head_dim=4)
    layer(torch.zeros(batch.num_tokens, 8, dtype=dtype), batch, kv)
    head = LeanHead(torch.ones(8), torch.zeros(8, 8), 1e-5, device, dtype, quantize)
    head(torch.zeros(2, 8, dtype=dtype))


_NORM_PATHS = {
    "input": "input_layernorm",
    "post_attention": "post_attention_layernorm",
    "q": "self_attn.q_norm",
    "k": "self_attn.k_norm",
}


def form(device: torch.device | str, dtype: torch.dtype, quantize: str = "") -> str:
    """What `parts` depend on besides the model: those of one form fit every machine that has the same."""
    if not has_kernels(device, dtype):
        return f"lean {dtype}"
    return f"lean {dtype} panels of {PANEL}" + (f" {quantize} groups of {GROUP}" if quantize else "")


def check_quantize(device: torch.device | str, dtype: torch.dtype, quantize: str) -> None:
    """Whether weights can be held in this form.

    Raises:
        ValueError: for an unknown form, or a device or dtype without kernels for it.
    """
    if quantize not in ("", "int8"):
        raise ValueError(f"--quantize {quantize} is unknown; int8 is what there is")
    if quantize and not has_kernels(device, dtype):
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"--quantize {quantize} needs a CPU whose kernels know {name}, not {device}; leave it out")


def _tiles_for(weight: torch.Tensor, dtype: torch.dtype) -> int:
    """The tiles that multiply x of this dtype with a packed weight."""
    choose = quantized_tile_address if weight.dtype is torch.int8 else tile_address
    return choose(storage(torch.empty(0, dtype=dtype)).dtype)


def _whole(weight: torch.Tensor | Stored, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
    return (weight.detach() if isinstance(weight, torch.Tensor) else weight.whole()).to(device, dtype)


def _rows(weight: torch.Tensor | Stored, dtype: torch.dtype) -> torch.Tensor | Stored:
    """For packing: a tensor in the serving dtype, or one that is stored as it is."""
    if isinstance(weight, torch.Tensor):
        return weight.detach().to("cpu", dtype)
    assert weight.dtype == dtype, f"stored weights are read in {weight.dtype}, and {dtype} is served"
    return weight


def _layer_parts(
    layer_index: int,
    state: State,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str,
    rest: Callable[[], None],
) -> Parts:
    """What a layer holds, out of its tensors under `transformers`' names."""
    check_quantize(device, dtype, quantize)

    def get(name: str) -> torch.Tensor:
        return _whole(state[name], device, dtype)

    def fused(names: tuple[str, ...], kind: str) -> torch.Tensor | None:
        found = [get(f"{name}.{kind}") for name in names if f"{name}.{kind}" in state]
        assert len(found) in (0, len(names)), f"layer {layer_index} has {kind} on some of {names}, not on all"
        return torch.cat(found) if found else None

    qkv = tuple(f"self_attn.{x}_proj" for x in "qkv")
    small = {f"norm.{name}": get(f"{path}.weight") for name, path in _NORM_PATHS.items() if f"{path}.weight" in state}
    biases = {"bias.qkv": fused(qkv, "bias"), "bias.o": fused(("self_attn.o_proj",), "bias")}
    small |= {name: bias for name, bias in biases.items() if bias is not None}
    names = {"qkv": qkv, "o": ("self_attn.o_proj",), "down": ("mlp.down_proj",)}
    gate_up = ("mlp.gate_proj", "mlp.up_proj")
    if not has_kernels(device, dtype):
        names["gate_up"] = gate_up
        return small | {part: torch.cat([get(f"{name}.weight") for name in found]) for part, found in names.items()}
    if quantize:
        packed = {
            part: pack_int8(torch.cat([get(f"{name}.weight") for name in found]), rest) for part, found in names.items()
        }
        gate, up = (get(f"{name}.weight") for name in gate_up)
        packed["gate_up"] = pack_gate_up_int8(gate, up, rest)
    else:
        rows = {name: _rows(state[f"{name}.weight"], dtype) for found in (*names.values(), gate_up) for name in found}
        packed = {part: pack(*(rows[name] for name in found), rest=rest) for part, found in names.items()}
        packed["gate_up"] = pack_gate_up(rows[gate_up[0]], rows[gate_up[1]], rest)
    return together(small | {name: torch.from_numpy(weight.data) for name, weight in packed.items()}, rest)


def _frequencies(config: Any) -> tuple[torch.Tensor, float]:
    """The rotary frequencies, float32 ``[head_dim / 2]``, and what cos and sin are multiplied by."""
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        dim = _head_dim(config)
        return 1.0 / (config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)), 1.0
    # Importing transformers takes seconds, and only scaled frequencies need it.
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS[kind](config)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _sliding_window(config: Any, layer_index: int) -> int | None:
    """The window of this layer, as `transformers`' own layers choose it."""
    if config.model_type == "mistral":
        return config.sliding_window
    layer_types = getattr(config, "layer_types", None)
    if layer_types and layer_types[layer_index] == "sliding_attention":
        return config.sliding_window
    return None

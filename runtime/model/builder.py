"""Builds the units that a worker holds: decoder layers, the embedding, and the final norm with the LM head.

`UnitBuilder` picks one of two implementations of a unit and hides which. The lean one serves the Llama-like family
with fused, prepacked weights; the generic one serves everything else with `transformers`' own modules. Each is
imported only when it is chosen: model code of `transformers` takes seconds to import, the kernels of the lean one too.

Every unit shows the tensors that it holds (`parts`), and an equal unit can be built from them, in another process too,
when the builders have the same `form`.

The builder keeps no unit alive. It remembers, weakly, the two ends, so that tied weights exist once in a process that
holds both.
"""

import hashlib
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import torch

from runtime.batch import LayerKV, StepBatch
from runtime.kernels import has_kernels
from runtime.model.checkpoint import ModelError, Stored, Unit
from runtime.model.config import load_config, load_transformers_config, open_weights
from runtime.model.spec import ModelSpec
from runtime.pages import together

Implementation: TypeAlias = Literal["auto", "lean", "transformers"]


Parts: TypeAlias = Mapping[str, torch.Tensor]
"""The tensors of a unit as it holds them, by names that its implementation chooses."""


class Layer(Protocol):
    """Hidden ``[T, hidden]`` to ``[T, hidden]`` in the serving dtype; writes the step's K and V into `kv`."""

    @property
    def parts(self) -> Parts: ...

    @property
    def nbytes(self) -> int: ...

    def __call__(self, hidden: torch.Tensor, batch: StepBatch, kv: LayerKV, /) -> torch.Tensor: ...


class Embedding(Protocol):
    """Tokens int64 ``[T]`` to hidden ``[T, hidden]``."""

    @property
    def parts(self) -> Parts: ...

    @property
    def nbytes(self) -> int: ...

    def __call__(self, tokens: torch.Tensor, /) -> torch.Tensor: ...


class Head(Protocol):
    """Hidden ``[N, hidden]`` of the last layer to float32 logits ``[N, vocab]``."""

    @property
    def parts(self) -> Parts: ...

    @property
    def nbytes(self) -> int: ...

    def __call__(self, hidden: torch.Tensor, /) -> torch.Tensor: ...


class UnitBuilder:
    """Makes units for one model on one device. Not thread-safe: one builder, one thread.

    `seed` matters for random weights only. `rest` is called between pieces of the work, each of some milliseconds at most.
    The spec says whether weights are quantised; the embedding never is.

    Raises:
        ModelError: the folder changed since it was inspected, "lean" is asked for a model that it does not support, or
            quantised weights where the kernels for them are missing.
    """

    def __init__(self, spec: ModelSpec, *, device: str, implementation: Implementation = "auto", seed: int = 0) -> None:
        self._folder = Path(spec.folder)
        self._config = load_config(self._folder)
        self._device = device
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._weights = open_weights(self._folder, self._config, load_format=spec.load_format, seed=seed)
        self._tied = spec.tied_embeddings
        self._num_layers = spec.num_layers
        self._vocab_size = spec.vocab_size
        self._quantize = spec.quantize
        self.implementation = self._choose(implementation, spec)
        self.packs = self.implementation != "lean" and has_kernels(device, self._dtype)
        """Whether generic units hold packed weights."""
        self.rest: Callable[[], None] = lambda: None
        self._generic: Any = None
        self._embedding: weakref.ref[Any] | None = None
        self._lm_head: weakref.ref[Any] | None = None

    def form(self) -> str:
        """A digest of all that `parts` depend on: the model, the dtype, the implementation and its packing."""
        packing = ""
        if self.implementation == "lean":
            from runtime.model import lean

            packing = lean.form(self._device, self._dtype, self._quantize)
        elif self.packs:
            from runtime.model import packed_linear

            packing = packed_linear.form()
        config = (self._folder / "config.json").read_bytes()
        mark = repr((self._weights.identity(), str(self._dtype), self.implementation, packing)).encode()
        return hashlib.blake2b(config + mark, digest_size=16).hexdigest()

    def has_tied(self, unit: int | str) -> bool:
        """Whether the weight of this end of the model is in this process already, at the other end."""
        other = self._lm_head if unit == "embedding" else self._embedding if unit == "lm_head" else None
        return self._shared(other) is not None

    def layer(self, index: int, parts: Parts | None = None) -> Layer:
        """Layer `index`, out of the checkpoint, or out of the `parts` of an equal one."""
        assert 0 <= index < self._num_layers, f"layer {index} of {self._num_layers}"
        if self.implementation == "lean":
            from runtime.model import lean

            if parts is not None:
                if torch.device(self._device).type == "cpu":
                    parts = together(parts, self.rest)
                return lean.LeanLayer.from_parts(self._config, index, parts, self._device, self._dtype)
            stored = self._stored(index)
            return lean.LeanLayer(self._config, index, stored, self._device, self._dtype, self._quantize, self.rest)
        return self._skeleton().layer(index, self._weights, parts, self.rest)

    def embedding(self, parts: Parts | None = None) -> Embedding:
        """As `layer`; a tied weight that this process holds already is shared."""
        if (shared := self._shared(self._lm_head)) is not None:
            parts = {"weight": shared}
        if self.implementation == "lean":
            from runtime.model import lean

            weight = self._stored("embedding")["weight"].whole() if parts is None else parts["weight"]
            unit = lean.LeanEmbedding(weight, self._device, self._dtype)
        else:
            unit = self._skeleton().embedding(self._weights, parts, self.rest)
        self._embedding = weakref.ref(unit)
        return unit

    def lm_head(self, parts: Parts | None = None) -> Head:
        """As `layer`. Where weights are packed, the head's is a second copy even when it is tied."""
        shared = self._shared(self._embedding) if parts is None else None
        if self.implementation == "lean":
            unit = self._lean_head(shared, parts)
        else:
            given = {"lm_head.weight": shared} if shared is not None else parts
            unit = self._skeleton().lm_head(self._weights, given, self.rest)
        self._lm_head = weakref.ref(unit)
        return unit

    def _lean_head(self, shared: torch.Tensor | None, parts: Parts | None) -> Head:
        from runtime.model import lean

        eps = self._config.rms_norm_eps
        if parts is not None:
            return lean.LeanHead.from_parts(parts, self._vocab_size, eps, self._device, self._dtype)
        stored = self._stored("lm_head")
        weight = stored["lm_head.weight"] if shared is None else shared
        norm = stored["norm.weight"].whole()
        return lean.LeanHead(norm, weight, eps, self._device, self._dtype, self._quantize, self.rest)

    def _choose(self, implementation: Implementation, spec: ModelSpec) -> Literal["lean", "transformers"]:
        if implementation == "transformers" and not spec.quantize:
            return "transformers"
        from runtime.model import lean

        supported = lean.supports(self._config)
        if spec.quantize:
            if implementation == "transformers" or not supported:
                raise ModelError(
                    f"--quantize {spec.quantize} is for the lean layers, and {spec.architecture} is served by "
                    "transformers' own here; leave it out"
                )
            try:
                lean.check_quantize(self._device, self._dtype, spec.quantize)
            except ValueError as error:
                raise ModelError(str(error)) from error
        if implementation == "lean" and not supported:
            raise ModelError(
                f"the lean implementation does not support {spec.architecture} with this config; use auto or transformers"
            )
        return "lean" if supported else "transformers"

    def _skeleton(self) -> Any:
        if self._generic is None:
            from runtime.model.generic import GenericModel

            config = load_transformers_config(self._folder)
            self._generic = GenericModel(config, dtype=self._dtype, device=self._device, packs=self.packs)
        return self._generic

    def _stored(self, unit: Unit) -> dict[str, Stored]:
        return self._weights.stored(unit, self._dtype, self.rest)

    def _shared(self, other: "weakref.ref[Any] | None") -> torch.Tensor | None:
        """The weight of the unit at the other end, when the two are tied and it is alive."""
        unit = other() if other is not None and self._tied else None
        return getattr(unit, "weight", None)

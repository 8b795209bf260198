"""Builds the units that a worker holds: decoder layers, the embedding, and the final norm with the LM head.

`UnitBuilder` picks one of two implementations of a unit and hides which. The lean one serves the Llama-like family
with fused, prepacked weights; the generic one serves everything else with `transformers`' own modules. Each is
imported only when it is chosen: model code of `transformers` takes seconds to import, the kernels of the lean one too.

The builder keeps no unit alive. It remembers, weakly, the two ends, so that tied weights exist once in a process that
holds both.
"""

import weakref
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import torch

from runtime.batch import LayerKV, StepBatch
from runtime.model.checkpoint import ModelError, Unit
from runtime.model.config import load_config, load_transformers_config, open_weights
from runtime.model.spec import ModelSpec

Implementation: TypeAlias = Literal["auto", "lean", "transformers"]


class Layer(Protocol):
    """Hidden ``[T, hidden]`` to ``[T, hidden]`` in the serving dtype; writes the step's K and V into `kv`."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, hidden: torch.Tensor, batch: StepBatch, kv: LayerKV, /) -> torch.Tensor: ...


class Embedding(Protocol):
    """Tokens int64 ``[T]`` to hidden ``[T, hidden]``."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, tokens: torch.Tensor, /) -> torch.Tensor: ...


class Head(Protocol):
    """Hidden ``[N, hidden]`` of the last layer to float32 logits ``[N, vocab]``."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, hidden: torch.Tensor, /) -> torch.Tensor: ...


class UnitBuilder:
    """Makes units for one model on one device. Not thread-safe: one builder, one thread.

    `seed` matters for random weights only.

    Raises:
        ModelError: the folder changed since it was inspected, or "lean" is asked for a model that it does not support.
    """

    def __init__(self, spec: ModelSpec, *, device: str, implementation: Implementation = "auto", seed: int = 0) -> None:
        self._folder = Path(spec.folder)
        self._config = load_config(self._folder)
        self._device = device
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._weights = open_weights(self._folder, self._config, load_format=spec.load_format, seed=seed)
        self._tied = spec.tied_embeddings
        self._num_layers = spec.num_layers
        self.implementation = self._choose(implementation, spec)
        self._generic: Any = None
        self._embedding: weakref.ref[Any] | None = None
        self._lm_head: weakref.ref[Any] | None = None

    def layer(self, index: int) -> Layer:
        assert 0 <= index < self._num_layers, f"layer {index} of {self._num_layers}"
        if self.implementation == "lean":
            from runtime.model import lean

            return lean.LeanLayer(self._config, index, self._state(index), self._device, self._dtype)
        return self._skeleton().layer(index, self._weights)

    def embedding(self) -> Embedding:
        shared = self._shared(self._lm_head)
        if self.implementation == "lean":
            from runtime.model import lean

            weight = self._state("embedding")["weight"] if shared is None else shared
            unit = lean.LeanEmbedding(weight, self._device, self._dtype)
        else:
            unit = self._skeleton().embedding(self._weights, shared)
        self._embedding = weakref.ref(unit)
        return unit

    def lm_head(self) -> Head:
        """On the CPU the lean head packs its weight, so it is a second copy even when it is tied."""
        shared = self._shared(self._embedding)
        if self.implementation == "lean":
            from runtime.model import lean

            state = self._state("lm_head", () if shared is None else ("lm_head.weight",))
            weight = state["lm_head.weight"] if shared is None else shared
            unit = lean.LeanHead(state["norm.weight"], weight, self._config.rms_norm_eps, self._device, self._dtype)
        else:
            unit = self._skeleton().lm_head(self._weights, shared)
        self._lm_head = weakref.ref(unit)
        return unit

    def _choose(self, implementation: Implementation, spec: ModelSpec) -> Literal["lean", "transformers"]:
        if implementation == "transformers":
            return "transformers"
        from runtime.model import lean

        supported = lean.supports(self._config)
        if implementation == "lean" and not supported:
            raise ModelError(
                f"the lean implementation does not support {spec.architecture} with this config; use auto or transformers"
            )
        return "lean" if supported else "transformers"

    def _skeleton(self) -> Any:
        if self._generic is None:
            from runtime.model.generic import GenericModel

            self._generic = GenericModel(load_transformers_config(self._folder), dtype=self._dtype, device=self._device)
        return self._generic

    def _state(self, unit: Unit, without: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
        return dict(self._weights.stream(unit, self._dtype, without))

    def _shared(self, other: "weakref.ref[Any] | None") -> torch.Tensor | None:
        """The weight of the unit at the other end, when the two are tied and it is alive."""
        unit = other() if other is not None and self._tied else None
        return getattr(unit, "weight", None)

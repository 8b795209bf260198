"""Paged attention by what this machine has: a choice of back ends, each tried before it is used.

How it works: for every *shape* of attention (heads, dtype, page size, window, ...) the first candidate is taken that says it
fits and whose answer on a small random step is that of plain torch. So a library that is not there, one that wants pages of
another size, and one that is broken for some shape all end in the next candidate, layer by layer. A worker tries while it
loads, never in a request.

The pool is ``[num_pages, 2, block_size, num_kv_heads, head_dim]``: K and V of a page are neighbours, so K alone is a
strided view, which every candidate here takes as it is.

| back end | from | what it does | graphs |
|---|---|---|---|
| `varlen` | `torch.nn.attention.varlen` with `block_table` (torch 2.12) | FlashAttention over the pages; FlashAttention 2 wants pages of 256 tokens | yes |
| `triton` | `runtime.cuda.decode`, where Triton is | decode only: a kernel of ours over pages of any size, softcap | yes |
| `flashinfer` | the package, if it is there | FlashAttention over the pages, any page size, softcap | no |
| `packed` | `torch.nn.attention.varlen`, older too | gathers the pages of all rows, then FlashAttention | no |
| `triton+` | `runtime.cuda.prompts`, where Triton is | a kernel of ours for any rows: pages of any size, softcap, any dtype | yes |
| `gathered` | `scaled_dot_product_attention` | decode only: gathers the pages of all rows, padded to one length | yes |
| `rows` | `runtime.attention` | one gather and one call per row | no |

What is never true: a back end that was not compared on this very device, for this very shape, attends for a request; a
step compiles anything.
"""

import functools
import importlib.util
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from kvstore.page_pool import PagePool
from runtime.attention import attend_row, attend_torch
from runtime.batch import LayerKV, StepBatch
from runtime.cuda.step import PagedStep, attach, within_rows

log = logging.getLogger("midflight.worker")

TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_WORKSPACE_BYTES = 128 << 20
"""What flashinfer asks for; made when it is first used."""


@dataclass(frozen=True, slots=True)
class Shape:
    """All that a choice depends on. `must_capture`: it will run inside a graph, in steps that are padded (`runtime.cuda.step`)."""

    device: torch.device
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    is_decode: bool = False
    must_capture: bool = False


class Backend(Protocol):
    """One way to attend. `captures`: it may run inside a graph (of decode steps, where `fits` says no more). `reads_all`: then it reads all that
    its tables could name, whatever the rows need."""

    name: str
    captures: bool
    reads_all: bool

    def fits(self, shape: Shape) -> str:
        """Why it is out of the question for this shape; empty when it is not."""
        ...

    def __call__(
        self, q: torch.Tensor, data: torch.Tensor, pages: torch.Tensor, step: PagedStep, shape: Shape, /
    ) -> torch.Tensor:
        """``[T, num_heads, head_dim]`` of q over the pages, which hold this step's K and V already."""
        ...


def attend_paged(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    step: PagedStep,
    kv: LayerKV,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """`runtime.attention.attend` for a step that is there as tensors."""
    step.write(k, v, kv)
    return attend_pages(q, step, kv, scale=scale, sliding_window=sliding_window, softcap=softcap)


def attend_pages(
    q: torch.Tensor,
    step: PagedStep,
    kv: LayerKV,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None = None,
) -> torch.Tensor:
    """As `attend_paged`, after this step's keys and values were written."""
    shape = Shape(
        device=q.device,
        dtype=q.dtype,
        num_heads=q.shape[1],
        num_kv_heads=kv.data.shape[3],
        head_dim=q.shape[2],
        block_size=kv.data.shape[2],
        scale=scale,
        sliding_window=sliding_window,
        softcap=softcap,
        is_decode=step.is_decode,
        must_capture=step.lens is None,
    )
    return choose(shape)(q, kv.data, step.pages(kv.layer), step, shape)


def choose(shape: Shape) -> Backend:
    """The back end for this shape on this machine; tried once, so call it while loading. Thread safe."""
    backend = find(shape)
    if backend is None:
        raise RuntimeError(f"nothing on this machine attends {shape}")
    return backend


@functools.lru_cache(maxsize=256)
def find(shape: Shape) -> Backend | None:
    """As `choose`; None when there is none."""
    for backend in candidates():
        why = backend.fits(shape)
        if shape.must_capture and not backend.captures:
            why = why or "it cannot be captured"
        why = why or check(backend, shape)
        if not why:
            log.info("attention %s: %s", _describe(shape), backend.name)
            return backend
        log.debug("attention %s: not %s: %s", _describe(shape), backend.name, why)
    return None


@functools.lru_cache(maxsize=1)
def candidates() -> tuple[Backend, ...]:
    """All back ends, the best first."""
    return (
        Varlen("varlen", with_key_starts=False),
        Varlen("varlen+", with_key_starts=True),
        TritonDecode(),
        FlashInfer(),
        Packed(),
        TritonRows(),
        Gathered(),
        Rows(),
    )


def check(backend: Backend, shape: Shape) -> str:
    """What is wrong with the backend's answer on a small random step, over two layers; empty when it is right."""
    if isinstance(backend, Rows):
        return ""
    if shape.is_decode:
        rows = [(0, 1), (shape.block_size + 2, 1), (2 * shape.block_size - 1, 1)]
    else:
        rows = [(0, 5), (shape.block_size - 1, 1), (3, shape.block_size + 2), (2 * shape.block_size, 1)]
    try:
        with torch.inference_mode():
            off_by = _error(backend, shape, rows)
    except Exception as error:  # whatever a foreign library raises
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if off_by > TOLERANCES[shape.dtype]:
        return f"it is off by {off_by:.2g}"
    return ""


def _error(backend: Backend, shape: Shape, rows: Sequence[tuple[int, int]]) -> float:
    """The largest deviation from plain torch, in two layers one after the other, whose pages lie differently."""
    batch, pool, data = _random_step(shape, rows)
    attach(batch, pool, (0, 1), shape.device)
    step = batch.paged
    q, k, v = data
    errors: list[float] = []
    for index in (0, 1):
        kv = LayerKV(index, pool.data, pool.page_of(index))
        expected = attend_torch(
            q, k, v, batch, kv, scale=shape.scale, sliding_window=shape.sliding_window, softcap=shape.softcap
        )
        found = backend(q, pool.data, step.pages(index), step, shape)
        errors.append(float((found.float() - expected.float()).abs().max()))
    return max(errors) if np.isfinite(errors).all() else float("inf")


def _random_step(
    shape: Shape, rows: Sequence[tuple[int, int]]
) -> tuple[StepBatch, PagePool, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """A step of (positions before, new tokens) rows over scattered pages of two layers, all positions before it filled."""
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(shape.device, shape.dtype)

    contexts = np.array([before + new for before, new in rows], np.int32)
    widths = -(-contexts // shape.block_size)
    total = int(widths.sum())
    pool = PagePool(2 * total + 3, shape.block_size, shape.num_kv_heads, shape.head_dim, shape.dtype, shape.device)
    pool.data.copy_(random(*pool.data.shape))
    pool.hold((0, 1))
    tables = np.zeros((len(rows), int(widths.max())), np.int32)
    blocks = np.random.default_rng(0).permutation(total)
    taken = 0
    for row, width in enumerate(widths):
        tables[row, :width] = blocks[taken : taken + width]
        taken += int(width)
    for layer in (1, 0):
        pool.ensure(np.random.default_rng(layer).permutation(total), (layer,))
    filled = random(*pool.data.shape)
    pages = torch.from_numpy(pool.pages_of((0, 1), np.arange(total)).astype(np.int64).ravel()).to(shape.device)
    pool.data[pages] = filled[pages]
    counts = [new for _, new in rows]
    batch = StepBatch(
        positions=torch.cat([torch.arange(before, before + new) for before, new in rows]),
        query_starts=np.cumsum([0, *counts]).astype(np.int32),
        context_lens=contexts,
        block_tables=tables,
    )
    num_tokens = sum(counts)
    q = random(num_tokens, shape.num_heads, shape.head_dim)
    k, v = (random(num_tokens, shape.num_kv_heads, shape.head_dim) for _ in range(2))
    return batch, pool, (q, k, v)


def _describe(shape: Shape) -> str:
    extras = f" window {shape.sliding_window}" if shape.sliding_window else ""
    extras += f" softcap {shape.softcap:g}" if shape.softcap else ""
    kind = "graphs" if shape.must_capture else "decode" if shape.is_decode else "mixed"
    dtype = str(shape.dtype).removeprefix("torch.")
    heads = f"{shape.num_heads}/{shape.num_kv_heads} heads of {shape.head_dim}"
    return f"{kind}, {dtype}, {heads}, pages of {shape.block_size}{extras}"


# -- FlashAttention ---------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _varlen() -> tuple[Callable[..., torch.Tensor], frozenset[str]] | None:
    """torch's varlen attention and the names of its parameters, which grew from version to version."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)  # type: ignore[return-value]


def _flash_refuses(shape: Shape) -> str:
    if shape.device.type != "cuda":
        return "it is for CUDA"
    if shape.dtype not in _FLASH_DTYPES:
        return "FlashAttention has no such dtype"
    if shape.head_dim % 8 or shape.head_dim > 256:
        return "FlashAttention has no such head size"
    if shape.softcap is not None:
        return "it has no softcap"
    return "" if _varlen() is not None else "this torch has no varlen_attn"


def _window(shape: Shape) -> tuple[int, int]:
    """A query at position p sees p - window < j <= p. The last one of a row, as in decode steps, sees all, however it is said; only without
    any limit FlashAttention reads keys and values once for all heads of a group."""
    if shape.is_decode and shape.sliding_window is None:
        return (-1, -1)
    return (-1 if shape.sliding_window is None else shape.sliding_window - 1, 0)


class Varlen:
    """`varlen_attn` over the pages. Some of its kernels want the keys' starts though they do not use them."""

    captures = True
    reads_all = False

    def __init__(self, name: str, *, with_key_starts: bool) -> None:
        self.name = name
        self._with_key_starts = with_key_starts

    def fits(self, shape: Shape) -> str:
        why = _flash_refuses(shape)
        if not why and shape.must_capture and not shape.is_decode:
            why = "its launches depend on the longest row"
        if not why and not {"block_table", "seqused_k", "window_size"} <= _varlen()[1]:  # type: ignore[index]
            why = "this torch's varlen_attn knows no pages"
        return why

    def __call__(
        self, q: torch.Tensor, data: torch.Tensor, pages: torch.Tensor, step: PagedStep, shape: Shape, /
    ) -> torch.Tensor:
        attend, names = _varlen()  # type: ignore[misc]
        starts = _key_starts(step) if self._with_key_starts else None
        gqa = {"enable_gqa": shape.num_heads != shape.num_kv_heads} if "enable_gqa" in names else {}
        return attend(
            q,
            data[:, 0],
            data[:, 1],
            step.query_starts,
            starts,
            step.max_query,
            step.max_context,
            scale=shape.scale,
            window_size=_window(shape),
            seqused_k=step.context_lens,
            block_table=pages,
            **gqa,
        )


class Packed:
    """The keys and values of all rows, gathered one after the other, then `varlen_attn`. One call, twice the traffic."""

    name = "packed"
    captures = False
    reads_all = False

    def fits(self, shape: Shape) -> str:
        why = _flash_refuses(shape)
        if not why and shape.sliding_window is not None and "window_size" not in _varlen()[1]:  # type: ignore[index]
            why = "this torch's varlen_attn has no windows"
        if not why and "scale" not in _varlen()[1] and shape.scale != shape.head_dim**-0.5:  # type: ignore[index]
            why = "this torch's varlen_attn has no scale"
        return why

    def __call__(
        self, q: torch.Tensor, data: torch.Tensor, pages: torch.Tensor, step: PagedStep, shape: Shape, /
    ) -> torch.Tensor:
        attend, names = _varlen()  # type: ignore[misc]
        keys, values = _gather_packed(data, pages, step)
        window = {"window_size": _window(shape)} if "window_size" in names else {"is_causal": True}
        extras: dict[str, Any] = {"scale": shape.scale} if "scale" in names else {}
        if "enable_gqa" in names:
            extras["enable_gqa"] = shape.num_heads != shape.num_kv_heads
        starts = _key_starts(step)
        return attend(q, keys, values, step.query_starts, starts, step.max_query, step.max_context, **window, **extras)


def _key_starts(step: PagedStep) -> torch.Tensor:
    """int32 ``[R + 1]``: where each row's keys begin when all are laid out one after the other."""
    starts = step.memo.get("key_starts")
    if starts is None:
        ends = step.context_lens.cumsum(0, dtype=torch.int32)
        starts = step.memo["key_starts"] = torch.cat((torch.zeros_like(ends[:1]), ends))
    return starts


def _gather_packed(data: torch.Tensor, pages: torch.Tensor, step: PagedStep) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of all positions of all rows, ``[sum of contexts, num_kv_heads, head_dim]`` each."""
    where = step.memo.get("packed")
    block_size = data.shape[2]
    if where is None:
        assert step.lens is not None, "a packed gather has as many rows as the host says"
        contexts = step.lens[1]
        rows, places = within_rows(contexts)
        table = np.stack([rows, places // block_size, places % block_size]).astype(np.int64)
        where = step.memo["packed"] = torch.from_numpy(table).to(data.device)
    rows_there, blocks, offsets = where
    found = pages[rows_there, blocks]
    return data[found, 0, offsets], data[found, 1, offsets]


class _Triton:
    """A kernel of ours over the pages. Only tests let Triton interpret it."""

    captures = True
    reads_all = False

    def __init__(self, interpreted: bool = False) -> None:
        self._interpreted = interpreted

    def fits(self, shape: Shape) -> str:
        if not self._interpreted and shape.device.type != "cuda":
            return "it is for CUDA"
        return "" if importlib.util.find_spec("triton") is not None else "Triton is not there"


class TritonDecode(_Triton):
    """`runtime.cuda.decode`, for decode steps."""

    name = "triton"

    def fits(self, shape: Shape) -> str:
        return super().fits(shape) if shape.is_decode else "it is for decode steps"

    def __call__(
        self, q: torch.Tensor, data: torch.Tensor, pages: torch.Tensor, step: PagedStep, shape: Shape, /
    ) -> torch.Tensor:
        from runtime.cuda.decode import EAGER_SPLITS, attend_decode, num_splits

        splits = EAGER_SPLITS if step.lens is not None else num_splits(len(q) * shape.num_kv_heads, step.max_context)
        args = (shape.scale, shape.sliding_window, shape.softcap)
        return attend_decode(q, data, pages, step.context_lens, splits, *args)


class TritonRows(_Triton):
    """`runtime.cuda.prompts`, for steps with prompts."""

    name = "triton+"

    def fits(self, shape: Shape) -> str:
        return super().fits(shape) if not shape.is_decode else "it is for prompts"

    def __call__(
        self, q: torch.Tensor, data: torch.Tensor, pages: torch.Tensor, step: PagedStep, shape: Shape, /
    ) -> torch.Tensor:
        from runtime.cuda.prompts import attend_rows

        assert step.blocks is not None, "a step with prompts comes with its blocks of queries"
        args = (shape.scale, shape.sliding_window, shape.softcap)
        return attend_rows(q, data, pages, step.query_starts, step.context_lens, step.blocks, *args)


class FlashInfer:
    """flashinfer over the pages. Its plan is made once per step; a layer brings its own list of pages."""

    name = "flashinfer"
    captures = False
    reads_all = False

    def __init__(self) -> None:
        self._workspace: dict[torch.device, torch.Tensor] = {}

    def fits(self, shape: Shape) -> str:
        if shape.device.type != "cuda" or shape.dtype not in _FLASH_DTYPES:
            return "it is for CUDA and 16 bits"
        if importlib.util.find_spec("flashinfer") is None:
            return "it is not installed"
        return ""

    def __call__(
        self, q: torch.Tensor, data: torch.Tensor, pages: torch.Tensor, step: PagedStep, shape: Shape, /
    ) -> torch.Tensor:
        key = ("flashinfer", shape)
        if key not in step.memo:
            step.memo[key] = self._plan(pages, step, shape)
        wrapper, rows, blocks = step.memo[key]
        wrapper._paged_kv_indices_buf = pages[rows, blocks]
        return wrapper.run(q, data)

    def _plan(self, pages: torch.Tensor, step: PagedStep, shape: Shape) -> tuple[Any, torch.Tensor, torch.Tensor]:
        import flashinfer  # type: ignore[import-not-found]

        assert step.lens is not None, "flashinfer plans on the host"
        starts, contexts = step.lens
        workspace = self._workspace.get(shape.device)
        if workspace is None:
            workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=shape.device)
            self._workspace[shape.device] = workspace
        counts = -(-contexts // shape.block_size)
        rows, blocks = within_rows(counts)
        where = torch.from_numpy(np.stack([rows, blocks]).astype(np.int64)).to(shape.device)
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(
            torch.from_numpy(starts),
            torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)),
            pages[where[0], where[1]],
            torch.from_numpy(((contexts - 1) % shape.block_size + 1).astype(np.int32)),
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.block_size,
            causal=True,
            sm_scale=shape.scale,
            window_left=_window(shape)[0],
            logits_soft_cap=shape.softcap or 0.0,
            q_data_type=shape.dtype,
            kv_data_type=shape.dtype,
        )
        return wrapper, where[0], where[1]


# -- torch ----------------------------------------------------------------------------------------------------


class Gathered:
    """Decode rows all at once: their pages, padded to one length, through `scaled_dot_product_attention`.

    The heads of a group stand where a prompt's queries would, so keys and values are not repeated.
    """

    name = "gathered"
    captures = True
    reads_all = True

    def fits(self, shape: Shape) -> str:
        return "" if shape.is_decode else "it is for decode steps"

    def __call__(
        self, q: torch.Tensor, data: torch.Tensor, pages: torch.Tensor, step: PagedStep, shape: Shape, /
    ) -> torch.Tensor:
        group = shape.num_heads // shape.num_kv_heads
        key = ("gathered", shape.sliding_window)
        if key not in step.memo:
            step.memo[key] = self._mask(step, pages.shape[1] * shape.block_size, shape)
        mask = step.memo[key]
        gathered = data[pages]  # [R, B, 2, block_size, kv_heads, head_dim]
        keys, values = gathered.unbind(2)
        keys, values = (x.flatten(1, 2).transpose(1, 2) for x in (keys, values))
        q = q.view(len(q), shape.num_kv_heads, group, shape.head_dim)
        if shape.softcap is None:
            mask = mask.expand(-1, shape.num_kv_heads, group, -1)
            out = scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=shape.scale)
        else:
            scores = (q.float() @ keys.float().transpose(2, 3)) * (shape.scale / shape.softcap)
            weights = (shape.softcap * torch.tanh(scores)).masked_fill(~mask, float("-inf")).softmax(-1)
            out = (weights @ values.float()).to(q.dtype)
        return out.reshape(len(q), shape.num_heads, shape.head_dim)

    def _mask(self, step: PagedStep, length: int, shape: Shape) -> torch.Tensor:
        """bool ``[R, 1, 1, length]``: which positions a row's one query sees."""
        at = torch.arange(length, device=shape.device, dtype=torch.int32)[None, :]
        contexts = step.context_lens[:, None]
        seen = at < contexts
        if shape.sliding_window is not None:
            seen = seen & (at >= contexts - shape.sliding_window)
        return seen[:, None, None, :]


class Rows:
    """One gather and one call per row, as `runtime.attention.attend_torch`; always right, for what nothing else does."""

    name = "rows"
    captures = False
    reads_all = False

    def fits(self, shape: Shape) -> str:
        return ""

    def __call__(
        self, q: torch.Tensor, data: torch.Tensor, pages: torch.Tensor, step: PagedStep, shape: Shape, /
    ) -> torch.Tensor:
        assert step.lens is not None, "rows are told apart on the host"
        starts, contexts = step.lens
        out = torch.empty_like(q)
        for row, context in enumerate(contexts.tolist()):
            first, stop = int(starts[row]), int(starts[row + 1])
            num_blocks = -(-context // shape.block_size)
            gathered = data[pages[row, :num_blocks]].transpose(0, 1).flatten(1, 2)[:, :context]
            keys, values = gathered.unbind(0)
            out[first:stop] = attend_row(q[first:stop], keys, values, shape.scale, shape.sliding_window, shape.softcap)
        return out

"""Weights, unit by unit: a decoder layer, the embedding, or the final norm with the LM head.

Two sources give the same thing, `Weights`: a folder of safetensors files (one file, or shards with an index), and
`DummyWeights`, random tensors from the shapes alone. Both name tensors as the checkpoint does, relative to the
unit: ``self_attn.q_proj.weight`` in a layer, ``weight`` in the embedding, ``norm.weight`` and ``lm_head.weight`` in
the head.

A tensor is first only known (`Stored`). Whoever wants it as it is takes the whole; whoever puts it into another form takes it in
blocks of rows, small enough that a block is still in the cache when it is put into place, and then it never exists as a whole.

Files are read with plain positional reads, straight into the tensor that is returned. They are never mapped: pages of
a mapped file count as resident memory of the process until the kernel takes them back, so a worker that reads 2 GB of
layers through a mapping shows 4 GB. Bytes that a plain read leaves in the page cache are counted to nobody. A tensor
that must change its dtype exists twice only while it is converted; nothing else is ever held twice.
"""

import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from runtime.pages import empty

if TYPE_CHECKING:
    import torch

Unit: TypeAlias = int | Literal["embedding", "lm_head"]
"""A decoder layer by its index, or one of the two ends."""

ITEM_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000
_PIECE_BYTES = 2 << 20
_UNIT_OF_NAME = re.compile(
    r"^(?:model\.)?(?:layers\.(?P<layer>\d+)\.(?P<in_layer>.+)"
    r"|embed_tokens\.(?P<in_embedding>.+)"
    r"|(?P<in_head>(?:norm|final_layernorm|lm_head)\..+))$"
)


class ModelError(ValueError):
    """The model folder, or what is asked of it, cannot be served. The message names what, the limit and the way out."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `start` counts from the beginning of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Weights(Protocol):
    """Tensors by unit. `infos` costs no tensor memory."""

    def identity(self) -> str:
        """The same for two sources that hold the same tensors."""
        ...

    def infos(self, unit: Unit) -> Mapping[str, Any]:
        """The tensors of `unit`: relative name to something with `shape` and `numel`."""
        ...

    def stored(self, unit: Unit, dtype: "torch.dtype", rest: Callable[[], None] = lambda: None) -> "dict[str, Stored]":
        """The tensors of `unit`, to be read in `dtype`. `rest` is called between pieces of the reading."""
        ...


class Stored(Protocol):
    """A tensor that has not been read yet.

    Reading it raises `ModelError`: a file has vanished or is shorter than it was when it was opened.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> "torch.dtype":
        """Of what reading gives, whatever is stored."""
        ...

    def whole(self) -> "torch.Tensor":
        """All of it, on the CPU, for the caller to keep."""
        ...

    def blocks(self, num_rows: int) -> "Iterator[torch.Tensor]":
        """Its rows in order, `num_rows` at a time, the last time fewer. A block is good until the next is asked for."""
        ...


def unit_of(name: str) -> tuple[Unit, str] | None:
    """The unit that a checkpoint tensor belongs to and its name inside it, or None for what no unit holds."""
    match = _UNIT_OF_NAME.match(name)
    if match is None or name.endswith("rotary_emb.inv_freq"):
        return None
    if match["layer"] is not None:
        return int(match["layer"]), match["in_layer"]
    return ("embedding", match["in_embedding"]) if match["in_embedding"] else ("lm_head", match["in_head"])


class SafetensorsWeights:
    """The tensors of a folder in Hugging Face form.

    With `tied_embeddings`, a head whose LM weight is not in the files takes the embedding's.

    Raises:
        ModelError: no weights, a shard or a tensor missing, a damaged file, an unsupported dtype.
    """

    def __init__(self, folder: Path, *, num_layers: int, tied_embeddings: bool) -> None:
        self.folder = folder
        self._units: dict[Unit, dict[str, TensorInfo]] = {"embedding": {}, "lm_head": {}}
        self._units.update({layer: {} for layer in range(num_layers)})
        self.bytes_read = 0
        for file, expected in _files(folder).items():
            found = _read_header(file)
            if missing := sorted(expected - found.keys()):
                raise ModelError(f"{file} lacks the tensor {missing[0]} that {_INDEX} says is in it; download it again")
            for name, info in found.items():
                place = unit_of(name)
                if place is not None and place[0] in self._units:
                    self._units[place[0]][place[1]] = info
        head, embedding = self._units["lm_head"], self._units["embedding"]
        if tied_embeddings and "weight" in embedding:
            head["lm_head.weight"] = embedding["weight"]
        for unit, tensors in self._units.items():
            if not tensors:
                what = f"layer {unit}" if isinstance(unit, int) else f"the {unit.replace('_', ' ')}"
                raise ModelError(f"the weights in {folder} hold no tensor of {what}; the checkpoint is not complete")
        if "lm_head.weight" not in head:
            raise ModelError(f"the weights in {folder} hold no lm_head.weight and the config does not tie it")

    def infos(self, unit: Unit) -> Mapping[str, TensorInfo]:
        return self._units[unit]

    def identity(self) -> str:
        """A digest of all names, dtypes and shapes, and of some bytes out of the middle of every tensor."""
        digest = hashlib.blake2b(digest_size=16)
        for unit, tensors in self._units.items():
            for name, info in sorted(tensors.items()):
                digest.update(repr((unit, name, info.dtype, info.shape)).encode())
                digest.update(_sample(info))
        return digest.hexdigest()

    def float_dtype(self) -> str:
        """The dtype that most of the weights have, as torch names it."""
        sums: dict[str, int] = {}
        for tensors in self._units.values():
            for info in tensors.values():
                sums[info.dtype] = sums.get(info.dtype, 0) + info.nbytes
        return FLOATS[max((dtype for dtype in sums if dtype in FLOATS), key=sums.__getitem__)]

    def stored(self, unit: Unit, dtype: "torch.dtype", rest: Callable[[], None] = lambda: None) -> "dict[str, Stored]":
        """In the order of the file.

        Raises:
            ModelError: what is stored is no float.
        """
        found: dict[str, Stored] = {}
        for name, info in sorted(self._units[unit].items(), key=lambda item: (item[1].file, item[1].start)):
            if info.dtype not in FLOATS:
                raise ModelError(
                    f"{info.file} holds weights of dtype {info.dtype}; only floating point ones are supported"
                )
            found[name] = _InFile(info, dtype, rest, self._count)
        return found

    def _count(self, num_bytes: int) -> None:
        self.bytes_read += num_bytes


@dataclass(frozen=True, slots=True)
class _InFile:
    """Of `SafetensorsWeights`."""

    info: TensorInfo
    dtype: "torch.dtype"
    rest: Callable[[], None]
    count: Callable[[int], None]
    """Told how many bytes were read."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    def whole(self) -> "torch.Tensor":
        raw = empty(self.shape, self._as_stored(), self.rest)
        self._read(0, raw)
        return raw if raw.dtype == self.dtype else empty(self.shape, self.dtype).copy_(raw)

    def blocks(self, num_rows: int) -> "Iterator[torch.Tensor]":
        import torch

        raw = torch.empty((min(num_rows, self.shape[0]), *self.shape[1:]), dtype=self._as_stored())
        out = raw if raw.dtype == self.dtype else torch.empty(raw.shape, dtype=self.dtype)
        for first in range(0, self.shape[0], num_rows):
            count = min(num_rows, self.shape[0] - first)
            self._read(first * math.prod(self.shape[1:]) * raw.itemsize, raw[:count])
            yield out[:count] if out is raw else out[:count].copy_(raw[:count])

    def _as_stored(self) -> "torch.dtype":
        import torch

        return getattr(torch, FLOATS[self.info.dtype])

    def _read(self, offset: int, into: "torch.Tensor") -> None:
        _read_into(self.info, offset, into, self.rest)
        self.count(into.nbytes)


class DummyWeights:
    """Random tensors for shapes: normal with `std`, norms one, biases zero.

    A tensor depends on (seed, its full name, its shape) alone, not on which worker asks or in what order. A block of
    normal numbers is drawn per tensor and repeated; its prime length keeps the rows of a matrix different.
    """

    _BLOCK = 1_048_573

    def __init__(
        self, shapes: Mapping[Unit, Mapping[str, tuple[int, ...]]], *, std: float, tied_embeddings: bool, seed: int = 0
    ) -> None:
        self._units = {
            unit: {name: TensorInfo(Path(), "F32", shape, 0, 4 * math.prod(shape)) for name, shape in tensors.items()}
            for unit, tensors in shapes.items()
        }
        self._std = std
        self._tied = tied_embeddings
        self._seed = seed

    def identity(self) -> str:
        shapes = {unit: {name: info.shape for name, info in infos.items()} for unit, infos in self._units.items()}
        return f"random {self._seed} {self._std} {self._tied} {shapes}"

    def infos(self, unit: Unit) -> Mapping[str, TensorInfo]:
        return self._units[unit]

    def stored(self, unit: Unit, dtype: "torch.dtype", rest: Callable[[], None] = lambda: None) -> "dict[str, Stored]":
        return {
            name: _Drawn(info.shape, dtype, functools.partial(self._draw, unit, name, info.shape, dtype))
            for name, info in self._units[unit].items()
        }

    def _draw(self, unit: Unit, name: str, shape: tuple[int, ...], dtype: "torch.dtype") -> "torch.Tensor":
        import torch

        if name.endswith("bias"):
            return torch.zeros(shape, dtype=dtype)
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype)
        if (unit, name) == ("lm_head", "lm_head.weight") and self._tied:
            unit, name = "embedding", "weight"
        digest = hashlib.blake2b(f"{self._seed}/{unit}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        numel = math.prod(shape)
        block = torch.empty(min(numel, self._BLOCK)).normal_(0.0, self._std, generator=generator).to(dtype)
        if numel == len(block):
            return block.view(shape)
        whole = empty((numel,), dtype)
        for start in range(0, numel, len(block)):
            part = whole[start : start + len(block)]
            part.copy_(block[: len(part)])
        return whole.view(shape)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Of `DummyWeights`."""

    shape: tuple[int, ...]
    dtype: "torch.dtype"
    whole: "Callable[[], torch.Tensor]"

    def blocks(self, num_rows: int) -> "Iterator[torch.Tensor]":
        yield from self.whole().split(num_rows)


def _files(folder: Path) -> dict[Path, set[str]]:
    """The safetensors files of a folder, each with the tensors that the index expects in it."""
    index = folder / _INDEX
    if (folder / _SINGLE).is_file():
        return {folder / _SINGLE: set()}
    if not index.is_file():
        if stray := sorted(
            file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in folder.glob(pattern)
        ):
            raise ModelError(f"{folder} holds {stray[0]} but no safetensors; convert the weights to {_SINGLE} first")
        raise ModelError(
            f"{folder} holds no weights: neither {_SINGLE} nor {_INDEX}. For random weights use --load-format dummy"
        )
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files: dict[Path, set[str]] = {}
        for name, file in weight_map.items():
            files.setdefault(folder / file, set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not a safetensors index ({error!r}); download it again") from error
    if missing := [file.name for file in sorted(files) if not file.is_file()]:
        raise ModelError(
            f"{folder} lacks {len(missing)} of the {len(files)} shards that {_INDEX} names, {missing[0]} first;"
            " download the rest"
        )
    return files


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors that a safetensors file says it holds, checked against its size."""
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        infos: dict[str, TensorInfo] = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            info = TensorInfo(file, entry["dtype"], tuple(entry["shape"]), 8 + length + start, stop - start)
            if info.dtype in ITEM_SIZES and info.nbytes != info.numel * ITEM_SIZES[info.dtype]:
                raise ValueError(f"{name} has {info.nbytes} bytes for shape {info.shape} of {info.dtype}")
            infos[name] = info
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is not a safetensors file ({error}); download it again") from error
    end = max((info.start + info.nbytes for info in infos.values()), default=0)
    if end > size:
        raise ModelError(f"{file} is cut short: its tensors end at byte {end}, the file at {size}; download it again")
    return infos


def _sample(info: TensorInfo) -> bytes:
    """Up to 64 bytes out of the middle of a tensor."""
    try:
        with info.file.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), min(64, info.nbytes), info.start + info.nbytes // 2)
    except OSError as error:
        raise ModelError(f"cannot read {info.file}: {error}") from error


def _read_into(info: TensorInfo, offset: int, tensor: "torch.Tensor", rest: Callable[[], None]) -> None:
    """Fill a CPU tensor's memory from this byte of the stored one on, in pieces with a `rest` after each."""
    import torch

    view = tensor.reshape(-1).view(torch.uint8).numpy().data
    try:
        with info.file.open("rb", buffering=0) as file:
            done = 0
            while done < len(view):
                got = os.preadv(file.fileno(), [view[done : done + _PIECE_BYTES]], info.start + offset + done)
                if got == 0:
                    raise ModelError(f"{info.file} became shorter while it was being read; download it again")
                done += got
                rest()
    except OSError as error:
        raise ModelError(f"cannot read {info.file}: {error}") from error

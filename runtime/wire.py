"""What a message between two members looks like, as bytes; no network here.

A message is a header (who is meant, by whom, in which group), a table of its tensors, the payload, and the small
tensors' contents. Tensors above `INLINE_TENSOR_BYTES` have an empty entry in the table and travel beside the
message. Nothing is pickled, on either way.
"""

import ctypes
import struct
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import torch

MAX_PAYLOAD_BYTES = 256 << 20
INLINE_TENSOR_BYTES = 64 << 10

# The first byte of a reply. A message begins with MAGIC instead.
ACK, OK, ERROR, OUT, STRANGER, REFUSED = (bytes([code]) for code in range(6))

MAGIC = b"MFD1"
_ADDRESS = struct.Struct("<4s8sHH")  # magic, group, to, from
_SHAPE = struct.Struct("<BHI")  # kind, bytes of the tensor table, bytes of the payload
_HEADER = struct.Struct(_ADDRESS.format + _SHAPE.format.removeprefix("<"))
HEADER_BYTES = _HEADER.size
_KIND_AT = _ADDRESS.size
_DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)
_DTYPE_INDEX = {dtype: index for index, dtype in enumerate(_DTYPES)}
_decode_table = msgspec.msgpack.Decoder(list[tuple[int, list[int]] | None]).decode


class Header(NamedTuple):
    """The fixed part of a message."""

    group: bytes
    to: int
    sender: int
    kind: int
    table_bytes: int
    payload_bytes: int


def address_prefix(group: bytes, to: int, sender: int) -> bytes:
    """The first bytes of every message from `sender` to `to`, made once per peer."""
    return _ADDRESS.pack(MAGIC, group, to, sender)


def is_message(data: bytes) -> bool:
    return data.startswith(MAGIC) and len(data) >= HEADER_BYTES


def kind_of(data: bytes) -> int:
    return data[_KIND_AT]


def header_of(data: bytes) -> Header:
    return Header._make(_HEADER.unpack_from(data)[1:])


def pack(prefix: bytes, kind: int, payload: bytes, tensors: Sequence[torch.Tensor]) -> tuple[bytes, list[torch.Tensor]]:
    """The message's bytes, and the tensors that travel beside it.

    Raises:
        ValueError: the payload is too large, or a tensor is of a kind, or on a device, that cannot travel.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"a payload of {len(payload)} bytes; the limit is {MAX_PAYLOAD_BYTES}: send tensors beside it")
    if not tensors:
        return b"".join((prefix, _SHAPE.pack(kind, 0, len(payload)), payload)), []
    table: list[tuple[int, list[int]] | None] = []
    inline: list[bytes] = []
    beside: list[torch.Tensor] = []
    for tensor in tensors:
        if tensor.device.type not in ("cpu", "cuda"):
            raise ValueError(f"a tensor on {tensor.device} cannot travel; move it to the CPU first")
        code = _DTYPE_INDEX.get(tensor.dtype)
        if code is None:
            raise ValueError(f"a tensor of {tensor.dtype} cannot travel; supported: {', '.join(map(str, _DTYPES))}")
        if tensor.nbytes > INLINE_TENSOR_BYTES or tensor.is_cuda:
            table.append(None)
            beside.append(tensor.detach().contiguous())
            continue
        source = tensor.contiguous()
        table.append((code, list(tensor.shape)))
        inline.append(ctypes.string_at(source.data_ptr(), source.nbytes) if source.nbytes else b"")
    encoded = msgspec.msgpack.encode(table)
    if len(encoded) > 0xFFFF:
        raise ValueError(f"{len(tensors)} tensors in one message are too many")
    return b"".join((prefix, _SHAPE.pack(kind, len(encoded), len(payload)), encoded, payload, *inline)), beside


def unpack(data: bytes, header: Header, beside: list[torch.Tensor]) -> tuple[bytes, list[torch.Tensor]]:
    """Payload and tensors of a message; the tensors own their memory."""
    start = HEADER_BYTES + header.table_bytes
    position = start + header.payload_bytes
    payload = data[start:position]
    if not header.table_bytes:
        return payload, []
    view = memoryview(data)
    arrived = iter(beside)
    tensors = []
    for entry in _decode_table(view[HEADER_BYTES:start]):
        if entry is None:
            tensors.append(next(arrived))
            continue
        dtype, shape = _DTYPES[entry[0]], entry[1]
        num_bytes = dtype.itemsize
        for size in shape:
            num_bytes *= size
        if num_bytes:
            block = bytearray(view[position : position + num_bytes])
            tensors.append(torch.frombuffer(block, dtype=dtype).view(shape))
            position += num_bytes
        else:
            tensors.append(torch.empty(shape, dtype=dtype))
    return payload, tensors

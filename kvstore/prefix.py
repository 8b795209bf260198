"""Names for the content of a block: a chain of digests over the tokens from the start of a sequence.

The KV rows of a block depend on all tokens up to its end, so its digest covers them all: it is the hash of the
previous block's digest and of its own tokens. Two blocks with equal digests hold equal KV. BLAKE2b with 16 bytes makes an
accidental or a contrived collision out of reach, so a hit needs no comparison of tokens. The chain starts from a
root, which mixes in whatever else changes KV (the model, its dtype).

Never true: two token runs of different content, length or root with one digest.
"""

from collections.abc import Sequence
from hashlib import blake2b
from struct import Struct

DIGEST_SIZE = 16
"""Bytes of a digest."""


def block_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The digest of a block holding `tokens` (int32 each) that follows the block with digest `parent`."""
    return _digest(parent, Struct(f"<{len(tokens)}i").pack(*tokens))


class PrefixHasher:
    """Digests of the full blocks of a growing token list, each computed once.

    The state of a sequence is its list of digests, kept by whoever owns the sequence; the hasher itself only knows the
    block size and the root, and one serves all sequences of a model.
    """

    def __init__(self, block_size: int, root: bytes):
        assert block_size > 0
        self.block_size = block_size
        self.root = _digest(b"", root)
        self._pack = Struct(f"<{block_size}i").pack

    def extend(self, digests: list[bytes], tokens: Sequence[int]) -> None:
        """Append to `digests` those of the full blocks of `tokens` (the whole sequence) that are not in it yet."""
        size = self.block_size
        start, num_full = len(digests), len(tokens) // size
        if start >= num_full:
            return
        parent = digests[-1] if digests else self.root
        for block in range(start, num_full):
            parent = _digest(parent, self._pack(*tokens[block * size : (block + 1) * size]))
            digests.append(parent)

    def digests(self, tokens: Sequence[int]) -> list[bytes]:
        """The digests of all full blocks of `tokens`, in order; a last partial block has none."""
        result: list[bytes] = []
        self.extend(result, tokens)
        return result

    def next(self, parent: bytes | None, tokens: Sequence[int]) -> bytes:
        """The digest of one full block after the block `parent` (None: the first block of a sequence)."""
        assert len(tokens) == self.block_size, f"{len(tokens)} tokens are not a full block of {self.block_size}"
        return _digest(self.root if parent is None else parent, self._pack(*tokens))


def _digest(parent: bytes, content: bytes) -> bytes:
    # The parent's length goes first, so that no content can pass for a part of a parent.
    return blake2b(len(parent).to_bytes(4, "little") + parent + content, digest_size=DIGEST_SIZE).digest()

"""Prefix digests: equal exactly when all tokens up to the end of the block are equal."""

from hypothesis import given
from hypothesis import strategies as st

from kvstore.prefix import DIGEST_SIZE, PrefixHasher, block_digest

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=40)


def test_digest_is_pinned() -> None:
    """Two versions that share a cache must agree; a change of this value is a change of the format."""
    digest = block_digest(b"root", [1, 2, 3])
    assert len(digest) == DIGEST_SIZE
    assert digest.hex() == "274944b8b3c82ffb55e5774548230683"


def test_digest_depends_on_every_part() -> None:
    base = block_digest(b"p", [1, 2, 3, 4])
    assert base == block_digest(b"p", (1, 2, 3, 4))
    others = [
        block_digest(b"q", [1, 2, 3, 4]),
        block_digest(b"p", [1, 2, 3, 5]),
        block_digest(b"p", [2, 1, 3, 4]),
        block_digest(b"p", [1, 2, 3]),
        block_digest(b"p", [1, 2, 3, 4, 0]),
        block_digest(b"", [1, 2, 3, 4]),
    ]
    assert len({base, *others}) == 7


def test_a_token_cannot_pass_for_a_part_of_the_parent() -> None:
    assert block_digest(b"p" + (7).to_bytes(4, "little"), [8]) != block_digest(b"p", [7, 8])


@given(tokens=TOKENS, other=TOKENS, block_size=st.integers(1, 8))
def test_digests_are_equal_exactly_on_the_common_full_blocks(
    tokens: list[int], other: list[int], block_size: int
) -> None:
    hasher = PrefixHasher(block_size, b"model")
    ours, theirs = hasher.digests(tokens), hasher.digests(tokens[: len(other)] + other)
    assert len(ours) == len(tokens) // block_size
    both = tokens[: len(other)] + other
    for block, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        end = (block + 1) * block_size
        assert (a == b) == (tokens[:end] == both[:end])


@given(tokens=TOKENS, block_size=st.integers(1, 8), cuts=st.lists(st.integers(0, 40), max_size=5))
def test_a_growing_sequence_ends_with_the_same_digests(tokens: list[int], block_size: int, cuts: list[int]) -> None:
    hasher = PrefixHasher(block_size, b"model")
    digests: list[bytes] = []
    for cut in [*sorted(cuts), len(tokens)]:
        before = list(digests)
        hasher.extend(digests, tokens[:cut])
        assert digests[: len(before)] == before
        assert len(digests) == max(len(before), min(cut, len(tokens)) // block_size)
    assert digests == hasher.digests(tokens)
    parent = None
    for block, digest in enumerate(digests):
        parent = hasher.next(parent, tokens[block * block_size : (block + 1) * block_size])
        assert parent == digest


def test_each_block_is_hashed_once() -> None:
    class Watched(list):
        reads = 0

        def __getitem__(self, item):
            Watched.reads += 1
            return super().__getitem__(item)

    hasher = PrefixHasher(4, b"model")
    digests: list[bytes] = []
    tokens = Watched()
    for token in range(40):
        tokens.append(token)
        hasher.extend(digests, tokens)
    assert len(digests) == 10
    assert Watched.reads == 10


def test_root_and_block_size_keep_models_apart() -> None:
    tokens = list(range(16))
    hashers = [PrefixHasher(4, b"a"), PrefixHasher(4, b"b"), PrefixHasher(8, b"a"), PrefixHasher(4, b"")]
    digests = [digest for hasher in hashers for digest in hasher.digests(tokens)]
    assert len(set(digests)) == len(digests)

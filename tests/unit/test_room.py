"""Why there is no room for a change: what is said of pages and bytes is true, and what is said to fit does."""

import re
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.block_pool import BlockPool
from kvstore.ids import LayerRange
from runtime.layout import Layout, Segment, layout_from_counts, layout_from_owners
from runtime.messages import Join
from scheduler.membership import Membership
from scheduler.room import KvRoom
from scheduler.transition import Refused
from tests.sim.cluster import make_spec

NUM_LAYERS = 6
PAGE_BYTES = 1 << 20
LAYER_BYTES = 10 * PAGE_BYTES
BLOCK_SIZE = 4
WORKERS = ("w0", "w1", "w2")


@dataclass
class Line:
    """Of requests, none of which grows."""

    num_running: int = 0

    waiting_tokens: int = 0

    def longest_waiting(self) -> int:
        return self.waiting_tokens

    def growth(self, max_blocks: int) -> int:
        return 0


@dataclass
class Head:
    """Workers with so many bytes for weights and pages, or for pages alone where `kv_bytes` says so."""

    room_bytes: dict[str, int]
    kv_bytes: int = 0
    tokens: int = 0
    free_bytes: int = 1 << 40
    members: Membership = field(default_factory=Membership)
    batcher: Line = field(default_factory=Line)
    pool: BlockPool = field(default_factory=lambda: BlockPool(0, BLOCK_SIZE))

    def __post_init__(self) -> None:
        layer_bytes = (LAYER_BYTES,) * NUM_LAYERS
        self.spec = msgspec.structs.replace(
            make_spec(NUM_LAYERS), layer_bytes=layer_bytes, lm_head_bytes=5 * PAGE_BYTES
        )
        for name, room_bytes in self.room_bytes.items():
            self.members.join(Join(name, "host", 1, "cpu", "", 1, self.free_bytes, 1, {}), 0.0)
            worker = self.members.workers[name]
            worker.page_bytes, worker.room_bytes = PAGE_BYTES, 0 if self.kv_bytes else room_bytes
            worker.num_pages = room_bytes // PAGE_BYTES

    def max_context_tokens(self) -> int:
        return self.tokens


def refusal(head: Head, old: Layout, new: Layout, needed: int) -> str:
    with pytest.raises(Refused) as caught:
        KvRoom(head).plan(old, new, needed, keeps_cache=False)  # type: ignore[arg-type]
    return str(caught.value)


def pages(**num_pages: int) -> dict[str, int]:
    return {name: count * PAGE_BYTES for name, count in num_pages.items()}


BEFORE, AFTER = (layout_from_counts(1, WORKERS[:2], counts) for counts in ((3, 3), (1, 5)))


def test_weights_that_arrive_take_their_share_of_the_memory() -> None:
    """w1 has room for 200 pages without weights: with those of four layers and the LM head, for 155, 38 blocks of four."""
    said = refusal(Head(pages(w0=200, w1=200)), BEFORE, AFTER, 45)
    assert "45 KV blocks (180 tokens) are in use or about to be" in said
    assert "can be made with 29 at most" in said
    assert "w1 has pages for 29 blocks of 5 layers beside their weights, 80.0 MiB too few" in said
    assert "--kv-memory" not in said
    assert said.endswith(
        "Wait for requests to end, give fewer layers to w1, take in more workers, or give it more memory"
    )


def test_what_was_said_to_be_for_kv_is_what_is_too_little() -> None:
    said = refusal(Head(pages(w0=200, w1=200), kv_bytes=200 << 20), BEFORE, AFTER, 45)
    assert "w1 has pages for 40 blocks of 5 layers, 25.0 MiB of --kv-memory too few" in said
    assert "This much of it fits: w0:0-2,w1:2-6. Or wait" in said
    assert said.endswith("or raise --kv-memory")


def test_a_request_that_is_too_large_is_told_where_and_by_how_much() -> None:
    """Not only with how many tokens, whoever's fault it is."""
    head = Head(pages(w0=200, w1=200), tokens=36 * BLOCK_SIZE)
    said = refusal(head, BEFORE, AFTER, 2)
    assert "the new layout holds 116 KV tokens, and a request that was accepted may need 144" in said
    assert "w1 has pages for 29 blocks of 5 layers beside their weights, 35.0 MiB too few" in said
    assert "This much of it fits: w0:0-2,w1:2-6. Or wait" in said
    assert "--kv-memory" not in said
    assert "With --strategy drain it ends first" in said
    head.batcher.waiting_tokens = 118
    assert "drain" not in refusal(head, BEFORE, AFTER, 2), "it would go on in the new layout"
    said = refusal(Head(pages(w0=150, w1=150), 150 << 20, 36 * BLOCK_SIZE), BEFORE, AFTER, 2)
    assert "w1 has pages for 30 blocks of 5 layers, 30.0 MiB of --kv-memory too few" in said


def test_a_pool_that_the_host_has_no_memory_for_is_refused() -> None:
    """Of three workers two have theirs; with the third's, all of the host's memory would be promised."""
    head = Head(pages(w0=200, w1=200, w2=200), kv_bytes=200 * PAGE_BYTES, free_bytes=700 << 20)
    three = layout_from_counts(0, WORKERS, (2, 2, 2))
    said = refusal(head, BEFORE, three, 2)
    assert said.startswith(
        "--kv-memory 200 MiB does not fit on host (cpu), where 188 MiB can be had: w0, w1, w2 would have so much each"
    )
    room = KvRoom(head)  # type: ignore[arg-type]
    assert room.plan(BEFORE, AFTER, 2, keeps_cache=False), "these have theirs"
    head.members.free_bytes["host", "cpu"] = 2 << 30
    assert room.plan(BEFORE, three, 2, keeps_cache=False)


def test_what_ends_before_needs_no_room() -> None:
    head = Head(pages(w0=200, w1=200), tokens=36 * BLOCK_SIZE)
    room = KvRoom(head)  # type: ignore[arg-type]
    head.batcher.num_running, head.batcher.waiting_tokens = 40, 116
    assert room.plan(BEFORE, AFTER, 0, keeps_cache=False, ends_first=True) == [AFTER]
    head.batcher.waiting_tokens = 117
    with pytest.raises(Refused, match="a request that was accepted may need 117"):
        room.plan(BEFORE, AFTER, 0, keeps_cache=False, ends_first=True)


def test_a_layout_without_room_for_a_block_is_refused_though_nothing_runs() -> None:
    """As `drain` finds it once all has ended: five layers and the LM head take 55 pages of w1, and a block five more."""
    with pytest.raises(Refused, match=r"w1 has pages for 0 blocks of 5 layers beside their weights, 2\.0 MiB too few"):
        KvRoom(Head(pages(w0=200, w1=58))).plan(BEFORE, AFTER, 0, keeps_cache=False, ends_first=True)  # type: ignore[arg-type]
    assert KvRoom(Head(pages(w0=200, w1=60))).plan(BEFORE, AFTER, 0, keeps_cache=False, ends_first=True)  # type: ignore[arg-type]


@given(
    owners=st.tuples(*[st.lists(st.sampled_from(WORKERS), min_size=NUM_LAYERS, max_size=NUM_LAYERS)] * 2),
    num_pages=st.lists(st.integers(20, 250), min_size=3, max_size=3),
    is_fixed=st.booleans(),
    needed=st.integers(1, 40),
    tokens=st.integers(0, 160),
)
@settings(deadline=None, max_examples=300)
def test_what_is_said_is_so(
    owners: tuple[list[str], list[str]], num_pages: list[int], is_fixed: bool, needed: int, tokens: int
) -> None:
    """What lacks is more than there is, with so much more of it the worker has room, and the part that fits is granted."""
    old, new = (layout_from_owners(epoch, line) for epoch, line in enumerate(owners))
    head = Head(pages(**dict(zip(WORKERS, num_pages, strict=True))), kv_bytes=int(is_fixed), tokens=tokens)
    room = KvRoom(head)  # type: ignore[arg-type]
    if room.capacity(old, old) < max(needed, -(-tokens // BLOCK_SIZE)):
        return  # they would not be in use
    try:
        room.plan(old, new, needed, keeps_cache=False)
        return
    except Refused as error:
        said = str(error)
    lack = re.search(r"(w\d) has pages for (\d+) blocks of (\d+) layers.*?, ([\d.]+) MiB", said)
    assert lack is not None, said
    wanted = needed if said.startswith("no room") else -(-tokens // BLOCK_SIZE)
    assert int(lack[2]) < wanted, said
    assert float(lack[4]) > 0, said
    num_more = int(lack[3]) * (wanted - int(lack[2]))
    assert num_more - int(lack[3]) < float(lack[4]), said
    assert float(lack[4]) <= num_more + 0.1 or lack[2] == "0", (
        "where not even the weights fit, what they lack counts too"
    )
    if part := re.search(r"This much of it fits: (\S+)\. ", said):
        stages = re.findall(r"(w\d):(\d+)-(\d+)", part[1])
        segments = tuple(Segment(name, LayerRange(int(start), int(stop))) for name, start, stop in stages)
        assert room.plan(old, Layout(0, NUM_LAYERS, segments), needed, keeps_cache=False)

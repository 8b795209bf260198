"""Weights from a peer: what arrives is what was sent, whatever goes wrong; and which source is chosen."""

import itertools
import random
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from runtime.exchange import SLICE_BYTES, TRY_AGAIN_AFTER, Export, FetchFailed, Importer, Sources
from runtime.member import Member
from runtime.messages import Fetch, Weights
from runtime.model.builder import UnitBuilder
from runtime.model.config import inspect_model
from tests.tiny_models import write_tiny
from tests.unit.model_harness import Chain

PARTS = {
    "large": torch.randn(700, 1000),
    "narrow": torch.randn(5).to(torch.bfloat16),
    "packed": torch.arange(9).to(torch.uint16),
    "scalar": torch.tensor(2.5),
    "none": torch.empty(0, 4),
}


def all_slices(fetch: Fetch, parts: dict[str, torch.Tensor] | None) -> list[tuple[Weights, list[torch.Tensor]]]:
    export = Export(fetch, parts)
    slices = []
    while not export.is_done:
        message, tensors = export.take()
        slices.append((message, list(tensors)))
    return slices


def importer_from(parts: dict[str, torch.Tensor] | None, *, twice: bool = False, damage: bool = False) -> Importer:
    """An importer whose peer answers from a thread, in any order."""
    importer = Importer()
    importer.name = "me"

    def answer(peer: str, fetch: Fetch) -> None:
        assert fetch.worker == "me"
        slices = all_slices(fetch, parts) * (2 if twice else 1)
        random.Random(3).shuffle(slices)
        if damage:
            slices[0] = (slices[0][0], [slices[0][1][0] + 1])
        threading.Thread(target=lambda: [importer.take(*one) for one in slices]).start()

    importer.send = answer
    return importer


@pytest.mark.parametrize("twice", [False, True])
def test_a_unit_arrives_as_it_was_sent(twice: bool) -> None:
    importer = importer_from(PARTS, twice=twice)
    for _ in range(2):  # the second time what is left of the first is in the way
        found = importer.fetch("peer", 3, "form", lambda: False)
        assert list(sorted(found)) == sorted(PARTS)
        for name, part in PARTS.items():
            assert found[name].dtype == part.dtype
            assert torch.equal(found[name], part)


def test_a_large_tensor_travels_in_slices() -> None:
    slices = all_slices(Fetch("me", 1, 3, "form"), PARTS)
    assert max(tensors[0].nbytes for _, tensors in slices) <= SLICE_BYTES
    assert sum(message.name == "large" for message, _ in slices) == 3


def test_what_a_peer_lacks_is_said_at_once() -> None:
    with pytest.raises(FetchFailed, match="peer does not hold unit 3"):
        importer_from(None).fetch("peer", 3, "form", lambda: False)


def test_damage_is_noticed() -> None:
    with pytest.raises(FetchFailed, match="arrived damaged"):
        importer_from(PARTS, damage=True).fetch("peer", 3, "form", lambda: False)


def test_a_cancelled_load_does_not_wait_for_a_silent_peer() -> None:
    with pytest.raises(FetchFailed, match="cancelled"):
        Importer().fetch("peer", 3, "form", lambda: True)


def test_what_comes_for_a_fetch_that_was_given_up_is_not_kept() -> None:
    """Nor what was there when it was; and the next fetch gets its own alone."""
    importer = Importer()
    kept: list[weakref.ref[torch.Tensor]] = []

    def deliver(ticket: int) -> None:
        unit = {"a": torch.full((SLICE_BYTES,), float(ticket))}
        for message, (tensor,) in all_slices(Fetch("me", ticket, 3, "form"), unit):
            mine = tensor.clone()
            kept.append(weakref.ref(mine))
            importer.take(message, [mine])

    def give_up() -> None:
        raise FetchFailed("enough")

    importer.send = lambda peer, fetch: deliver(fetch.ticket)
    with pytest.raises(FetchFailed, match="enough"):
        importer.fetch("peer", 3, "form", lambda: False, give_up)
    deliver(1)
    assert len(kept) == 8
    assert not any(ref() is not None for ref in kept)

    def answer_both(peer: str, fetch: Fetch) -> None:
        deliver(1)
        deliver(fetch.ticket)

    importer.send = answer_both
    assert torch.all(importer.fetch("peer", 3, "form", lambda: False)["a"] == 2.0)


def test_each_source_is_tried_and_the_faster_one_chosen() -> None:
    sources = Sources()
    assert sources.prefers("peer"), "it may be near, and lend what it has"
    sources.measured("peer", 1000, 0.5)
    assert not sources.prefers("peer")
    sources.measured(None, 1000, 1.0)
    assert sources.prefers("peer")
    assert sources.prefers("another"), "a peer that was never measured is tried"
    for _ in range(5):
        sources.measured("peer", 1000, 2.0)
    assert not sources.prefers("peer")


def test_the_slower_source_is_measured_again_now_and_then() -> None:
    sources = Sources()
    sources.measured(None, 1000, 1.0)
    sources.failed("peer")
    choices = [sources.prefers("peer") for _ in range(40)]
    assert not any(choices[:10])
    assert any(choices), "a peer that failed once is lost for ever"
    sources.measured("peer", 1000, 0.1)
    sources.measured("peer", 1000, 0.1)
    assert sources.prefers("peer")


def test_the_slower_source_is_measured_less_often_each_time() -> None:
    sources = Sources()
    sources.measured(None, 1000, 1.0)
    sources.failed("peer")
    tried = [at for at in range(200) if sources.prefers("peer")]
    gaps = [later - earlier for earlier, later in itertools.pairwise(tried)]
    assert gaps == [2 * TRY_AGAIN_AFTER + 1, 4 * TRY_AGAIN_AFTER + 1]


@pytest.mark.parametrize("kind", ["qwen2", "llama_tied", "mixtral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_units_from_parts_are_equal_to_the_bit(kind: str, dtype: str, tmp_path: Path) -> None:
    spec = inspect_model(write_tiny(kind, tmp_path), dtype=dtype)
    here, there = UnitBuilder(spec, device="cpu"), UnitBuilder(spec, device="cpu")
    assert here.form() == there.form()
    original = Chain(
        spec,
        here.embedding(),
        {i: here.layer(i) for i in range(spec.num_layers)},
        UnitBuilder(spec, device="cpu").lm_head(),
    )
    copies = {
        unit: {name: part.clone() for name, part in layer.parts.items()} for unit, layer in original.layers.items()
    }
    copy = Chain(
        spec,
        there.embedding(original.embedding.parts),
        {index: there.layer(index, parts) for index, parts in copies.items()},
        UnitBuilder(spec, device="cpu").lm_head(original.lm_head.parts),
    )
    tokens = torch.randint(3, 280, (2, 9), generator=torch.Generator().manual_seed(1))
    assert torch.equal(original.run(tokens, (8, 1)), copy.run(tokens, (8, 1)))
    assert [layer.nbytes for layer in original.layers.values()] == [layer.nbytes for layer in copy.layers.values()]


def test_the_form_tells_models_dtypes_and_implementations_apart(tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path / "a")
    other = write_tiny("llama", tmp_path / "b")
    data = bytearray((other / "model.safetensors").read_bytes())
    tail = len(data) // 2
    data[tail:] = bytes(byte ^ 1 for byte in data[tail:])
    (other / "model.safetensors").write_bytes(data)
    forms = [
        UnitBuilder(inspect_model(path, dtype=dtype), device="cpu", implementation=implementation).form()
        for path, dtype, implementation in (
            (folder, "float32", "lean"),
            (folder, "bfloat16", "lean"),
            (folder, "float32", "transformers"),
            (other, "float32", "lean"),
        )
    ]
    assert len(set(forms)) == 4


def test_who_asks_while_another_is_served_hears_at_once() -> None:
    sent: list[tuple[str, int]] = []
    outbox = SimpleNamespace(to_peer=lambda worker, message, tensors: sent.append((worker, message.offset)))
    store = SimpleNamespace(parts=lambda unit, form: {"w": torch.zeros(3 * SLICE_BYTES, dtype=torch.uint8)})
    member = Member("peer", torch.device("cpu"), cast("Any", store), cast("Any", outbox), time.perf_counter)
    for target in ("w1", "w2"):
        member.fetch(Fetch(target, 1, 3, "form"))
    while member.background_wait_s() is not None:
        member.background()
    assert sent == [(target, offset * SLICE_BYTES) for offset in range(3) for target in ("w1", "w2")]

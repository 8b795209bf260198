"""Tensors that other processes map: the same memory, for as long as anybody has it, and never any other."""

import gc
import multiprocessing
import os
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime import pages
from runtime.exchange import FetchFailed, Importer, lent
from runtime.messages import Fetch, Loan, Weights

SHAPE = (1000, 300)

pytestmark = pytest.mark.skipif(not pages.place() or not hasattr(os, "memfd_create"), reason="nothing can be lent here")


def make(seed: int = 0) -> torch.Tensor:
    tensor = pages.empty(SHAPE, torch.float32)
    return tensor.copy_(torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)))


def num_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def _other(pipe: Connection, job: Callable[..., Any]) -> None:
    pipe.send(job(pipe))


def elsewhere(job: Callable[..., Any]) -> tuple[multiprocessing.Process, Connection]:
    """Run `job(pipe)` in another process; its result is the last thing that it sends."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_other, args=(theirs, job), daemon=True)
    process.start()
    return process, ours


def take_a_loan(pipe: Connection) -> tuple[bool, float]:
    loan = pipe.recv()
    tensor = pages.borrow(loan, SHAPE, torch.float32)
    pipe.send("borrowed")
    pipe.recv()  # by now the lender has let go
    again = pages.lend(tensor)
    assert again is not None
    on = pages.borrow(again, SHAPE, torch.float32)
    return torch.equal(on, tensor), float(tensor.double().sum())


def test_another_process_has_the_same_memory_and_keeps_it() -> None:
    tensor = make()
    total = float(tensor.double().sum())
    process, pipe = elsewhere(take_a_loan)
    pipe.send(pages.lend(tensor))
    assert pipe.recv() == "borrowed"
    assert "/memfd:midflight-" in Path(f"/proc/{process.pid}/maps").read_text()
    before = num_files()
    del tensor
    assert num_files() < before
    pipe.send("gone")
    assert pipe.recv() == (True, total), "the lender's end takes nothing away, and what is borrowed can be lent"
    process.join(10.0)


def test_what_dies_gives_its_files_back() -> None:
    before = num_files()
    for _ in range(3):
        tensor = make()
        loan = pages.lend(tensor)
        assert loan is not None
        borrowed = pages.borrow(loan, SHAPE, torch.float32)
        assert num_files() > before
        del tensor, borrowed
        assert num_files() == before
        with pytest.raises(pages.LoanError, match=r"does not give it|has let go of it"):
            pages.borrow(loan, SHAPE, torch.float32)


def test_another_file_is_not_taken_for_it() -> None:
    first, second = make(), make(1)
    one, other = pages.lend(first), pages.lend(second)
    assert one is not None
    assert other is not None
    with pytest.raises(pages.LoanError, match="has let go of it"):
        pages.borrow(Loan(one.pid, other.descriptor, one.file), SHAPE, torch.float32)
    with pytest.raises(pages.LoanError, match="1,201,200 bytes from 0 on are not in its file of 1,200,000"):
        pages.borrow(one, (1001, 300), torch.float32)
    with pytest.raises(pages.LoanError, match="from -64 on are not in its file"):
        pages.borrow(Loan(one.pid, one.descriptor, one.file, -64), (10, 10), torch.float32)
    with pytest.raises(pages.LoanError, match="does not give it"):
        pages.borrow(Loan(1 << 22, 3, one.file), SHAPE, torch.float32)


def test_only_whole_large_tensors_are_lent() -> None:
    tensor = make()
    assert pages.lend(tensor[1:]) is None
    assert pages.lend(tensor[:10]) is None
    assert pages.lend(tensor.T) is None
    assert pages.lend(pages.empty((4,), torch.float32)) is None
    assert pages.lend(torch.empty(SHAPE)) is None


UNIT = {"qkv": (900, 500), "o": (500, 333), "down": (2, 300_000), "norm": (500,)}


def a_unit() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        name: pages.empty(shape, torch.bfloat16).copy_(torch.randn(shape, generator=generator))
        for name, shape in UNIT.items()
    }


def take_a_unit(pipe: Connection) -> bool:
    loans = pipe.recv()
    before = num_files()
    parts = {name: pages.borrow(loan, UNIT[name], torch.bfloat16) for name, loan in loans.items()}
    assert num_files() == before + 1, "one file is opened, once"
    again = {name: pages.lend(part) for name, part in parts.items()}
    assert pages.together(parts) is parts
    return all(torch.equal(part, a_unit()[name]) for name, part in parts.items()) and all(
        loan is not None and loan.offset == loans[name].offset for name, loan in again.items()
    )


def test_what_is_put_together_is_one_file_and_lent_as_before() -> None:
    before = num_files()
    parts = a_unit()
    gathered = pages.together(parts)
    assert all(torch.equal(gathered[name], part) for name, part in parts.items())
    assert gathered["norm"] is parts["norm"], "what is small stays in the heap"
    assert all(part.data_ptr() % pages.ALIGNMENT == 0 for part in gathered.values())
    loans = {name: pages.lend(part) for name, part in gathered.items() if name != "norm"}
    assert None not in loans.values()
    assert len({loan.file for loan in loans.values() if loan is not None}) == 1
    assert pages.together(gathered) is gathered
    del parts
    assert num_files() == before + 1
    process, pipe = elsewhere(take_a_unit)
    pipe.send(loans)
    assert pipe.recv()
    process.join(10.0)
    pipe.close()
    process.close()
    part = gathered["o"]
    del gathered
    assert num_files() == before + 1, "as long as one part lives"
    del part
    assert num_files() == before


def test_without_files_it_is_a_tensor_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> int:
        raise OSError("too many open files")

    monkeypatch.setattr(os, "memfd_create", refuse)
    tensor = make()
    assert pages.lend(tensor) is None
    assert tensor.shape == SHAPE


def test_when_descriptors_are_short_tensors_are_made_and_none_are_used_up() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    kept = [make(seed) for seed in range(2)]
    loan = pages.lend(kept[0])
    assert loan is not None
    resource.setrlimit(resource.RLIMIT_NOFILE, (pages.RESERVED_FILES + num_files() + 6, hard))
    try:
        made = [make(seed) for seed in range(16)]
        assert pages.lend(made[0]) is not None
        assert pages.lend(made[-1]) is None
        with pytest.raises(pages.LoanError, match="no descriptor is left"):
            pages.borrow(loan, SHAPE, torch.float32)
        before = num_files()
        made += [make(seed) for seed in range(8)]
        assert num_files() == before
        assert all(torch.equal(tensor, make(index % 16)) for index, tensor in enumerate(made))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def importer_beside(parts: dict[str, torch.Tensor], *, stale: bool = False) -> Importer:
    """One whose peer lends when it is asked to, else sends bytes; every message comes twice."""
    importer = Importer()
    importer.name = "me"

    def answer(peer: str, fetch: Fetch) -> None:
        found = lent(fetch, parts)
        if found is None:
            importer.take(Weights(fetch.ticket), [])
            return
        message, beside = found
        if stale:
            parts.pop("weight")
            gc.collect()
        for _ in range(2):
            importer.take(message, list(beside))

    importer.send = answer
    return importer


def test_a_unit_is_borrowed_with_its_small_tensors_beside() -> None:
    parts = {"norm": torch.randn(5).to(torch.bfloat16), "weight": make(), "bias": torch.randn(3)}
    importer = importer_beside(parts)
    for _ in range(2):
        found = importer.fetch("peer", 3, "form", lambda: False)
        assert list(found) == list(parts)
        for name, part in parts.items():
            assert torch.equal(found[name], part)
        assert pages.lend(found["weight"]) is not None
    assert importer.lenders == {"peer"}


def test_a_loan_that_is_gone_is_no_loan() -> None:
    importer = importer_beside({"norm": torch.randn(5), "weight": make()}, stale=True)
    with pytest.raises(FetchFailed, match="peer lent weight, and process"):
        importer.fetch("peer", 3, "form", lambda: False)
    assert not importer.lenders


def test_nothing_is_lent_to_another_place_or_without_the_large_part() -> None:
    parts = {"weight": make()}
    assert lent(Fetch("me", 1, 3, "form", pages.place()), parts) is not None
    assert lent(Fetch("me", 1, 3, "form", ""), parts) is None
    assert lent(Fetch("me", 1, 3, "form", pages.place() + " elsewhere"), parts) is None
    assert lent(Fetch("me", 1, 3, "form", pages.place()), {"weight": torch.empty(SHAPE)}) is None
    assert lent(Fetch("me", 1, 3, "form", pages.place()), None) is None

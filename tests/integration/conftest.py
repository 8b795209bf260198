"""Servers that several test modules share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.server import Server
from tests.tiny_models import write_tiny


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two stages of a tiny model with a small KV pool and small chunks, shared by tests that only ask it things."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    options = ("--stages", "2", "--dtype", "float32", "--kv-memory", "2M", "--step-tokens", "64")
    with Server(tiny_llama, *options, log=log) as running:
        yield running

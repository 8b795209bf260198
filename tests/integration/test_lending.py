"""Workers of one host lend each other weights: the same pages are mapped by both, and outlive the one that read them."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from runtime import pages
from tests.integration.server import Server
from tests.integration.test_layout_http import wait_for
from tests.integration.test_room import BODIES, change, told

pytestmark = pytest.mark.skipif(not pages.place() or not hasattr(os, "memfd_create"), reason="nothing can be lent here")


def files_of(pid: int) -> set[str]:
    """The inodes of the weights that a process has mapped."""
    text = Path(f"/proc/{pid}/maps").read_text()
    return set(re.findall(r"(\d+)\s+/memfd:midflight-", text))


async def test_a_layer_that_two_workers_hold_is_in_memory_once(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config.update(hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=4, head_dim=64)
    (folder / "config.json").write_text(json.dumps(config))
    options = ("--layers", "2,2", "--local-workers", "3", "--load-format", "dummy", "--kv-memory", "16M")
    with Server(folder, *options, log=tmp_path / "log") as server:
        wait_for(lambda: len(server.worker_pids()) == 3, "the third worker")
        first, second = (stage["worker"] for stage in server.get("/admin/layout")[1]["stages"])
        (third,) = server.worker_pids().keys() - {first, second}
        pid = server.worker_pids()
        expected = told(await server.post_all("/v1/completions", BODIES))
        read = files_of(pid[second])
        assert len(read) >= 2, "the large weights of each of two layers"
        assert not files_of(pid[third])
        await change(server, (first, 0, 2), (third, 2, 4))
        (report,) = server.get("/admin/transitions")[1]["transitions"]
        assert report["peer_weight_bytes"] == report["weight_bytes"] > 0
        assert files_of(pid[third]) == read, "nothing was read or copied"
        assert not files_of(pid[second])
        os.kill(pid[second], signal.SIGKILL)
        wait_for(lambda: second not in server.worker_pids(), "its end")
        await change(server, (first, 0, 1), (third, 1, 4))
        assert len(files_of(pid[third]) - read) >= 1
        assert told(await server.post_all("/v1/completions", BODIES)) == expected
        assert server.audit()["problems"] == []

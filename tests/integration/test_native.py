"""`scripts/native`: the compiled simulator is the same simulator."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIMULATE = (
    *("simulate", "--cluster", "a100:1,l40s:2", "--model", "llama-3-8b", "--policy", "autopilot", "--json"),
    *("--trace", "poisson:rate=2,prompt=512,output=16,duration=60+poisson:rate=2,prompt=64,output=256,duration=60"),
)


def simulated(*command: str) -> dict[str, object]:
    environment = os.environ | {"MIDFLIGHT_VENV": sys.prefix}
    done = subprocess.run([*command, *SIMULATE], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    return {key: value for key, value in result.items() if key not in ("wall_s", "times_real_time")}


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.timeout(600)
def test_native_code_decides_the_same() -> None:
    native = simulated("scripts/native", "midflight")
    assert list((ROOT / "build/native/scheduler").glob("batching.*.so"))
    assert native == simulated("scripts/midflight")
    assert native["served"]

"""The benchmark of a device that may be lent for minutes: what one part does not find must not cost the others."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"))
import on_cuda
import servers


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the script on made-up parts; the document that is left."""
    monkeypatch.setenv("MIDFLIGHT_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(on_cuda, "_roofline", lambda folder, args: on_cuda.Roofline(100, 1, 1e6))
    monkeypatch.setattr(on_cuda, "machine_now", dict)

    def run(*arguments: str, serve: Any) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(on_cuda, "_serve", serve)
        out = tmp_path / "out.json"
        monkeypatch.setattr(
            sys,
            "argv",
            ["cuda", "--device", "cpu", "--shapes", "tiny", "--out", str(out), "--no-reference", *arguments],
        )
        return on_cuda.main(), json.loads(out.read_text())

    return run


def served(
    folder: Path,
    num_workers: int,
    args: Any,
    log_folder: Path,
    served: dict,
    changes: list,
    changed: Callable[[], None],
) -> None:
    assert (folder / "config.json").is_file(), "also where nothing can be fetched"
    served["1"] = {"tpot_s": {"p50": 0.002}, "output_tokens_per_s": 500.0, "errors": 0}
    changed()
    if num_workers == 2:
        raise RuntimeError("the change did not commit")


def test_what_fails_is_noted_and_the_rest_is_kept(bench: Any) -> None:
    code, document = bench("--workers", "1,2,4", serve=served)
    assert code == 1
    assert document["failures"] == {"tiny, 2 workers": "RuntimeError: the change did not commit"}
    assert list(document["shapes"]["tiny"]["served"]) == ["1", "2", "4"]
    assert all("1" in found for found in document["shapes"]["tiny"]["served"].values()), "half a part counts, too"


def test_when_the_time_is_used_up_nothing_more_begins(bench: Any) -> None:
    code, document = bench("--workers", "1,2", "--budget", "-1", serve=served)
    assert (code, document["shapes"]["tiny"]) == (0, {})


def test_what_is_started_finds_packages_where_this_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/packages")
    assert servers.import_path(Path("/checkout")) == "/checkout:/packages"
    monkeypatch.delenv("PYTHONPATH")
    assert servers.import_path(Path("/checkout")) == "/checkout"


def test_no_benchmark_stands_before_a_package() -> None:
    """They run with their folder first on the path; `cuda` is a package of NVIDIA's that torch imports where it is installed."""
    folder = Path(on_cuda.__file__).parent
    names = {path.stem for path in folder.glob("*.py")}
    assert not names & {
        "cuda",
        "scheduler",
        "runtime",
        "api",
        "kvstore",
        "torch",
        "triton",
        "numba",
        "numpy",
        *sys.stdlib_module_names,
    }

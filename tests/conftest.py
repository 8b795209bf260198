"""For all tests."""

import signal
from collections.abc import Iterator

import pytest

from tests.sim import SEEDS_PER_BLOCK

# A shell that starts the tests in the background has SIGINT ignored, and every process that a test starts and
# interrupts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seeds", type=int, default=350, help="seeds for each of the simulation's seven families of tests"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "block" in metafunc.fixturenames:
        num_blocks = -(-metafunc.config.getoption("--seeds") // SEEDS_PER_BLOCK)
        metafunc.parametrize("block", range(num_blocks))


@pytest.fixture(scope="module", params=[1, 3], ids=["alone", "team"])
def kernel_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Kernels on one thread, then on a team of three: for modules whose results must be the same on both."""
    from runtime.kernels import team

    before = team.num_threads()
    team.set_num_threads(request.param)
    yield request.param
    team.set_num_threads(before)

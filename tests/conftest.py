"""For all tests."""

import signal

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

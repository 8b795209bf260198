"""The real scheduler and workers over a simulated clock, network and model."""

SEEDS_PER_BLOCK = 20
"""Seeds of one test case; `--seeds` is rounded up to a multiple of it."""

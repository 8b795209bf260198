"""For all tests."""

import signal

# A shell that starts the tests in the background has SIGINT ignored, and every process that a test starts and
# interrupts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

"""What is known of a device before anything was measured on it: memory, bandwidth, arithmetic, by data sheet. Pure.

A worker announces a name when it joins (``torch.cuda.get_device_name``, or the CPU's model); `lookup` finds the entry.
Peaks are the maker's, dense (data sheets often print twice as much, "with sparsity"). What is reached of them is another
matter: each entry says which fraction to expect, and `planning.calibration` replaces the expectation by measurements.

Never true: that an entry is a measurement, except where its source says so.
"""

import re

import msgspec


class DeviceKind(msgspec.Struct, frozen=True):
    """A kind of device: the maker's peaks in bytes, bytes/s and FLOP/s (bfloat16, a multiply-add is 2), and what to expect of them.

    `bandwidth_fraction` and `flops_fraction` are what a good matrix product is expected to reach of the peaks, `kv_fraction`
    and `attention_fraction` what attention reaches of the same two. `step_s` is what a step costs a stage before its first
    layer, `layer_s` what a layer costs beyond its products and its attention (kernel launches, norms), `logit_s` what
    drawing a token costs for each entry of the vocabulary. `sharpness` is how abruptly the memory-bound regime gives way to the compute-bound
    one (see `planning.cost`). A hop out of the device takes `link_latency_s` plus its bytes over `link_bytes_per_s`.
    """

    name: str
    pattern: str
    memory_bytes: int
    bandwidth: float
    flops: float
    source: str
    bandwidth_fraction: float = 0.8
    flops_fraction: float = 0.6
    kv_fraction: float = 0.6
    attention_fraction: float = 0.4
    step_s: float = 250e-6
    layer_s: float = 25e-6
    logit_s: float = 5e-11
    sharpness: float = 4.0
    link_latency_s: float = 300e-6
    link_bytes_per_s: float = 10e9

    @property
    def is_accelerator(self) -> bool:
        """Whether bytes move beside the steps, by copy engines, and not by what computes them."""
        return self.name != CPU_CORE.name


_GB = 10**9
_SHEET = "NVIDIA data sheet, "

CPU_CORE = DeviceKind(
    "cpu-core",
    r"(?i)\bcpu\b|EPYC|Xeon|Ryzen|Core\(TM\)|Graviton|Neoverse",
    8 * _GB,
    33e9,
    395e9,
    "measured: one core of an AMD EPYC with avx512_bf16, this project's kernels (docs/planner.md)",
    bandwidth_fraction=1.0,
    flops_fraction=1.0,
    kv_fraction=0.87,
    attention_fraction=0.62,
    step_s=250e-6,
    layer_s=10e-6,
    logit_s=2e-10,
    sharpness=1.5,
    link_bytes_per_s=1.4e9,
)
"""One core. A worker with more threads: `lookup`."""

KINDS: tuple[DeviceKind, ...] = (
    DeviceKind("h200", r"\bH200\b", 141 * _GB, 4.8e12, 989e12, _SHEET + "H200 Tensor Core GPU, SXM"),
    DeviceKind("h100-pcie", r"\bH100 PCIe\b", 80 * _GB, 2.0e12, 756e12, _SHEET + "H100 Tensor Core GPU, PCIe"),
    DeviceKind("h100", r"\bH100\b", 80 * _GB, 3.35e12, 989e12, _SHEET + "H100 Tensor Core GPU, SXM"),
    DeviceKind("a100-40", r"\bA100\b.*\b40GB\b", 40 * _GB, 1.555e12, 312e12, _SHEET + "A100 Tensor Core GPU, 40 GB"),
    DeviceKind(
        "a100-pcie", r"\bA100\b.*\b80GB PCIe\b", 80 * _GB, 1.935e12, 312e12, _SHEET + "A100 Tensor Core GPU, 80 GB PCIe"
    ),
    DeviceKind("a100-80", r"\bA100\b", 80 * _GB, 2.039e12, 312e12, _SHEET + "A100 Tensor Core GPU, 80 GB SXM"),
    DeviceKind("l40s", r"\bL40S\b", 48 * _GB, 864e9, 362e12, _SHEET + "L40S"),
    DeviceKind("l4", r"\bL4\b", 24 * _GB, 300e9, 121e12, _SHEET + "L4 Tensor Core GPU"),
    DeviceKind("a10", r"\bA10\b", 24 * _GB, 600e9, 125e12, _SHEET + "A10 Tensor Core GPU"),
    DeviceKind(
        "rtx-4090",
        r"\bRTX 4090\b",
        24 * _GB,
        1008e9,
        165e12,
        "NVIDIA, Ada GPU architecture: RTX 4090, 16-bit products with 32-bit sums",
    ),
    CPU_CORE,
)
"""The first whose pattern is found in the announced name is taken."""

ALIASES = {"a100": "a100-80", "cpu": "cpu-core", "4090": "rtx-4090"}


def lookup(name: str, num_threads: int = 1) -> DeviceKind:
    """The kind of a device, by the name it announces or by the table's own ("l40s", "a100").

    A CPU's entry is one core; its arithmetic grows with `num_threads`, its bandwidth too as far as is known of it (the
    cores of a host share it, which only a measurement tells).

    Raises:
        ValueError: when no entry fits.
    """
    wanted = name.strip().lower()
    wanted = ALIASES.get(wanted, wanted)
    for kind in KINDS:
        if wanted == kind.name or re.search(kind.pattern, name):
            return _threaded(kind, num_threads) if kind is CPU_CORE else kind
    known = ", ".join(kind.name for kind in KINDS)
    raise ValueError(f"no device called {name!r} is in the table; known are {known}")


def kind_of_worker(device: str, device_name: str, num_threads: int) -> DeviceKind:
    """The kind that a worker's `Join` tells of; a GPU that is not in the table is taken for an A100 until it is measured."""
    if device == "cpu":
        return _threaded(CPU_CORE, num_threads)
    try:
        return lookup(device_name)
    except ValueError:
        return msgspec.structs.replace(lookup("a100-80"), name=device_name, source="unknown; taken for an A100")


def _threaded(kind: DeviceKind, num_threads: int) -> DeviceKind:
    threads = max(1, num_threads)
    return msgspec.structs.replace(kind, bandwidth=kind.bandwidth * threads, flops=kind.flops * threads)

"""CPU kernels in numba: paged attention, packed matrix products and the small fused operations between them.

How it works: every kernel is a numba function that releases the GIL and is cached on disk; the large ones run on a `team` of threads.
`lanes` holds what is written in LLVM terms because Python cannot say it, `spans` and `softmax` the inner loops made of
that, `tiles` (on AMX `amx`) and `products` the packed matrix product, `paged` attention over KV pages, `layer` a stage's decoder
layers. A kernel reads and writes its tensors as numpy arrays of their *storage type*, which tells it what the bits mean:

    torch.float32 -> float32        torch.bfloat16 -> uint16        torch.float16 -> int16

`storage` makes that view without a copy. All arithmetic is in float32 (products of bfloat16 may use the
processor's own dot or matrix product, which accumulate in float32 too).

What is never true: a kernel allocates no memory of its own (the caller passes the scratch), keeps no state, and
does not depend on how tokens are batched: a row's result is the same bits whatever rows are beside it.
"""

import numpy as np
import torch

from runtime.kernels.lanes import HAS_HALF

STORAGE_DTYPES: dict[torch.dtype, torch.dtype] = {torch.float32: torch.float32, torch.bfloat16: torch.uint16}
"""The dtypes that the kernels know on this processor, and their storage types."""
if HAS_HALF:
    STORAGE_DTYPES[torch.float16] = torch.int16


def has_kernels(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether the kernels serve this dtype on this device."""
    return torch.device(device).type == "cpu" and dtype in STORAGE_DTYPES


def storage(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a CPU tensor as a numpy array of its storage type, without a copy.

    Raises:
        ValueError: when the kernels do not know the dtype.
    """
    dtype = STORAGE_DTYPES.get(tensor.dtype)
    if dtype is None:
        known = ", ".join(str(name).removeprefix("torch.") for name in STORAGE_DTYPES)
        raise ValueError(f"the kernels of this processor know {known}, not {tensor.dtype}; choose one with --dtype")
    return tensor.detach().view(dtype).numpy()

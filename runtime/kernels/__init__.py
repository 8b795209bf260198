"""CPU kernels in numba: paged attention, packed matrix products and the small fused operations between them.

How it works: every kernel is a numba function that releases the GIL, runs on one thread and is cached on disk.
`lanes` holds what plain Python cannot say (vector registers, bit casts), `products` the packed matrix product,
`paged` attention over KV pages, `layer` whole decoder layers. A kernel reads and writes its tensors as numpy
arrays of their *storage type*, which tells it what the bits mean:

    torch.float32 -> float32        torch.bfloat16 -> uint16        torch.float16 -> int16

`storage` makes that view without a copy. All arithmetic is in float32 (products of bfloat16 may use the
processor's own dot product, which accumulates in float32 too).

What is never true: a kernel allocates no memory of its own (the caller passes the scratch), keeps no state, and
does not depend on how tokens are batched: a row's result is the same bits whatever rows are beside it.
"""

import numpy as np
import torch

STORAGE_DTYPES: dict[torch.dtype, torch.dtype] = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.uint16,
    torch.float16: torch.int16,
}


def storage(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a CPU tensor as a numpy array of its storage type, without a copy.

    Raises:
        ValueError: when the dtype is none of float32, bfloat16, float16.
    """
    dtype = STORAGE_DTYPES.get(tensor.dtype)
    if dtype is None:
        raise ValueError(
            f"the CPU kernels know float32, bfloat16 and float16, not {tensor.dtype}; pick one with --dtype"
        )
    return tensor.detach().view(dtype).numpy()

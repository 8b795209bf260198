"""Whether something may be captured: does it ask the host for what only the device knows?

A graph holds what was queued while it was captured. What the host decided then by the values of a tensor (how many entries are not
zero, which expert anybody was sent to) would be replayed whatever the values are later; most of it fails in the capture,
which then ends in an undefined state of foreign libraries. So it is asked for before, in a run without a capture.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_BY_VALUE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)
_COPYING = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class NotStatic(Exception):
    """What was run cannot be captured. The message names the operation."""


class StaticOnly(TorchDispatchMode):
    """A context in which torch's operations raise when their result's shape, or the host, depends on a tensor's values.

    It holds for the thread that enters it. Kernels that are not torch's own are not seen.

    Raises:
        NotStatic: by the operation.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _INDEXING:  # tagged, but static unless a mask chooses
            by_value = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        elif func in _COPYING:
            target = kwargs.get("device") if func is _COPYING[0] else args[0].device
            source = args[0].device if func is _COPYING[0] else args[1].device
            by_value = target is not None and _is_other(torch.device(target), source)
        else:
            by_value = any(tag in func.tags for tag in _BY_VALUE)
        if by_value:
            raise NotStatic(f"{func} depends on values")
        with self:  # in inference mode, what is made of other operations comes here as a whole
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        return func(*args, **kwargs)


def _is_other(target: torch.device, source: torch.device) -> bool:
    return target.type != source.type or target.index not in (None, source.index)

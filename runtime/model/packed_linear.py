"""`nn.Linear` on the kernels of `runtime.kernels`, for layers whose code is the architecture's own.

How it works: the weight of every plain `nn.Linear` of a module is packed once, and the packed form is the only one. A product then runs
at the speed of memory for few rows, and a row's result does not depend on how many others share it, which torch's own does not
promise.

Never true: a linear layer of another class is touched, or one with an odd number of inputs.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from runtime.kernels import storage
from runtime.kernels.products import PANEL, pack, product_by_blocks
from runtime.kernels.tiles import tile_address

_NOTHING = np.empty(0, np.float32)


class PackedLinear(nn.Module):
    """``[..., in_features]`` to ``[..., out_features]`` in the dtype of x, which is that of `weight`, packed and flat.

    Raises:
        ValueError: x has another dtype, or another number of inputs.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Of the shape and dtype of `linear`, with parameters on the meta device, to be loaded."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        num_elements = -(-self.out_features // PANEL) * PANEL * self.in_features
        weight = torch.empty(num_elements, dtype=linear.weight.dtype, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(torch.empty_like(linear.bias, device="meta"))
        self._arrays: tuple[int, np.ndarray, np.ndarray] | None = None

    def bind(self) -> None:
        """To be called when the parameters are there for good."""
        bias = _NOTHING if self.bias is None else self.bias.detach().float().numpy()
        weight = storage(self.weight)
        self._arrays = tile_address(weight.dtype), weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self._arrays is not None, "bind comes first"
        if x.dtype is not self.weight.dtype or x.shape[-1] != self.in_features:
            raise ValueError(
                f"a linear layer of {self.in_features} inputs in {self.weight.dtype} got {list(x.shape)} in {x.dtype}"
            )
        tiles, weight, bias = self._arrays
        rows = x.reshape(-1, self.in_features).contiguous()
        result = torch.empty((len(rows), self.out_features), dtype=x.dtype)
        product_by_blocks(tiles, storage(rows), weight, bias, storage(result))
        return result.view(*x.shape[:-1], self.out_features)


def packable(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers in it, by name, that `PackedLinear` can stand in for."""
    return {
        name: child
        for name, child in module.named_modules()
        if type(child) is nn.Linear and child.in_features % 2 == 0 and not child._forward_hooks
    }


def replace(module: nn.Module, linears: Mapping[str, nn.Linear]) -> None:
    """Put a `PackedLinear` in the place of each of these."""
    for name, linear in linears.items():
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, PackedLinear(linear))


def bind(module: nn.Module) -> None:
    """`PackedLinear.bind` for every one in it."""
    for child in module.modules():
        if isinstance(child, PackedLinear):
            child.bind()


def pack_flat(weight: torch.Tensor, rest: Callable[[], None]) -> torch.Tensor:
    """``[out_features, in_features]`` as `PackedLinear` holds it."""
    packed = torch.from_numpy(pack(weight, rest=rest).data)
    return packed.view(weight.dtype)


def warm_up(dtype: torch.dtype) -> None:
    """Compile what it needs for this dtype, or load it from the disk cache."""
    module = nn.Sequential(nn.Linear(2, 2, dtype=dtype))
    state = module.state_dict()
    state["0.weight"] = pack_flat(state["0.weight"], lambda: None)
    replace(module, packable(module))
    module.load_state_dict(state, assign=True)
    bind(module)
    module(torch.zeros(1, 2, dtype=dtype))


def form() -> str:
    """What a packed weight depends on besides itself."""
    return f"linear panels of {PANEL}"

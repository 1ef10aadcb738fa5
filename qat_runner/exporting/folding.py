"""Folding of BatchNorm into the convolution before it, without quantizing the weight again.

In eval mode BatchNorm is y = f (x - mean) + beta with f = gamma / sqrt(variance + eps), one of each per channel. A
weight that is stored as codes takes f into its step sizes, depending on the format:

- In general, D becomes |f| D, and where f is negative the codes of that channel change their sign. In two's complement
  the lowest code has no counterpart of the opposite sign. With 8 bits or more, the highest code, one step away, is used
  instead. With fewer bits one step is too much, so a convolution that would need the counterpart keeps its BatchNorm.
- Step sizes of an oriented weight have a sign, so D becomes f D, and all codes stay as they are.
- Affine codes and their zero point are counted from the other end where f is negative.

Where f is 0, all codes become the code of zero.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from qat_runner.exporting.integer import IntegerConv, not_zero

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

FINE = 8
"""The smallest bit-width at which an error of one step does not matter."""


@torch.no_grad()
def fold_batchnorm(model: nn.Module, *example: Any) -> list[str]:
    """Fold each BatchNorm into the integer convolution that it directly follows, in place.

    Nothing else may use the output of that convolution.

    Args:
        model: a network of integers, in eval mode.
        *example: arguments of its forward; running it once shows which layer follows which.

    Returns:
        The names of the BatchNorms that are not folded because a code has no counterpart of the opposite sign.
    """
    left = []
    for conv_name, norm_name in _pairs(model, example):
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        assert isinstance(conv, IntegerConv) and isinstance(norm, BATCHNORMS)
        if _fold(conv, norm):
            _take_out(norm, model)
        else:
            left.append(norm_name)
    return left


def _take_out(norm: nn.Module, model: nn.Module) -> None:
    """Replace a BatchNorm by an identity, under each of its names."""
    for parent in list(model.modules()):
        for child in [name for name, module in parent._modules.items() if module is norm]:
            parent._modules[child] = nn.Identity()


def _fold(conv: IntegerConv, norm: _BatchNorm) -> bool:
    """Fold a BatchNorm into a convolution, and return whether that was possible; if not, nothing changes."""
    assert norm.running_var is not None and norm.running_mean is not None
    factor = (norm.running_var + norm.eps).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight
    weight = getattr(conv, "integer_weight", None)
    rows = factor.reshape(-1, *[1] * ((conv.weight if weight is None else weight.codes).ndim - 1))
    if weight is None:
        conv.weight = nn.Parameter(conv.weight * rows, requires_grad=False)  # not in place: another layer may share it
    elif weight.format.oriented:
        weight.scale = not_zero(weight.scale * factor)
        weight.codes = torch.where(rows == 0, 0, weight.codes)
    elif weight.zero_point is not None:
        last, zeros = weight.format.highest, weight.zero_point.expand(factor.shape)
        weight.set_zero_point(torch.where(factor < 0, last - zeros, zeros))
        weight.codes = torch.where(rows < 0, last - weight.codes, weight.codes)
        weight.codes = torch.where(rows == 0, weight.zero_point.reshape(rows.shape), weight.codes)
        weight.scale = not_zero(weight.scale * factor.abs())
    else:
        if weight.format.code_bits < FINE and bool(((rows < 0) & (weight.codes < -weight.format.highest)).any()):
            return False
        weight.codes = torch.where(rows < 0, -weight.codes.clamp(min=-weight.format.highest), weight.codes)
        weight.codes = torch.where(rows == 0, 0, weight.codes)
        weight.scale = not_zero(weight.scale * factor.abs())
    shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    shift = shift * factor
    conv.bias = nn.Parameter(shift if norm.bias is None else shift + norm.bias, requires_grad=False)
    return True


def _returned(out: Any) -> Iterator[int]:
    """Yield the ids of the tensors in a result, whatever objects hold them."""
    for leaf in tree_leaves(out):
        if isinstance(leaf, Tensor):
            yield id(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, type | nn.Module):  # such as a dataclass
            yield from _returned(list(vars(leaf).values()))


class _Uses(TorchFunctionMode):
    """A mode that counts, for each tensor, the functions that compute a tensor from it."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()
        self.alive: list[Any] = []  # so that no two tensors have the same id

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            self.count.update({id(leaf) for leaf in tree_leaves([args, kwargs]) if isinstance(leaf, Tensor)})
            self.alive.append(out)
        return out


def _pairs(model: nn.Module, example: tuple[Any, ...]) -> list[tuple[str, str]]:
    """Return the names (convolution, BatchNorm) where only the BatchNorm uses the output of the convolution.

    Both are called only once.
    """
    made: dict[int, str] = {}
    pairs: list[tuple[str, str, int]] = []
    calls: Counter[str] = Counter()
    handles = []

    for name, module in model.named_modules():
        if isinstance(module, IntegerConv):

            def after(module: nn.Module, args: Any, out: Tensor, name: str = name) -> None:
                made[id(out)] = name
                calls[name] += 1

            handles.append(module.register_forward_hook(after))
        elif type(module) in BATCHNORMS and module.running_var is not None:

            def before(module: nn.Module, args: Any, name: str = name) -> None:
                calls[name] += 1
                if id(args[0]) in made:
                    pairs.append((made[id(args[0])], name, id(args[0])))

            handles.append(module.register_forward_pre_hook(before))
    try:
        with torch.no_grad(), _Uses() as uses:
            uses.count.update(_returned(model(*example)))  # being returned is also a use
    finally:
        for handle in handles:
            handle.remove()
    return [(c, n) for c, n, key in pairs if uses.count[key] == 1 and calls[c] == calls[n] == 1]

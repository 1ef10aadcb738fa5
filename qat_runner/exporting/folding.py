"""BatchNorm folded into the convolution before it, without touching an integer.

BatchNorm in eval mode is y = f (x - mean) + beta with f = gamma / sqrt(variance + eps), one of each a channel. A weight
that is stored as codes takes f into its step sizes: D becomes |f| D, and where f is negative the codes of that channel
change their sign. Two's complement has no counterpart to its lowest code. From 8 bits on the highest one, a step away,
takes its place; of fewer bits a step is too much, so a convolution that would need one keeps its BatchNorm. Step sizes
of an oriented weight have a sign, which takes that of f, and all codes stay. Affine codes and their zero point are
counted from the other end.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from qat_runner.exporting.integer import IntegerConv, not_zero

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

FINE = 8
"""Bits from which on a step more or less does not matter."""


@torch.no_grad()
def fold_batchnorm(model: nn.Module, *example: Any) -> list[str]:
    """Fold every BatchNorm that follows a convolution of integers directly, and alone, into it, in place.

    Args:
        model: of integers, in eval mode.
        *example: arguments of its forward; running it once tells what follows what.

    Returns:
        Names of the BatchNorms that stay, because a code has no counterpart of the other sign.
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
    """Put nothing in its place, under each name that it has."""
    for parent in list(model.modules()):
        for child in [name for name, module in parent._modules.items() if module is norm]:
            parent._modules[child] = nn.Identity()


def _fold(conv: IntegerConv, norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) -> bool:
    """Whether it could be done."""
    assert norm.running_var is not None and norm.running_mean is not None
    factor = (norm.running_var + norm.eps).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight
    weight = getattr(conv, "integer_weight", None)
    rows = factor.reshape(-1, *[1] * ((conv.weight if weight is None else weight.codes).ndim - 1))
    if weight is None:
        conv.weight = nn.Parameter(conv.weight * rows, requires_grad=False)  # another layer may have it, too
    elif weight.format.oriented:
        weight.scale = not_zero(weight.scale * factor)
        weight.codes = torch.where(rows == 0, 0, weight.codes)
    elif weight.zero_point is not None:
        last, zeros = weight.format.highest, weight.zero_point.expand(factor.shape)
        weight.count_from(torch.where(factor < 0, last - zeros, zeros))
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
    """Numbers of the tensors in a result, whatever object holds them."""
    for leaf in tree_leaves(out):
        if isinstance(leaf, Tensor):
            yield id(leaf)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, type | nn.Module):  # such as a dataclass
            yield from _returned(list(vars(leaf).values()))


class _Uses(TorchFunctionMode):
    """Counts the functions that compute something with a tensor."""

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
    """(convolution, BatchNorm) where the one's only output goes to the other and nowhere else, by name."""
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
            uses.count.update(_returned(model(*example)))  # which is used
    finally:
        for handle in handles:
            handle.remove()
    return [(c, n) for c, n, key in pairs if uses.count[key] == 1 and calls[c] == calls[n] == 1]

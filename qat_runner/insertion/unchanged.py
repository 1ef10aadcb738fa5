"""Whether a network computes the same as before: what is compared, how closely, which module is the first to part."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.insertion.modes import evaluating, repeatable
from qat_runner.insertion.tensors import tensors_of

Outputs = dict[tuple[str, int], list[Tensor | None]]
"""Name of a module and number of the call -> what it returned, in order of returning."""


@torch.no_grad()
def computed(model: nn.Module, inputs: Sequence[Any]) -> list[Tensor | None]:
    """What a model returns in eval mode, its tensors in order; random generators come out as they went in."""
    with evaluating(model), repeatable():
        return tensors_of(model(*inputs))


def computed_by_modules(model: nn.Module, inputs: Sequence[Any]) -> Outputs:
    """As `computed`, of all modules, at the price of keeping all that they return."""
    found: Outputs = {}

    def keep(name: str, output: Any) -> None:
        call = sum(key[0] == name for key in found)
        found[name, call] = [None if t is None else t.clone() for t in tensors_of(output)]

    handles = [
        module.register_forward_hook(lambda m, args, output, name=name: keep(name, output))
        for name, module in model.named_modules()
    ]
    try:
        computed(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def difference(before: Sequence[Tensor | None], now: Sequence[Tensor | None], tolerance: float) -> str | None:
    """By how much tensors differ, in words; None if they do not.

    Args:
        before, now: compared one by one, as far as both are tensors.
        tolerance: 0: to the last bit; otherwise how long the difference of two floating tensors may be, compared to the
            first; integers may differ then, since they may stem from comparisons.
    """
    for a, b in zip(before, now, strict=False):
        if a is None or b is None:
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{a.dtype} {list(a.shape)} is {b.dtype} {list(b.shape)}"
        if a.is_meta or (tolerance > 0 and not (a.is_floating_point() or a.is_complex())) or a.numel() == 0:
            continue
        wide = torch.complex128 if a.is_complex() else torch.float64
        x, y = a.to(wide), b.to(wide)
        gap = torch.where((x == y) | (x.isnan() & y.isnan()), 0, x - y)
        if not bool(gap.norm() <= tolerance * x.norm()):
            return f"by up to {float(gap.abs().max()):.3g}, of values up to {float(x.abs().max()):.3g}"
    return None


def first_difference(before: Outputs, now: Outputs, tolerance: float) -> tuple[str, str]:
    """The first module, of those that are in both, whose outputs differ, by name; and by how much."""
    for key, outputs in before.items():
        if key in now and (found := difference(outputs, now[key], tolerance)) is not None:
            return key[0], found
    return "", "in what no module returns"


def tolerance(model: nn.Module) -> float:
    """How far two ways of computing the same attention may part: the root of the precision of the coarsest numbers."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    for device in {p.device.type for p in model.parameters()} - {"meta"}:
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
    rounded = torch.get_float32_matmul_precision() != "highest"  # to ten bits, at the least, in products
    return math.sqrt(max([2**-10 * rounded, *(torch.finfo(dtype).eps for dtype in dtypes)]))

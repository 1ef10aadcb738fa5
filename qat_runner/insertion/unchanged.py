"""Check whether a network still computes the same as before, how closely, and which module is the first to differ."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.insertion.layers import takes_hooks
from qat_runner.insertion.modes import Inputs, call_with_copies, eval_without_trace
from qat_runner.insertion.tensors import tensors_of

Tensors = list[Tensor | None]

Calls = dict[tuple[str, int], tuple[Tensors, Tensors]]
"""Name of a module and number of the call -> what it was given and what it returned, in the order of returning."""


@torch.no_grad()
def computed(model: nn.Module, inputs: Inputs) -> Tensors:
    """Return the tensors of a model's output in eval mode, in order.

    Model, inputs and random generators are left unchanged.
    """
    with eval_without_trace(model):
        return tensors_of(call_with_copies(model, inputs))


def computed_by_modules(model: nn.Module, inputs: Inputs) -> Calls:
    """As `computed`, for all modules; all that they are given and return is kept in memory."""
    found: Calls = {}

    def keep(name: str, given: Any, output: Any) -> None:
        call = sum(key[0] == name for key in found)
        found[name, call] = _copies(given), _copies(output)

    handles = [
        module.register_forward_hook(
            lambda m, args, kwargs, output, name=name: keep(name, [*args, *kwargs.values()], output), with_kwargs=True
        )
        for name, module in model.named_modules()
        if takes_hooks(module)
    ]
    try:
        computed(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _copies(value: Any) -> Tensors:
    return [None if t is None else t.clone() for t in tensors_of(value)]


def difference(before: Tensors, now: Tensors, tolerance: float) -> str | None:
    """Describe by how much tensors differ; None if they do not.

    Args:
        before, now: compared one by one, where both are tensors.
        tolerance: 0: the tensors must be bit-identical. Otherwise the maximum norm of the difference of two
            floating-point tensors, relative to that of the first; integers may differ then, since they may result from
            comparisons.
    """
    for a, b in zip(before, now, strict=False):
        if a is None or b is None:
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{a.dtype} {list(a.shape)} became {b.dtype} {list(b.shape)}"
        if a.is_meta or (tolerance > 0 and not (a.is_floating_point() or a.is_complex())) or a.numel() == 0:
            continue
        wide = torch.complex128 if a.is_complex() else torch.float64
        x, y = a.to(wide), b.to(wide)
        gap = torch.where((x == y) | (x.isnan() & y.isnan()), 0, x - y)
        if not bool(gap.norm() <= tolerance * x[x.isfinite()].norm()):
            return f"differs by up to {float(gap.abs().max()):.3g}, for values up to {float(x.abs().max()):.3g}"
    return None


def first_difference(before: Calls, now: Calls, tolerance: float) -> tuple[str, str] | None:
    """Return the name of the first module that computes something different, and by how much its outputs differ.

    Only calls of modules that are in both records are compared. If the module was already given something different, it
    is the module around it.
    """
    nothing: tuple[Tensors, Tensors] = [], []
    for (name, call), (_, output) in before.items():
        found = difference(output, now.get((name, call), nothing)[1], tolerance)
        if found is None:
            continue
        while name and ((name, call) not in before or not _given_the_same(before, now, (name, call), tolerance)):
            name = name.rpartition(".")[0]
        return name, found
    return None


def _given_the_same(before: Calls, now: Calls, call: tuple[str, int], tolerance: float) -> bool:
    """Whether a call got the same inputs, except those of another dtype or shape: a mask may be numeric or boolean."""
    pairs = zip(before[call][0], now.get(call, ([], []))[0], strict=False)
    alike = [(a, b) for a, b in pairs if a is not None and b is not None and a.dtype == b.dtype and a.shape == b.shape]
    return difference([a for a, _ in alike], [b for _, b in alike], tolerance) is None


def tolerance(model: nn.Module) -> float:
    """Return how far two ways to compute the same attention may differ, relative to the length of an output.

    It is the square root of the precision of the coarsest numbers in use.
    """
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    for device in {p.device.type for p in model.parameters()} - {"meta"}:
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
    rounded = torch.get_float32_matmul_precision() != "highest"  # factors of products keep ten bits or more
    return math.sqrt(max([2**-10 * rounded, *(torch.finfo(dtype).eps for dtype in dtypes)]))

"""Count the products of tensors where PyTorch dispatches them, whatever function or module requests them.

A `TorchDispatchMode` sees each operator that PyTorch executes. Operators that multiply the elements of two tensors and
sum up are counted: matrix products, convolutions, attention, recurrent layers, distances. Element-wise multiplication
is not counted, even if a sum follows. An operator of another library is opaque: it is listed without a count.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from qat_runner.insertion.naming import family, joined_name
from qat_runner.wording import percent

Arguments = Sequence[Any]
"""Positional arguments of an operator."""


@dataclass(frozen=True)
class Product:
    """The products of one operation that a module computes itself, not by modules inside it."""

    module: str
    """name in the model; "" for the model itself"""
    kind: str
    """class of the module"""
    operation: str
    """such as "mm", as in torch.ops.aten; for operators of other libraries "library.operator" """
    macs: int
    """multiply-accumulates in one forward pass of the example; 0 if they are not known"""
    training: bool = False
    """computed in training only"""


@dataclass(frozen=True)
class UnquantizedProducts:
    """Products that are not quantized, of all modules together whose names differ only in numbers."""

    modules: tuple[str, ...]
    kind: str
    operation: str
    share: float
    """of all multiply-accumulates, 0 to 1"""
    known: bool
    """whether the number of multiply-accumulates is known"""
    training: bool

    def __str__(self) -> str:
        where = f"{joined_name(self.modules)} ({self.kind})" if self.modules[0] else "the model itself"
        several = f"{len(self.modules)} modules " if len(self.modules) > 1 else ""
        share = f", {percent(self.share)} of the multiply-accumulates" if self.known else ", of unknown extent"
        return f"{self.operation} in {several}{where}{share}{', in training only' if self.training else ''}"


def rest(products: Iterable[Product], total: int) -> list[UnquantizedProducts]:
    """Summarize products, such as those that are not quantized, for a reader: repeated ones once, the largest first.

    Args:
        products: any.
        total: the number of multiply-accumulates that shares refer to.
    """
    groups: dict[tuple[str, str, str, bool], list[Product]] = {}
    for p in products:
        groups.setdefault((family(p.module), p.kind, p.operation, p.training), []).append(p)
    found = [
        UnquantizedProducts(tuple(p.module for p in group), *key[1:3], macs / max(total, 1), macs > 0, key[3])
        for key, group in groups.items()
        for macs in [sum(p.macs for p in group)]
    ]
    return sorted(found, key=lambda r: -r.share)


class Products(TorchDispatchMode):
    """A mode that adds up the products of tensors that are computed.

    Args:
        owner: returns the name and the class of the module that is running.
    """

    supports_higher_order_operators = True

    def __init__(self, owner: Callable[[], tuple[str, str]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owner = owner
        self.found: Counter[tuple[str, str, str]] = Counter()
        """(module, class, operation) -> multiply-accumulates, 0 if they are not known"""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Arguments = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        library, name = _named(func)
        operation = _operation(library, name)
        if operation is None and torch.is_inference_mode_enabled() and hasattr(func, "decompose"):
            with self:  # outside inference mode, operators arrive decomposed
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if operation is not None and _floats(out):
            of = COUNTED.get(name) if library == "aten" else None
            self.found[*self.owner(), operation] += 0 if of is None else int(of(args, out))
        return out


def _named(func: Any) -> tuple[str, str]:
    """Return the library and the name of an operator, without the marks of variants: "_addmm_" is addmm."""
    if isinstance(func, HigherOrderOperator):
        return ("aten" if func.name() == "flex_attention" else "torch"), func.name()
    library, _, name = func._schema.name.partition("::")
    return library.strip("_"), _FUSED.get(name, name.strip("_"))


def _operation(library: str, name: str) -> str | None:
    """Return the name of a product; None for an operator that is none."""
    if library == "aten":
        return name if name in COUNTED else None
    if library in _WITHOUT_PRODUCTS or f"{library}.{name}" in _WITHOUT_PRODUCTS:
        return None
    return f"{library}.{name}"


def _floats(out: Any) -> bool:
    outputs = out if isinstance(out, tuple | list) else (out,)
    return any(isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex()) for t in outputs)


def _first(out: Any) -> Tensor:
    tensor: Tensor = out[0] if isinstance(out, tuple | list) else out
    return tensor


def _matrices(left: int) -> Callable[[Arguments, Any], int]:
    """Count matrix products: each element of the result is a sum over the last dimension of the operand at `left`."""
    return lambda args, out: _first(out).numel() * args[left].shape[-1]


def _convolution(args: Arguments, out: Any) -> int:
    """Count a convolution of [N, C, ...] with [K, C / groups, ...].

    In a transposed one, each input element is multiplied by the filters of its channel.
    """
    transposed = len(args) > 6 and args[6] is True
    weight: Tensor = args[1]
    return (args[0] if transposed else _first(out)).numel() * weight[0].numel()


def _attention(args: Arguments, out: Any) -> int:
    """Count both products of attention, with [..., H, L, D], [..., H, L', D] and [..., H, L', D']."""
    query, key, value = args[:3]
    return int(query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1]))


def _recurrent(args: Arguments, out: Any) -> int:
    """Count a recurrent layer: each step of each sequence of an input [..., C] is multiplied by all matrices.

    These are in a list of weights, or they are the two arguments after the input.
    """
    lists = [t for a in args if isinstance(a, tuple | list) for t in a if isinstance(t, Tensor)]
    return int(args[0].shape[:-1].numel() * sum(w.numel() for w in lists or args[1:3] if w.ndim == 2))


def _encoder(args: Arguments, out: Any) -> int:
    """Count an encoder layer, or its attention: each step of [N, L, C] is multiplied by all matrices.

    The two products of attention itself are added.
    """
    batch, steps, size = args[0].shape
    weights = sum(t.numel() for t in args if isinstance(t, Tensor) and t.ndim == 2)
    return int(batch * steps * (weights + 2 * steps * size))


_FUSED = {
    "_slow_conv2d_forward": "convolution",
    "convolution_overrideable": "convolution",
    "mkldnn_rnn_layer": "lstm",
    "_cdist_forward": "cdist",
    "_euclidean_dist": "cdist",
    **{
        f"_scaled_dot_product_{which}": "scaled_dot_product_attention"
        for which in (
            "flash_attention",
            "flash_attention_for_cpu",
            "efficient_attention",
            "cudnn_attention",
            "fused_attention_overrideable",
            "attention_math_for_mps",
        )
    },
}
"""Operator for a particular device or case -> the operator in COUNTED that it computes."""

COUNTED: dict[str, Callable[[Arguments, Any], int]] = {
    **dict.fromkeys(
        ("mm", "bmm", "mv", "dot", "vdot", "linear", "mkldnn_linear", "int_mm", "scaled_mm", "grouped_mm"), _matrices(0)
    ),
    **dict.fromkeys(
        ("scaled_grouped_mm", "sparse_mm", "weight_int8pack_mm", "weight_int4pack_mm", "cdist"), _matrices(0)
    ),
    **dict.fromkeys(("addmm", "baddbmm", "addmv", "addmm_activation", "sparse_addmm"), _matrices(1)),
    "addbmm": lambda args, out: args[1].numel() * out.shape[-1],
    **dict.fromkeys(
        ("convolution", "cudnn_convolution", "miopen_convolution", "mkldnn_convolution", "mps_convolution"),
        _convolution,
    ),
    "scaled_dot_product_attention": _attention,
    "flex_attention": _attention,
    "trilinear": lambda args, out: args[0].shape[0] * args[1].numel(),  # as F.bilinear calls it: the weight is second
    **dict.fromkeys(("lstm", "cudnn_rnn", "miopen_rnn"), _recurrent),
    **dict.fromkeys(("native_multi_head_attention", "transformer_encoder_layer_fwd"), _encoder),
}
"""Operator of torch.ops.aten -> its multiply-accumulates, as a function of its arguments and its output."""

_WITHOUT_PRODUCTS = {
    *("prim", "prims", "profiler", "c10d", "c10d_functional", "fsdp", "debugprims", "inductor", "qat_runner"),
    *(f"torchvision.{name}" for name in ("nms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")),
}
"""Libraries of operators, and operators, that multiply no tensors; our own library belongs to quantization."""

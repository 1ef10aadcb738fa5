"""Calls of functions that multiply two tensors, taken apart into the two factors and the computation.

A PyTorch mode sees such a call before it is executed, and can run the same computation with other factors, for example
quantized ones. The layer or attention module that makes the call runs its own code, whatever that is.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Compute = Callable[[Tensor, Tensor], Tensor]
"""The computation of a call, as a function of its two factors."""


class Call(NamedTuple):
    """A call of a function that multiplies two tensors."""

    left: Tensor
    right: Tensor
    compute: Compute
    """runs the same computation with other factors"""
    summed: tuple[int, int] | None
    """for each factor the dimension that is summed over, counted from the end; None if it is not exactly one dimension
    of each, or not known"""


_OTHER_SUMS = (
    F.embedding,
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
)
"""Functions that sum over no dimension, or over several."""

FACTORS: dict[Any, tuple[tuple[int, str], tuple[int, str]]] = {
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__), ((0, "input"), (1, "other"))),
    **dict.fromkeys((torch.bmm, torch.Tensor.bmm, torch.mm, torch.Tensor.mm), ((0, "input"), (1, "mat2"))),
    **dict.fromkeys((torch._grouped_mm, "transformers::grouped_mm_fallback"), ((0, "self"), (1, "mat2"))),
    **dict.fromkeys((torch.baddbmm, torch.Tensor.baddbmm), ((1, "batch1"), (2, "batch2"))),
    torch.addmm: ((1, "mat1"), (2, "mat2")),
    **dict.fromkeys(
        (
            F.linear,
            *_OTHER_SUMS,
        ),
        ((0, "input"), (1, "weight")),
    ),
}
"""Function, or the name of an operator -> position and argument name of each of its two factors."""

MATRICES = (
    *(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm),
    *(torch.baddbmm, torch.Tensor.baddbmm, torch.einsum),
)
"""Functions by which modules multiply tensors that they have computed."""

ATTENTION = F.scaled_dot_product_attention


def parse_call(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    """Return the parts of a call that a mode sees; None if it is not `einsum` or one of FACTORS, with two tensors."""
    if func is torch.einsum:
        return _einsum(args)
    places = FACTORS.get(getattr(func, "_qualified_op_name", func))
    if places is None:
        return None
    left, right = (args[i] if i < len(args) else kwargs.get(name) for i, name in places)
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return None

    def compute(a: Tensor, b: Tensor) -> Tensor:
        own, named = list(args), dict(kwargs)
        for (i, name), factor in zip(places, (a, b), strict=True):
            if i < len(own):
                own[i] = factor
            else:
                named[name] = factor
        out: Tensor = func(*own, **named)
        return out

    return Call(left, right, compute, _summed(func, right))


def _summed(func: Any, right: Tensor) -> tuple[int, int] | None:
    """Return `Call.summed` of a function in FACTORS."""
    if func is F.linear:
        return -1, -1
    if func in _OTHER_SUMS:
        return None
    return -1, -1 if right.ndim == 1 else -2


def _einsum(args: Sequence[Any]) -> Call | None:
    equation, *factors = args
    if len(factors) == 1 and isinstance(factors[0], list | tuple):
        factors = list(factors[0])
    if not isinstance(equation, str) or len(factors) != 2:
        return None
    summed = _summed_letter(equation.replace(" ", ""), [factor.ndim for factor in factors])
    return Call(factors[0], factors[1], lambda a, b: torch.einsum(equation, a, b), summed)


def _summed_letter(equation: str, dims: Sequence[int]) -> tuple[int, int] | None:
    """Return `Call.summed` of an einsum equation whose factors have `dims` dimensions.

    It is the position, in both terms, of the one letter that is absent from the result.
    """
    terms, arrow, out = equation.partition("->")
    left, right = terms.split(",")
    if not arrow:
        out = "".join(letter for letter in set(terms) if terms.count(letter) == 1)
    summed = {*left, *right} - {*out, "."}
    if len(summed) != 1 or not summed <= {*left} & {*right}:
        return None
    (letter,) = summed
    return _place(letter, left, dims[0]), _place(letter, right, dims[1])


def _place(letter: str, term: str, dims: int) -> int:
    """Return the dimension, counted from the end, that a letter of a term with `dims` dimensions refers to.

    An ellipsis in the term covers any number of dimensions.
    """
    before, _, after = term.partition("...")
    return after.index(letter) - len(after) if letter in after else before.index(letter) - dims


def attention(
    scores: Callable[[Tensor, Tensor, Compute], Tensor],
    context: Callable[[Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute `F.scaled_dot_product_attention` by its documented definition, with the two products given.

    Args:
        scores, context: the matrix products of queries and keys, and of probabilities and values.
        query: [..., H, L, D].
        key, value: [..., H or fewer, L', D] and [..., H or fewer, L', D'].
        attn_mask: broadcastable to [..., H, L, L']: boolean, true where a query may attend, or a tensor that is added
            to the scores.
        dropout_p, is_causal, scale, enable_gqa: as in `F.scaled_dot_product_attention`.

    Returns:
        [..., H, L, D']; zeros for a query whose keys are all masked.
    """
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if query.dtype is torch.float16:  # unscaled scores may be too large for it
        found = scores(query, key.transpose(-2, -1), lambda a, b: torch.matmul(a * scale, b))
    else:
        found = scores(query, key.transpose(-2, -1), torch.matmul) * scale
    if is_causal:
        attn_mask = torch.ones(found.shape[-2:], dtype=torch.bool, device=found.device).tril()
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=found.dtype).masked_fill(~attn_mask, -torch.inf)
    if attn_mask is None:
        probabilities = found.softmax(-1)
    else:
        # A fully masked query attends to all keys until the end: replacing a NaN would leave NaN in the gradient.
        nothing = (attn_mask == -torch.inf).all(-1, keepdim=True)
        found = found + attn_mask.masked_fill(nothing, 0)
        probabilities = found.softmax(-1).masked_fill(nothing, 0)
    if dropout_p > 0:
        probabilities = F.dropout(probabilities, dropout_p)
    return context(probabilities, value)

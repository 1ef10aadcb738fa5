"""Calls of functions that multiply two tensors, taken apart: the two factors, and what is computed with them.

A mode of PyTorch sees such a call on its way, and can have the same computed with other factors, quantized ones, say.
What asks for it, a layer or an attention module, runs its own code, whatever that is.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Compute = Callable[[Tensor, Tensor], Tensor]
"""What is computed with two factors."""


class Call(NamedTuple):
    """A call of such a function."""

    left: Tensor
    right: Tensor
    compute: Compute
    """the same with other factors"""
    summed: tuple[int, int] | None
    """the dimension of each that is added up over, from the end; None where that is not one of each, or not known"""


_OTHER_SUMS = (
    F.embedding,
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
)
"""Those that add up over no dimension, or over several."""

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
"""Function, or an operator's name -> where its factors are among its arguments, and what they are called there."""

MATRICES = (
    *(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm),
    *(torch.baddbmm, torch.Tensor.baddbmm, torch.einsum),
)
"""Functions by which modules multiply what they have computed."""

ATTENTION = F.scaled_dot_product_attention


def taken_apart(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    """A call of a function, as a mode sees it, if it is one of two tensors of FACTORS or of `torch.einsum`."""
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
    """See `Call`."""
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
    """See `Call`: where the one letter that is not in the result stands in both terms, of factors of so many `dims`."""
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
    """The dimension of so many that a letter stands for, from the end; dots stand for any number of them."""
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
    """`F.scaled_dot_product_attention`, by its definition there, with two products that are given.

    Args:
        scores, context: matrix products, of queries and keys, and of probabilities and values.
        query: [..., H, L, D].
        key, value: [..., H or fewer, L', D] and [..., H or fewer, L', D'].
        attn_mask: broadcastable to [..., H, L, L']: true where something is looked at, or added to the scores.
        dropout_p, is_causal, scale, enable_gqa: see there.

    Returns:
        [..., H, L, D']; zeros for a query that looks at nothing.
    """
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if query.dtype is torch.float16:  # of which the scores as they are may be too large
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
        # A query that looks at nothing looks at all until the end: NaN that is replaced would be NaN in the gradient.
        nothing = (attn_mask == -torch.inf).all(-1, keepdim=True)
        found = found + attn_mask.masked_fill(nothing, 0)
        probabilities = found.softmax(-1).masked_fill(nothing, 0)
    if dropout_p > 0:
        probabilities = F.dropout(probabilities, dropout_p)
    return context(probabilities, value)

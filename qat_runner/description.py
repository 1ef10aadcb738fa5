"""Holding what was read against a typed description of it: whatever comes from a file is not trusted."""

import functools
from typing import Any

from pydantic import TypeAdapter, ValidationError


def fit(kind: Any, content: object, *, strict: bool = True) -> Any:
    """Content that was read, if it fits a description.

    Args:
        kind: a type, such as a TypedDict or a list of dataclasses; limits are Annotated.
        content: plain values and tensors.
        strict: take nothing for another type; False reads numbers from text.

    Raises:
        ValueError: naming the first key that does not fit, in half a sentence.
    """
    try:
        return _adapter(kind).validate_python(content, strict=strict)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        why = first["msg"].removeprefix("Value error, ")
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {why[:1].lower()}{why[1:]}" if where else f"{why[:1].lower()}{why[1:]}") from None


@functools.cache
def _adapter(kind: Any) -> "TypeAdapter[Any]":
    return TypeAdapter(kind)

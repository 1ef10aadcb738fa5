"""Validating content that was read from a file against a typed description, since files are not trusted."""

import functools
from typing import Any

from pydantic import TypeAdapter, ValidationError


def fit(kind: Any, content: object, *, strict: bool = True) -> Any:
    """Validate content that was read, and return it.

    Args:
        kind: a type, such as a TypedDict or a list of dataclasses; limits are given by Annotated.
        content: plain values and tensors.
        strict: do not convert between types; False parses numbers from strings.

    Raises:
        ValueError: the content does not fit; the message gives the first key that does not, and the reason.
    """
    try:
        return _adapter(kind).validate_python(content, strict=strict)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        why = "unknown key" if first["type"] in _UNKNOWN else first["msg"].removeprefix("Value error, ")
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {why[:1].lower()}{why[1:]}" if where else f"{why[:1].lower()}{why[1:]}") from None


_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
"""pydantic's kinds of error for a key that is not in the description: in a TypedDict, in a dataclass."""


@functools.cache
def _adapter(kind: Any) -> "TypeAdapter[Any]":
    return TypeAdapter(kind)

"""Networks of other libraries, by one word: torchvision/NAME, timm/NAME, hf/FOLDER or hf/NAME."""

from typing import Any

from qat_runner.config.words import PREFIXES, split_word
from qat_runner.errors import ConfigError
from qat_runner.models.libraries.base import Library, Preprocessing
from qat_runner.models.libraries.of_timm import Timm
from qat_runner.models.libraries.of_torchvision import Torchvision
from qat_runner.models.libraries.of_transformers import Transformers

__all__ = ["LIBRARIES", "Library", "Preprocessing", "library_of", "preprocessing_keys"]

LIBRARIES: dict[str, Library] = {library.prefix: library for library in (Torchvision(), Timm(), Transformers())}
"""By the prefix of their words."""
assert tuple(LIBRARIES) == PREFIXES


def library_of(model: str) -> tuple[Library, str] | None:
    """The library and the name that a word means; None: it is no such word."""
    found = split_word(model)
    return None if found is None else (LIBRARIES[found[0]], found[1])


def preprocessing_keys(model: str) -> dict[str, Any]:
    """Keys of `dataset` -> values, as the library of a network describes what its weights were validated on.

    A name of our own is described by torchvision, which publishes its weights.

    Raises:
        ConfigError: there is no such network, or it is not described.
    """
    library, name = library_of(model) or (LIBRARIES["torchvision"], model)
    if library_of(model) is None and model not in library.names():
        raise ConfigError(f"model={model}: no library describes its pictures, or has weights=pretrained for it")
    library.check(name)
    return library.preprocessing(name).keys()

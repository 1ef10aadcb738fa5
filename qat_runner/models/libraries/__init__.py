"""Networks of other libraries, selected by one name: torchvision/NAME, timm/NAME, hf/FOLDER or hf/NAME."""

from typing import Any

from qat_runner.config.model_names import PREFIXES, split_model_name
from qat_runner.errors import ConfigError
from qat_runner.models.libraries.base import Library, Preprocessing
from qat_runner.models.libraries.of_timm import Timm
from qat_runner.models.libraries.of_torchvision import Torchvision
from qat_runner.models.libraries.of_transformers import Transformers

__all__ = ["LIBRARIES", "Library", "Preprocessing", "library_of", "preprocessing_keys"]

LIBRARIES: dict[str, Library] = {library.prefix: library for library in (Torchvision(), Timm(), Transformers())}
"""The libraries by the prefix of their model names."""
assert tuple(LIBRARIES) == PREFIXES


def library_of(model: str) -> tuple[Library, str] | None:
    """Split a model name into its library and the name there; None: the model is not from another library."""
    found = split_model_name(model)
    return None if found is None else (LIBRARIES[found[0]], found[1])


def preprocessing_keys(model: str) -> dict[str, Any]:
    """Return keys of `dataset` for the preprocessing with which a network's published weights were validated.

    The values come from the network's library. For this package's own model names, this is torchvision, which publishes
    their weights.

    Raises:
        ConfigError: there is no such network, or its library does not describe the preprocessing.
    """
    library, name = library_of(model) or (LIBRARIES["torchvision"], model)
    if library_of(model) is None and model not in library.names():
        raise ConfigError(
            f"model={model}: no library describes its image preprocessing or has weights=pretrained for it"
        )
    library.check(name)
    return library.preprocessing(name).keys()

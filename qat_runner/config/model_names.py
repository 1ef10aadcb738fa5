"""Names of networks from other libraries as values of `model`: torchvision/NAME, timm/NAME, hf/FOLDER, hf/NAME.

Hydra interprets the value of a group as the name of a config. So each such name in a command is registered as a config,
which sets only the name, before anything is composed.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser

PREFIXES = ("torchvision", "timm", "hf")

_LONGEST_LABEL = 80  # characters


def split_model_name(model: str) -> tuple[str, str] | None:
    """Split a model name into its prefix and the rest; return None if it is not the name of another library's model."""
    prefix, slash, name = model.partition("/")
    return (prefix, name) if slash and prefix in PREFIXES and name else None


def label(model: str) -> str:
    """Return a model's name in a form that can be part of a file name; for a folder, the last component of its path."""
    found = split_model_name(model)
    if found is None:
        return model
    prefix, name = found
    if prefix == "hf":
        name = name.rstrip("/").rpartition("/")[2]
    return f"{prefix}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)[:_LONGEST_LABEL]}"


def checkpoint_of(model: str) -> str | None:
    """Return the folder, or the name on the hub, of an hf/ name; None for any other model name."""
    found = split_model_name(model)
    return found[1] if found is not None and found[0] == "hf" else None


def register_model_names(overrides: Sequence[str], configs: Path) -> None:
    """Register, in this process, a config for each network of another library among the values of `model`, and DeiT's
    recipe for each network without a recipe of the paper.

    Args:
        overrides: the overrides of one row, or of a whole sweep.
        configs: the folder of the shipped configs, whose `recipe/paper` has recipes for some networks.

    Raises:
        OverrideParseException: Hydra cannot parse an override.
    """
    store = ConfigStore.instance().store
    for model in _models(overrides):
        *folders, name = model.split("/")
        place = "/".join(("", *filter(None, folders)))
        if split_model_name(model) is not None:
            store(group=f"model{place}", name=name, node={"name": model}, package="model")
        published = (configs / "recipe" / "paper" / f"{name}.yaml").is_file()
        if place or not (published or _is_stored("recipe/paper", name)):  # an installed package may have one
            recipe = f"paper/{name}" if published and model.startswith("torchvision/") else "deit"
            store(group=f"recipe/paper{place}", name=name, node={"defaults": [f"/recipe/{recipe}@_here_"]})


def _is_stored(group: str, name: str) -> bool:
    with suppress(OSError):  # the group does not exist
        return f"{name}.yaml" in ConfigStore.instance().list(group)
    return False


def _models(overrides: Sequence[str]) -> Iterator[str]:
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.key_or_group != "model":
            continue
        value = override.value()
        for one in value.list if override.is_choice_sweep() else [value]:  # type: ignore[union-attr]
            yield str(getattr(one, "text", one))

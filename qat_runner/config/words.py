"""Words for the networks of other libraries, as values of `model`: torchvision/NAME, timm/NAME, hf/FOLDER, hf/NAME.

Hydra takes the value of a group for the name of a config. So each word that a command names gets a config of its own,
which says no more than the name, before anything is composed.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser

PREFIXES = ("torchvision", "timm", "hf")

_LONGEST_LABEL = 80  # characters


def split_word(model: str) -> tuple[str, str] | None:
    """The prefix of a word, and the name behind it; None: the model is called by a name of our own."""
    prefix, slash, name = model.partition("/")
    return (prefix, name) if slash and prefix in PREFIXES and name else None


def label(model: str) -> str:
    """A model's name as a part of a file's name: of a folder the last of its path."""
    found = split_word(model)
    if found is None:
        return model
    prefix, name = found
    if prefix == "hf":
        name = name.rstrip("/").rpartition("/")[2]
    return f"{prefix}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name)[:_LONGEST_LABEL]}"


def checkpoint_of(model: str) -> str | None:
    """The folder, or the name on the hub, of an hf/ word; None: it is none."""
    found = split_word(model)
    return found[1] if found is not None and found[0] == "hf" else None


def register_words(overrides: Sequence[str], configs: Path) -> None:
    """Give each word among the values of `model` a config of its own, and each network without a recipe of the paper
    that of DeiT in its place, in this process.

    Args:
        overrides: of one row, or of a whole sweep.
        configs: the folder of the shipped configs, whose `recipe/paper` has recipes for some networks.

    Raises:
        OverrideParseException: what Hydra cannot read.
    """
    store = ConfigStore.instance().store
    for model in _models(overrides):
        *folders, name = model.split("/")
        place = "/".join(("", *filter(None, folders)))
        if split_word(model) is not None:
            store(group=f"model{place}", name=name, node={"name": model}, package="model")
        published = (configs / "recipe" / "paper" / f"{name}.yaml").is_file()
        if place or not (published or _is_stored("recipe/paper", name)):  # an installed package may have one
            recipe = f"paper/{name}" if published and model.startswith("torchvision/") else "deit"
            store(group=f"recipe/paper{place}", name=name, node={"defaults": [f"/recipe/{recipe}@_here_"]})


def _is_stored(group: str, name: str) -> bool:
    with suppress(OSError):  # no such group
        return f"{name}.yaml" in ConfigStore.instance().list(group)
    return False


def _models(overrides: Sequence[str]) -> Iterator[str]:
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.key_or_group != "model":
            continue
        value = override.value()
        for one in value.list if override.is_choice_sweep() else [value]:  # type: ignore[union-attr]
            yield str(getattr(one, "text", one))

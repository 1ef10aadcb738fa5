"""Words for the networks of other libraries, as values of `model`: torchvision/NAME, timm/NAME, hf/FOLDER, hf/NAME.

Hydra takes the value of a group for the name of a config. So each word that a command names gets a config of its own,
which says no more than the name, before anything is composed.
"""

import re
from collections.abc import Iterator, Sequence
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
    """Give each word among the values of `model` a config of its own, in this process.

    Args:
        overrides: of one row, or of a whole sweep.
        configs: the folder of the shipped configs, whose `recipe/paper` has recipes for some networks.

    Raises:
        OverrideParseException: what Hydra cannot read.
    """
    for word in _words(overrides):
        *folders, name = word.split("/")
        place = "/".join(filter(None, folders))
        ConfigStore.instance().store(group=f"model/{place}", name=name, node={"name": word}, package="model")
        published = name if (configs / "recipe" / "paper" / f"{name}.yaml").is_file() else None
        recipe = f"/recipe/paper/{published}" if published and word.startswith("torchvision/") else "/recipe/deit"
        node = {"defaults": [f"{recipe}@_here_"]}
        ConfigStore.instance().store(group=f"recipe/paper/{place}", name=name, node=node)


def _words(overrides: Sequence[str]) -> Iterator[str]:
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.key_or_group != "model":
            continue
        value = override.value()
        for one in value.list if override.is_choice_sweep() else [value]:  # type: ignore[union-attr]
            text = str(getattr(one, "text", one))
            if split_word(text) is not None:
                yield text

"""Reading the YAML of a saved config strictly: only what a run writes, without other features of YAML or OmegaConf."""

from pathlib import Path
from typing import Any

import yaml

LARGEST = 1_000_000
"""Maximum bytes of a file; a config has a few thousand."""


_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's loader reads a config ten times as fast; not every build of PyYAML has it."""


class _PlainLoader(_Loader):  # type: ignore[misc]  # PyYAML has no types
    """Loads YAML of plain keys and values, without duplicate keys, and without aliases, by which a few lines can expand
    to billions of values."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node in self.recursive_objects or node in self.constructed_objects:  # a node with several parents
            raise yaml.constructor.ConstructorError(None, None, "it holds an alias (*)", node.start_mark)
        return super().construct_object(node, deep=deep)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            problem = "a key is not a string" if not isinstance(key, str) else f"the key {key} appears twice"
            if not isinstance(key, str) or key in found:
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            found[key] = self.construct_object(value_node, deep=True)
        return found


# As in OmegaConf's files, what YAML 1.1 would read as a date is a string. (Only OmegaConf reads 1e-4, without a point,
# as a number; here it becomes a number where the schema has one.)
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def plain_yaml(path: Path) -> dict[str, Any]:
    """Read the keys and values of a YAML file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is too large, not UTF-8 or not a mapping, or holds an interpolation or a value that is not
            plain.
        yaml.YAMLError: the file is not YAML, or holds an alias, a duplicate key or a Python tag.
    """
    with open(path, "rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"it is larger than {LARGEST} bytes")
    loader = _PlainLoader(content.decode("utf-8"))
    try:
        found = loader.get_single_data()
        _check(found)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    finally:
        loader.dispose()
    if not isinstance(found, dict):
        raise ValueError("it is not a mapping of keys to values")
    return found


def _check(value: Any) -> None:
    """Reject, once escapes are decoded, what OmegaConf would resolve, and values that only a tag can make: sets,
    bytes."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check(key)
            _check(inner)
    elif isinstance(value, list):
        for inner in value:
            _check(inner)
    elif isinstance(value, str):
        if "${" in value:
            raise ValueError("it holds an interpolation (${...}), which a saved config never does")
    elif not isinstance(value, int | float | None):
        raise ValueError(f"it holds a value of type {type(value).__name__}")

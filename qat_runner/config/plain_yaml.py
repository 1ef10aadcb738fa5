"""Reading the YAML of a saved config as what a run writes, and nothing that YAML or OmegaConf could make of it."""

from pathlib import Path
from typing import Any

import yaml

LARGEST = 1_000_000
"""Bytes of a file; a config has some thousand."""


class _PlainLoader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """YAML of plain keys and values: no aliases, which a few lines can make billions of values of, no key twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "an alias (*) in it", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            problem = "a key that is no text" if not isinstance(key, str) else f"the key {key} twice in it"
            if not isinstance(key, str) or key in found:
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            found[key] = self.construct_object(value_node, deep=True)
        return found


# As OmegaConf writes: what YAML 1.1 takes for a date is text. (1e-4 without a point is a number to OmegaConf alone, and
# becomes one where the schema has one.)
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def plain_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, not UTF-8, no mapping, or holds an interpolation or a value that is not plain.
        yaml.YAMLError: it is no YAML, or holds an alias, a key twice, or a tag of Python's.
    """
    with open(path, "rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"larger than {LARGEST} bytes")
    loader = _PlainLoader(content.decode("utf-8"))
    try:
        found = loader.get_single_data()
        _check(found)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    finally:
        loader.dispose()
    if not isinstance(found, dict):
        raise ValueError("it holds no keys")
    return found


def _check(value: Any) -> None:
    """Refuse, after all escapes are read, what OmegaConf would resolve, and what only a tag makes: sets, bytes."""
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
        raise ValueError(f"it holds a {type(value).__name__}")

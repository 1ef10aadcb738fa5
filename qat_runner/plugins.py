"""Registries of named objects: those of this package, and plugins from other packages.

Plugins are registered in code, `METHODS.register(name, thing)`, or through the entry points of an installed package,
for instance in its pyproject.toml:

    [project.entry-points."qat_runner.clipping"]
    mean_multiple = "my_package.clipping:MeanMultiple"

Entry points are searched only for names that are not built in, and their objects are imported only when used. A config
selects an installed object by name; it cannot give the location of code.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from qat_runner.errors import ConfigError, one_line

T = TypeVar("T")


class PluginError(ConfigError, TypeError):
    """A plugin is of the wrong kind or cannot be imported."""


def installed(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of a group by name, from all installed packages."""
    return {point.name: point for point in _on_path(tuple(sys.path), group)}


def later(place: str) -> EntryPoint:
    """Declare an object of this package that is imported on first use.

    Args:
        place: module and name, as "package.module:Name".
    """
    return EntryPoint(name="", value=place, group="")


@functools.cache
def _on_path(path: tuple[str, ...], group: str) -> tuple[EntryPoint, ...]:
    """Find the entry points on a path. The result is cached, since a search takes milliseconds and configs are checked
    by the hundred.

    Once `importlib_metadata` has been imported, as trackers do, entry points are found as that package's classes, so
    they are converted.
    """
    return tuple(EntryPoint(point.name, point.value, point.group) for point in entry_points(group=group))


class Registry(MutableMapping[str, T], Generic[T]):
    """A mapping from names to objects of one kind. Setting an item registers it for this process; `own` are the names
    of the built-in objects.

    Args:
        kind: the name of the kind in messages, such as "clipping method".
        group: the group of entry points through which installed packages add objects.
        own: the built-in objects, or their locations if they are imported on first use (`later`).
        valid: whether an added object is of this kind; None: any object is accepted.
        of: converts the object of an entry point to the registered object.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        own: Mapping[str, T | EntryPoint],
        valid: Callable[[T], bool] | None = None,
        of: Callable[[Any], T] = lambda named: named,
    ) -> None:
        self.kind, self.group = kind, group
        self.own, self._things = frozenset(own), dict[str, T | EntryPoint](own)
        self._valid, self._of = valid, of

    def register(self, name: str, thing: T) -> T:
        """Register an object under a name that is not built in. An object that was registered under the name before is
        replaced, as when a notebook cell is run again.

        Returns:
            The object.

        Raises:
            ValueError: the name is built in.
            TypeError: the object is of the wrong kind.
        """
        if name in self.own:
            raise ValueError(f"{self.kind} {name!r}: this name is taken")
        self[name] = thing
        return thing

    def __setitem__(self, name: str, thing: T) -> None:
        """Register an object, replacing one of the same name.

        Raises:
            TypeError: the object is of the wrong kind.
        """
        if self._valid is not None and not self._valid(thing):
            raise TypeError(f"{name!r} is not a valid {self.kind}: {thing!r}")
        self._things[name] = thing

    def __delitem__(self, name: str) -> None:
        del self._things[name]

    def __getitem__(self, name: str) -> T:
        """Return the object of a name, importing it if necessary.

        Raises:
            KeyError: the name does not exist.
            PluginError: the plugin of this name is of the wrong kind or cannot be imported.
        """
        thing = self._things[name] if name in self._things else installed(self.group)[name]
        if not isinstance(thing, EntryPoint):
            return thing
        try:
            found = self._of(thing.load())
        except Exception as error:  # another package's module may raise anything
            raise PluginError(f"{self.kind} {name!r}: {thing.value} cannot be imported ({one_line(error)})") from error
        try:
            self[name] = found
        except TypeError as error:
            raise PluginError(str(error)) from error
        return found

    def sound(self) -> Iterator[tuple[str, T]]:
        """Iterate over names and objects, the built-in ones first, importing each. Plugins that raise `PluginError` are
        skipped, so that one that is not used cannot stop the iteration.
        """
        for name in self:
            with suppress(PluginError):
                yield name, self[name]

    def name_of(self, thing: T) -> str | None:
        """Return the name of an object that has already been imported, or None if it is not known."""
        return next((name for name, known in self._things.items() if known is thing), None)

    def __contains__(self, name: object) -> bool:
        return name in self._things or name in installed(self.group)

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys((*self._things, *installed(self.group)))

    def __len__(self) -> int:
        return sum(1 for _ in self)

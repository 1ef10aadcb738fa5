"""Things by name: those of this package, and those of others.

Somebody else's are registered in a line, `METHODS.register(name, thing)`, or come with an installed package whose entry
points name them, for instance in its pyproject.toml:

    [project.entry-points."qat_runner.clipping"]
    mean_multiple = "my_package.clipping:MeanMultiple"

An entry point is looked for only when a name is none of ours, and what it names is imported only when it is wanted. A
config names a thing that is installed, and cannot say where code lies.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from qat_runner.errors import ConfigError, told

T = TypeVar("T")


class PluginError(ConfigError, TypeError):
    """What an installed package names is no such thing, or cannot be imported."""


def installed(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group, by name, of the packages that are installed."""
    return {point.name: point for point in _on_path(tuple(sys.path), group)}


def later(place: str) -> EntryPoint:
    """A thing of this package that is imported when it is wanted.

    Args:
        place: module and name, as "package.module:Name".
    """
    return EntryPoint(name="", value=place, group="")


@functools.cache
def _on_path(path: tuple[str, ...], group: str) -> tuple[EntryPoint, ...]:
    """What is found on a path: to look takes milliseconds, and configs are checked by the hundred.

    Once `importlib_metadata` has been imported, as trackers do, what is found is of that package's classes.
    """
    return tuple(EntryPoint(point.name, point.value, point.group) for point in entry_points(group=group))


class Registry(MutableMapping[str, T], Generic[T]):
    """A mapping from names to things of one kind. Setting an item registers it for this process; `own` are the names of
    this package's.

    Args:
        kind: what messages call one of them, such as "clipping method".
        group: of the entry points of installed packages that add to them.
        own: this package's, or where they are, of what is imported when it is wanted (`later`).
        valid: asked of what others add; None: anything goes.
        of: from what an entry point names to the thing.
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
        """Add a thing under a name that is none of this package's; one that was registered before is replaced, as in a
        notebook that defines it anew.

        Returns:
            The thing.

        Raises:
            ValueError: the name is taken.
            TypeError: it is no such thing.
        """
        if name in self.own:
            raise ValueError(f"{self.kind} {name!r}: this name is taken")
        self[name] = thing
        return thing

    def __setitem__(self, name: str, thing: T) -> None:
        """Add a thing, in the place of one of that name.

        Raises:
            TypeError: it is no such thing.
        """
        if self._valid is not None and not self._valid(thing):
            raise TypeError(f"{name!r} is no {self.kind}: {thing!r}")
        self._things[name] = thing

    def __delitem__(self, name: str) -> None:
        del self._things[name]

    def __getitem__(self, name: str) -> T:
        """Raises:
        KeyError: no such name.
        PluginError: what an installed package names so is no such thing, or cannot be imported.
        """
        thing = self._things[name] if name in self._things else installed(self.group)[name]
        if not isinstance(thing, EntryPoint):
            return thing
        try:
            found = self._of(thing.load())
        except Exception as error:  # whatever somebody's module may raise
            raise PluginError(f"{self.kind} {name!r}: {thing.value} cannot be imported ({told(error)})") from error
        try:
            self[name] = found
        except TypeError as error:
            raise PluginError(str(error)) from error
        return found

    def sound(self) -> Iterator[tuple[str, T]]:
        """Names and things, this package's first, all imported as they come, but for those that `PluginError` is said
        of: no walk through all of them breaks off at one that no one asked for.
        """
        for name in self:
            with suppress(PluginError):
                yield name, self[name]

    def name_of(self, thing: T) -> str | None:
        """The name of a thing that is here already; None: it has none, or not yet."""
        return next((name for name, known in self._things.items() if known is thing), None)

    def __contains__(self, name: object) -> bool:
        return name in self._things or name in installed(self.group)

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys((*self._things, *installed(self.group)))

    def __len__(self) -> int:
        return sum(1 for _ in self)

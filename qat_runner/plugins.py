"""Things by name: those of this package, and those of others.

Somebody else's are registered in a line, `REGISTRY.register(name, thing)`, or come with an installed package whose
entry points name them, for instance in its pyproject.toml:

    [project.entry-points."qat_runner.clipping"]
    mean_multiple = "my_package.clipping:MeanMultiple"

An entry point is looked for only when a name is none of ours, and what it names is imported only when it is wanted. A
config names a thing that is installed, and cannot say where code lies.
"""

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from names to things of one kind.

    Args:
        kind: what messages call one of them, such as "clipping method".
        group: of the entry points of installed packages that add to them.
        own: this package's.
        valid: asked of what others add; None: anything goes.
    """

    def __init__(self, kind: str, group: str, own: Mapping[str, T], valid: Callable[[T], bool] | None = None) -> None:
        self.kind, self.group = kind, group
        self._things: dict[str, T] = dict(own)
        self._valid = valid

    def register(self, name: str, thing: T) -> T:
        """Add a thing, for this process.

        Returns:
            The thing.

        Raises:
            ValueError: the name is taken by another.
            TypeError: it is no such thing.
        """
        if self._things.get(name, thing) is not thing:
            raise ValueError(f"{self.kind} {name!r}: there is one of that name already")
        self._check(name, thing)
        self._things[name] = thing
        return thing

    def forget(self, name: str) -> None:
        """Undo `register`, as in a notebook where a thing is defined anew."""
        del self._things[name]

    def __getitem__(self, name: str) -> T:
        """Raises:
        KeyError: no such name.
        TypeError: what an installed package names so is no such thing, or cannot be imported.
        """
        if name not in self._things:
            point = self._installed()[name]
            try:
                thing: T = point.load()
            except Exception as error:
                raise TypeError(f"{self.kind} {name!r}: {point.value} cannot be imported ({error})") from error
            self._check(name, thing)
            self._things[name] = thing
        return self._things[name]

    def __contains__(self, name: object) -> bool:
        return name in self._things or name in self._installed()

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys((*self._things, *self._installed()))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _installed(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}

    def _check(self, name: str, thing: T) -> None:
        if self._valid is not None and not self._valid(thing):
            raise TypeError(f"{name!r} is no {self.kind}: {thing!r}")

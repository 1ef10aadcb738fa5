"""The runs that a cell of a table averages: they differ only in their seed. All others are left out, with a reason."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from qat_runner.config import differences
from qat_runner.report.runs import Key, Run, recipe_of
from qat_runner.report.starts import start_apart, start_of

Cell = tuple[str, int | None]
"""A row of a table, and its bits; None for full precision."""

Recipe = tuple[str, str | None]
"""What the cells of a table should share: settings besides the method, and starting weights."""


def averaged(
    cells: Mapping[Cell, Sequence[Run]], baselines: Mapping[Key, Key]
) -> tuple[dict[Cell, list[Run]], list[str]]:
    """Split the runs of one network into those that each cell averages, finished or not, and those that are left out.

    Where runs of a quantized cell differ in more than the seed, the cell takes the recipe of which the table has the
    most cells and seeds, and a full-precision cell takes the runs that most of these runs are compared with. Of equals,
    the first counts.

    Args:
        cells: all runs of each cell, in the order of `by_precedence`.
        baselines: key of a run -> key of the full-precision run that it is compared with.

    Returns:
        The averaged runs of each cell, and the places of the other runs, each with its differences in parentheses.
    """
    recipes: Counter[Recipe] = Counter()
    for (_, bits), runs in cells.items():
        for some in _groups(_finished(runs) or runs) if bits is not None else ():
            recipes[_recipe(some)] += len(some)
    order = [recipe for recipe, _ in recipes.most_common()]
    quantized = {
        cell: _choose(runs, lambda some: -order.index(_recipe(some)))
        for cell, runs in cells.items()
        if cell[1] is not None
    }
    compared = Counter(baselines.get(run.key) for runs in quantized.values() for run in runs)
    chosen = {
        cell: quantized[cell] if cell in quantized else _choose(runs, lambda some: sum(compared[r.key] for r in some))
        for cell, runs in cells.items()
    }
    return chosen, [why for cell, runs in cells.items() for why in _left_out(runs, chosen[cell])]


def _finished(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.summary is not None]


def _recipe(some: Sequence[Run]) -> Recipe:
    return str(recipe_of(some[0])), start_of(min(some, key=lambda run: run.seed).config)


def _groups(runs: Sequence[Run]) -> list[list[Run]]:
    """Group runs that differ only in their seed, and in the weights that belong to the seed; one run for each seed."""
    groups: dict[tuple[str, int | str | None], dict[int, Run]] = {}
    for run in runs:
        starts = dict.fromkeys((r.seed, start_of(r.config)) for r in runs if r.setting == run.setting)
        own = len({start for _, start in starts}) == len(starts)
        of_seed = [start for seed, start in starts if seed == run.seed]
        start = of_seed.index(start_of(run.config)) if own else start_of(run.config)
        groups.setdefault((str(sorted(run.setting.items())), start), {}).setdefault(run.seed, run)
    return [list(group.values()) for group in groups.values()]


def _choose(runs: Sequence[Run], rank: Callable[[Sequence[Run]], int]) -> list[Run]:
    """Return the group of runs of the highest rank, or else of the most seeds.

    An unfinished run is in it if it has a new seed of the finished ones, or if no run of the cell is finished.
    """
    finished = _finished(runs)
    chosen: list[Run] = max(_groups(finished or runs), key=lambda some: (rank(some), len(some)), default=[])
    for run in runs[len(finished) :] if finished else ():
        if _groups([*chosen, run]) == [[*chosen, run]]:
            chosen = [*chosen, run]
    return chosen


def _left_out(runs: Sequence[Run], chosen: Sequence[Run]) -> list[str]:
    keys, seeds = {run.key for run in chosen}, {run.seed: run for run in chosen}
    out = [run for run in runs if run.key not in keys]
    return [f"{_place(run)} ({_why(run, chosen[0], seeds.get(run.seed))})" for run in out]


def _why(run: Run, first: Run, twin: Run | None) -> str:
    """Return how a run differs from those that are averaged, of which `twin` has the same seed."""
    if changed := differences(first.setting, run.setting):
        return ", ".join(changed)
    if twin is None or start_apart(twin.config, run.config):
        return "weights"
    return f"repeats {_place(twin)}"


def _place(run: Run) -> str:
    return run.text.removesuffix(",")

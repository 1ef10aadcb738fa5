"""What runs start from: which of them may be held against one another, and when a start belongs to its seed."""

from collections.abc import Iterable

from qat_runner.config import BASELINE, Config


def start_of(config: Config) -> str | None:
    """The weights that a run starts from: their content, or in a word, whatever the seed, those of its baseline.

    None: it starts afresh.
    """
    return config.weights if config.weights in (None, BASELINE) else config.content(config.weights)


def start_apart(one: Config, other: Config) -> bool:
    """Whether two runs start from different weights; one that starts afresh has none to differ in."""
    starts = start_of(one), start_of(other)
    return None not in starts and starts[0] != starts[1]


def each_seed_has_its_own(configs: Iterable[Config]) -> bool:
    """Whether runs start from several weights, other ones for each seed: so that these are a matter of seeds."""
    pairs = {(config.seed, start_of(config)) for config in configs}
    seeds, starts = {seed for seed, _ in pairs}, {start for _, start in pairs}
    return 1 < len(pairs) == len(seeds) == len(starts)

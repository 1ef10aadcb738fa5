"""The weights that runs start from: which runs may be compared, and when each seed has its own weights."""

from collections.abc import Iterable

from qat_runner.config import BASELINE, Config


def start_of(config: Config) -> str | None:
    """Return the weights that a run starts from, as a fingerprint of their content, or "baseline" for every seed's own.

    None if the run starts from scratch.
    """
    return config.weights if config.weights in (None, BASELINE) else config.content(config.weights)


def start_apart(one: Config, other: Config) -> bool:
    """Return whether two runs start from different weights; False if one of them starts from scratch."""
    starts = start_of(one), start_of(other)
    return None not in starts and starts[0] != starts[1]


def each_seed_has_its_own(configs: Iterable[Config]) -> bool:
    """Return whether each seed has its own starting weights, so that these vary with the seed only."""
    pairs = {(config.seed, start_of(config)) for config in configs}
    seeds, starts = {seed for seed, _ in pairs}, {start for _, start in pairs}
    return 1 < len(pairs) == len(seeds) == len(starts)

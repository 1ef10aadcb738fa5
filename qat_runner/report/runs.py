"""Find the runs in a folder of run folders, and the row of a table that each of them is."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from qat_runner.config import (
    CONFIG_FILE,
    LIMITS,
    Config,
    Mode,
    clipping_label,
    differences,
    gradient_label,
    identity,
    read_config,
    run_name,
)
from qat_runner.config.identities import OPTIONS_OF_LABEL
from qat_runner.errors import ConfigError, UnreadableError
from qat_runner.policy import FULL_PRECISION
from qat_runner.report.differing import Configured, processes_of, settings_of
from qat_runner.report.starts import each_seed_has_its_own, start_apart
from qat_runner.report.tables import Result
from qat_runner.runs.folder import RunFolder
from qat_runner.runs.records import SUMMARY, Summary
from qat_runner.runs.status import status

log = logging.getLogger("qat_runner")


Key = tuple[Path, int | None]
"""The folder of a run, or a table of results and a line of it."""


def key_of(folder: Path, line: int | None) -> Key:
    """Return a key that is unique to a run; lines of a table share its file."""
    return folder.resolve(), line


def place_of(key: Key) -> Path:
    """Return the folder of runs, or the table of results, that contains a run."""
    folder, line = key
    return folder.parent if line is None else folder


@dataclass(frozen=True)
class Run:
    """A run folder, or a line of a table of results."""

    folder: Path
    """for a line of a table: the file"""
    config: Config
    model: str
    dataset: str
    mode: str
    weight_bits: int
    row: str | None
    """name of the run's row (configs/row), e.g. "octav_ste"; None if it is no row of a table"""
    seed: int
    setting: dict[str, Any]
    """all settings that decide the result, with `processes`, except the seed, and the weights, which may depend on the
    seed"""
    summary: Summary | None
    """the content of summary.json; None while the run is unfinished"""
    line: int | None = None
    """line in a table of results; None for a run folder"""

    @property
    def key(self) -> Key:
        """The unique key of the run, see `key_of`."""
        return key_of(self.folder, self.line)

    @property
    def processes(self) -> int:
        """The number of processes that trained the run; 1 while it is unfinished."""
        return processes_of(self.config, self.summary or {})

    @property
    def place(self) -> Path:
        """The folder of runs, or the table of results, that contains the run."""
        return place_of(self.key)

    @property
    def result(self) -> Result:
        return Result(self.config, self.summary or {}, self.place, self.folder if self.line is None else None)

    @property
    def text(self) -> str:
        """The location of the run, in words."""
        return str(self.folder) if self.line is None else f"{self.folder}, line {self.line},"


def configs_in(folder: Path) -> tuple[dict[Path, Config], list[UnreadableError]]:
    """Return the run folders in a folder, by name, with their configs, and the errors of those that cannot be read."""
    found: dict[Path, Config] = {}
    unreadable = []
    for path in sorted(folder.glob(f"*/{CONFIG_FILE}")):
        try:
            found[path.parent] = read_config(path)
        except UnreadableError as error:
            unreadable.append(error)
    return found, unreadable


def find_runs(folder: Path, wanted: Callable[[Summary | None], bool] = lambda summary: True) -> list[Run]:
    """Return the runs in a folder of run folders, finished or not, by name; warn of those that cannot be read.

    Args:
        folder: folder of run folders.
        wanted: receives a run's summary (None while there is none) and returns whether to read the run; all by default.
    """
    return runs_and_errors(folder, wanted)[0]


def runs_and_errors(
    folder: Path, wanted: Callable[[Summary | None], bool] = lambda summary: True
) -> tuple[list[Run], list[str]]:
    """Return the same as `find_runs`, and the errors of the runs that cannot be read; warn of these."""
    found, unreadable = [], []
    for file in sorted(folder.glob(f"*/{CONFIG_FILE}")):
        path = file.parent
        try:
            summary = SUMMARY.read(path)
            if not wanted(summary):
                continue
            config = read_config(file)
        except UnreadableError as error:
            unreadable.append(str(error))
            continue
        found.append(run_of(path, config, summary))
    for why in unreadable:
        log.warning(f"{why}: left out")
    return found, unreadable


def full_precision_in(folder: Path) -> list[Result]:
    """Return the finished full-precision runs in a folder of run folders."""

    return [run.result for run in find_runs(folder, _may_be_full_precision)]


def full_precision_of_searches(folder: Path) -> list[Result]:
    """Return the full-precision networks that the searches for bit-widths in a folder of run folders measured."""
    found = []
    for probes in sorted(RunFolder(path).probes for path in folder.glob("*/")):
        results = [run.result for run in find_runs(probes, _may_be_full_precision)]
        found += [result._replace(place=folder.resolve(), of_search=True) for result in results]
    return found


def _may_be_full_precision(summary: Summary | None) -> bool:
    """Return whether a run is finished and may have no quantization, by its summary alone, which is read much faster
    than the config."""
    return summary is not None and summary.get("weight_bits", FULL_PRECISION) == FULL_PRECISION


def not_finished(folders: Iterable[Path]) -> list[str]:
    """Return a sentence that lists run folders without a result, each with its state; empty if there are none."""
    unfinished = [f"{folder.resolve().name} ({status(folder).state})" for folder in folders]
    return [f"Not finished: {', '.join(unfinished)}."] if unfinished else []


class _Configured(Protocol):
    @property
    def config(self) -> Config: ...


class _Recorded(_Configured, Protocol):
    @property
    def folder(self) -> Path: ...

    @property
    def summary(self) -> Summary | None: ...


R = TypeVar("R", bound=_Configured)
S = TypeVar("S", bound=_Recorded)


def by_precedence(runs: Iterable[S]) -> list[S]:
    """Return the runs so that of equal ones, the first counts: finished runs come first, and of these the runs whose
    folders have the name that `qat-run` gives them. The order is kept otherwise."""
    return sorted(runs, key=lambda run: (run.summary is None, run.folder.name != run_name(run.config)))


def selected(runs: Sequence[R], dataset: str | None, model: str | None) -> list[R]:
    """Return the runs of a data set and a network; None selects all.

    Raises:
        ConfigError: there is no such run; the message lists what there is.
    """
    for key, wanted in (("dataset", dataset), ("model", model)):
        names = [getattr(run.config, key).name for run in runs]
        if wanted is not None and wanted not in names:
            raise ConfigError(f"--{key} {wanted}: there are runs of {', '.join(sorted({*names})) or 'none'}")
        runs = [run for run, name in zip(runs, names, strict=True) if wanted in (None, name)]
    return list(runs)


def check_seeds(runs: Sequence[Run]) -> None:
    """Raise an error if runs differ in more than their seed and the weights that belong to the seed.

    Raises:
        ConfigError: names two such runs and the keys in which they differ.
    """
    own = each_seed_has_its_own(run.config for run in runs)
    seeds: dict[int, Run] = {}
    for run in runs:
        first, twin = runs[0], seeds.setdefault(run.seed, run)
        changed = differences(first.setting, run.setting)
        changed += ["weights"] if not own and start_apart(first.config, run.config) else []
        if changed or twin is not run:
            why = f"differ in {', '.join(changed)}" if changed else "have the same seed"
            raise ConfigError(
                f"{(first if changed else twin).text} and {run.text} would share a cell of the table, but {why}; "
                f"move one of them elsewhere"
            )


OF_A_METHOD = ("clipping.", "gradient.", "oscillations.")
"""Prefixes of keys that the name of a method describes, except the keys of `clipping` that `recipe_of` keeps."""

BESIDE_A_METHOD = (
    *("seed", "weights", "weight_bits", "activation_bits", *LIMITS, "max_drop", "noise_batches", "backend"),
    "log_excess_mse",
    *("format", "weight_format", "activation_format", "weight_range", "activation_range", "activation_granularity"),
)
"""Keys that may differ between compared methods: shown beside the name, part of it, or without influence on results."""


def recipe_of(run: Configured) -> dict[str, Any]:
    """Return the settings that runs of compared methods should share: network, data, training, and what is quantized.

    Settings that only some methods have, such as a teacher, are included if the run uses them.
    """
    return {
        key: value
        for key, value in settings_of(run).items()
        if value != []
        and key not in BESIDE_A_METHOD
        and (not key.startswith(OF_A_METHOD) or key in ("clipping.eval_mode", "clipping.sync"))
    }


def run_of(folder: Path, config: Config, summary: Summary | None, line: int | None = None) -> Run:
    """Return the run of a config in a folder or on a line of a table, with its summary."""
    return Run(
        folder,
        config,
        config.model.name,
        config.dataset.name,
        config.mode,
        config.weight_bits,
        row_of(config),
        config.seed,
        {key: value for key, value in identity(config).items() if key not in ("seed", "weights")}
        | {"processes": processes_of(config, summary or {})},
        summary,
        line,
    )


def row_of(config: Config) -> str | None:
    """Return the row of the paper's tables that a run is; None if it has what no row has, such as per-layer bits."""
    if config.rules or config.allocated or config.remedies or not _usual(config):
        return None
    if config.quantization.full_precision:
        trained = dict.fromkeys((Mode.scratch, Mode.finetune), "full_precision")
        return {Mode.evaluate: "pretrained", **trained}.get(config.mode)
    if config.weight_bits != config.activation_bits:
        return None
    label = clipping_label(config).replace("-", "_").replace(".", "_").replace("percentile", "percentile_")
    if config.gradient.name != "mph" and not config.clipping.learned:
        label += f"_{config.gradient.name}"
    return f"{label}_distilled" if config.distilling else label


def _usual(config: Config) -> bool:
    """Return whether the methods of a run have their default options, except for those that the label shows."""
    if config.quantization.full_precision:
        return True
    method = config.clipping_in_mode.method
    named = {name: value for name, value in method.options.items() if name in OPTIONS_OF_LABEL}
    return method == type(method)(**named) and gradient_label(config) in ("own", config.gradient.name)

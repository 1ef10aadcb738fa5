"""Tables of results: the summaries of runs in one CSV file, with their configs, to archive with a paper."""

import csv
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qat_runner.config import Config, clipping_label, gradient_label, read_config, run_name
from qat_runner.config.identities import CONFIG_FILE
from qat_runner.errors import ConfigError
from qat_runner.report.runs import Key, Run, not_finished, run_of, runs_and_errors
from qat_runner.runs.files import CsvFile, write_text
from qat_runner.runs.records import ResultRow, Summary

log = logging.getLogger("qat_runner")

CONFIGS = "configs"
"""Name of the folder of configs next to the table."""


def write_results(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write results.csv, with a line for each finished run, and one config for all seeds of each setting.

    Args:
        runs: from run folders or tables of results; unfinished runs get no line, and a warning names them.
        folder: created if necessary; files with other names in it are kept.

    Returns:
        The written files, the table first.
    """
    finished = [(run, run.summary) for run in runs if run.summary is not None]
    for why in not_finished(run.folder for run in runs if run.summary is None):
        log.warning(f"{why} They have no line.")
    names: dict[str, Run] = {}
    lines = []
    for run, summary in sorted(finished, key=lambda pair: pair[0].seed):
        names.setdefault(_any_seed(run.config), run)
        figures = {key: value for key, value in summary.items() if key != "run_dir"}
        config = run_name(names[_any_seed(run.config)].config)
        lines.append(figures | {"remedies": "+".join(summary.get("remedies", [])), "config": config})
    (folder / CONFIGS).mkdir(parents=True, exist_ok=True)
    table = folder / "results.csv"
    write_text(table, _csv(sorted(lines, key=lambda line: (line["config"], line["seed"]))))
    paths = [folder / CONFIGS / f"{run_name(run.config)}.yaml" for run in names.values()]
    for path, run in zip(paths, names.values(), strict=True):
        write_text(path, _config_of(run))
    return [table, *sorted(paths)]


def _config_of(run: Run) -> str:
    """Return a run's config as YAML: the file in its folder; for a line of a table, as this version writes it."""
    if run.line is None:
        return (run.folder / CONFIG_FILE).read_text()
    return OmegaConf.to_yaml(OmegaConf.structured(run.config))


def _any_seed(config: Config) -> str:
    return run_name(replace(config, seed=0))


def _csv(lines: Sequence[dict[str, Any]]) -> str:
    columns = dict.fromkeys(key for line in lines for key in line)
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, [key for key in columns if any(line.get(key) not in ("", None) for line in lines)])
    writer.writeheader()
    writer.writerows({key: line.get(key) for key in writer.fieldnames} for line in lines)
    return out.getvalue()


def read_results(file: Path) -> list[Run]:
    """Return the runs of a CSV file of results that `write_results` wrote; warn of lines without a config.

    Args:
        file: each line has the content of a summary.json; the configs are in a folder `configs` next to the file. A
            line names its config in the column `config`; without that column, it is the config whose model, data
            set, method and bits are those of the line. A config serves all seeds.

    Raises:
        UnreadableError: a cell does not fit; the message names line and column.
    """
    return _lines_and_errors(file)[0]


def _lines_and_errors(file: Path) -> tuple[list[Run], list[str]]:
    """Return the same as `results_and_errors`, and warn of the lines without a config."""
    found, errors = results_and_errors(file)
    for error in errors:
        log.warning(f"{error}: left out")
    return found, errors


def results_and_errors(file: Path) -> tuple[list[Run], list[str]]:
    """Return the same as `read_results`, and the errors of the lines without a config."""
    configs = {path.stem: read_config(path) for path in sorted((file.parent / CONFIGS).glob("*.yaml"))}
    rows: list[Summary] = CsvFile[Summary](file.name, ResultRow).read(file.parent)
    found, errors = [], []
    for number, row in enumerate(rows, 2):
        some = list(_configs_of(row, configs))
        if len(some) == 1:
            found.append(run_of(file, replace(some[0], seed=row["seed"]), row, number))
        else:
            errors.append(f"{file}: line {number}: {len(some)} configs of {file.parent / CONFIGS} match")
    return found, errors


def runs_at(places: Sequence[Path]) -> list[Run]:
    """Return the runs in folders of runs and in tables of results, each once, however often it is named.

    Raises:
        ConfigError: a place is neither of these (for example, it is a run's own folder), or holds no run.
        UnreadableError: as for `read_results`.
    """
    return runs_and_errors_at(places)[0]


def runs_and_errors_at(places: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Return the same as `runs_at`, and the errors of runs and lines that are left out; warn of these."""
    found: dict[Key, Run] = {}
    errors: list[str] = []
    for place in {place.resolve(): place for place in places}.values():
        if not place.exists():
            raise ConfigError(f"{place}: no such folder of runs")
        if (place / CONFIG_FILE).is_file():
            raise ConfigError(f"{place}: is a run, not a folder of runs; pass {place.resolve().parent}")
        runs, some = runs_and_errors(place) if place.is_dir() else _lines_and_errors(place)
        if not runs:
            raise ConfigError(f"{place}: holds no run of qat-run")
        found |= {run.key: run for run in runs}
        errors += some
    return list(found.values()), errors


def _configs_of(row: Summary, configs: dict[str, Config]) -> Iterator[Config]:
    named = row.get("config")
    words = [row.get(key, default) for key, default in _WORDS.items()]
    for name, config in configs.items():
        if named == name or (named is None and words == _words_of(config)):
            yield config


_WORDS: dict[str, object] = {
    **dict.fromkeys(("model", "dataset", "mode", "clipping", "gradient", "weight_bits", "activation_bits")),
    "distilled": False,
    "remedies": [],
}
"""Keys of a summary that identify its config, with the values to assume for missing keys."""


def _words_of(config: Config) -> list[object]:
    words = config.model.name, config.dataset.name, str(config.mode), clipping_label(config), gradient_label(config)
    return [*words, config.weight_bits, config.activation_bits, config.distilling, config.remedy_labels]

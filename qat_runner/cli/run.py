"""qat-run: train, retrain or evaluate a quantized network.

    qat-run model=resnet50 bits=4
    qat-run -m bits=4,8 clipping=octav,max
    qat-run -m --detach bits=4,8 seed=0,1,2                      continues without this shell
    qat-run -m hydra/launcher=slurm bits=4,8 seed=0,1,2          one job per row
    torchrun --nproc-per-node 8 -m qat_runner model=resnet50 bits=4
    qat-run --help

All rows of a command are composed and checked before the first one starts. Exit codes: 0 success; 1 a run failed; 2 the
command cannot be carried out as given, and nothing was left behind.
"""

import logging
import os
import re
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import qat_runner
from qat_runner import ranks
from qat_runner.cli.explain import explain
from qat_runner.cli.jobs import Outcome, Row, launch, wait_for_slurm
from qat_runner.cli.terminal import on_terminal
from qat_runner.config import check_keys_of_training, config_dir, differences, from_hydra, identity, register
from qat_runner.config.composing import (
    HYDRA_VERSION_BASE,
    compose_checked,
    compose_config,
    freed,
    given,
    shipped_configs,
)
from qat_runner.errors import BusyError, ConfigError, QatError, StoppedError, UnreadableError, os_error_message
from qat_runner.runs.records import SUMMARY, Summary
from qat_runner.runs.requested_runs import record_requested, remove_requested

_MULTIRUN = ("-m", "--multirun")
_DETACH = "--detach"
_HERE = "basic"
"""The option of hydra/launcher that runs the rows in this process, one after the other."""

_COMPLETION = re.compile("(install|uninstall|query)=(bash|fish|zsh)")
"""The arguments of --shell-completion that Hydra accepts."""

log = logging.getLogger("qat_runner")


def main(argv: Sequence[str] | None = None, command: str = "qat-run") -> int:
    """Run the command, whose name starts each error message; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if "--version" in args:  # otherwise Hydra prints its own version
        print(f"{command} {qat_runner.__version__}")
        return 0
    sweep = any(arg in _MULTIRUN for arg in args)
    with on_terminal(logging.INFO if sweep else logging.DEBUG):
        return _carry_out(args, sweep, partial(_fail, command))


def _carry_out(args: list[str], sweep: bool, fail: Callable[[str, int], int]) -> int:
    main_process = ranks.is_main()
    detach = _DETACH in args
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors, which are reported in one sentence below
    outcome = Outcome()
    rows: dict[Path, Row] = {}
    asked: list[Path] = []
    made: list[Path] = []
    code = 0
    try:
        typed = [arg for arg in args if arg != _DETACH]
        args = _arranged([_renamed(_with_home(arg)) for arg in typed])
        if "bits=auto" in typed and (own := [arg for arg in typed if arg.startswith("policy=")]):
            _refuse(f"bits=auto: is short for policy=auto, so it cannot be combined with {own[0]}")
        register()
        args = _with_overrides(args, _rows_of_experiment(args, sweep))
        args = _with_overrides(args, given(_parsed(args).overrides))
        if ranks.launched() and (detach or any(arg.startswith("hydra/launcher=") for arg in args)):
            _refuse("torchrun: cannot be combined with --detach or hydra/launcher, which every process would start")
        rows = _check_all(args)
        if sweep and main_process:
            made = record_requested(rows)
            asked = list(rows)
        if detach and rows:
            return _detach(typed, next(iter(rows)).parent)
        with _group(rows):
            _run_all(args, rows, outcome)
        if main_process:
            _print_results(rows, outcome.done)
    except (HydraException, OmegaConfBaseException) as error:
        code = fail(explain(error, config_dir()), ConfigError.exit_code)
    except QatError as error:
        code = fail(str(error), error.exit_code)
    except SystemExit as stop:  # after flags such as --help
        code = int(stop.code or 0)
    except BrokenPipeError:  # of the terminal, not of a folder
        raise
    except OSError as error:  # from the folder of runs, before a run starts
        code = fail(os_error_message(error), 1)
    except KeyboardInterrupt:
        again = "the same command"
        if any(row.config.overwrite for row in rows.values()):
            again += " without overwrite=true"
        code = fail(f"interrupted; {again} resumes from the last checkpoint", 130)
    for failure in outcome.failures:
        wait_for_slurm(failure)
    for sentence, failed in dict.fromkeys((str(failure), failure.exit_code) for failure in outcome.failures):
        code = max(code, fail(sentence, failed))
    if earlier := [folder for folder in outcome.left if rows[folder].config.overwrite and folder.exists()]:
        more = f" and {len(earlier) - 1} more" if len(earlier) > 1 else ""
        fail(f"{earlier[0]}{more}: had not started; the earlier run still exists, and overwrite=true replaces it", 0)
    if code == ConfigError.exit_code:
        remove_requested(asked, made)
    return code


def _group(rows: Mapping[Path, Row]) -> AbstractContextManager[None]:
    """Return the context of one process group for all rows, since processes can form a group only once."""
    if not ranks.launched():
        return nullcontext()
    from qat_runner import distributed

    return distributed.group(max((row.config.distributed_timeout for row in rows.values()), default=600))


def _renamed(arg: str) -> str:
    """Return an argument with the current names of the schema."""
    if arg == "bits=auto":
        return "policy=auto"
    if arg.startswith("bits=") and "auto" in arg.split("=")[1].split(","):
        raise ConfigError(f"{arg}: auto cannot be combined with other values; sweep over a limit instead: budget=3,4")
    if not arg.startswith("+scale="):
        return freed(arg)
    renamed = arg.replace("+scale=", "+stand_in=", 1)
    log.info(f"{arg} has been renamed to {renamed}")
    return renamed


def _parsed(args: Sequence[str]) -> Namespace:
    """Parse flags and overrides in any order; raises ConfigError if Hydra does not have a flag."""
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    return parser.parse_intermixed_args(args)


def _arranged(args: Sequence[str]) -> list[str]:
    """Reorder arguments that users may give in any order: overrides before flags, since Hydra's parser requires them to
    be adjacent, and an experiment before the overrides that change it."""
    overrides = _parsed(args).overrides
    flags = [*args]
    for override in overrides:
        flags.remove(override)
    return [*sorted(overrides, key=_rank), *flags]


def _rank(override: str) -> int:
    return 0 if override.startswith("+experiment=") else 1 if override.startswith("+stand_in=") else 2


def _with_overrides(args: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """Insert more overrides into arranged arguments."""
    at = next((i for i, arg in enumerate(args) if arg.startswith("-")), len(args))
    return [*args[:at], *overrides, *args[at:]]


def _shows(parsed: Namespace) -> bool:
    """Return whether Hydra only shows something and no run is started."""
    return any((parsed.help, parsed.hydra_help, parsed.cfg, parsed.info, parsed.shell_completion))


def _with_home(arg: str) -> str:
    """Expand `~` in `key=~/x` like a shell, since Hydra's grammar does not have this character."""
    key, equals, value = arg.partition("=")
    return (
        key
        + equals
        + re.sub(
            r"(?:(?<![^,\[])|(?<=^hf/)|(?<=,hf/))~\w*(?=[/,\]]|$)", lambda found: os.path.expanduser(found[0]), value
        )
    )


def _rows_of_experiment(args: Sequence[str], multirun: bool) -> list[str]:
    """Return the overrides of an experiment's `sweep` key, except for keys that the command line sets.

    Hydra has its own key for this, but raises an error if the command line sets the same key.
    """
    chosen = [arg for arg in args if arg.startswith(("+experiment=", "+stand_in="))]
    if not chosen:
        return []
    if not chosen[0].startswith("+experiment="):
        raise ConfigError(f"{chosen[0].lstrip('+')}: needs +experiment=NAME, the experiment whose data it replaces")
    for arg in chosen:
        if "," in arg:
            raise ConfigError(f"{arg.lstrip('+')}: must be a single one, since each has its own rows")
    found = compose_config(chosen)
    given = {arg.lstrip("+~").partition("=")[0] for arg in args}
    if "policy=auto" in args or "mode=allocate" in args:
        given |= {"bits", "weight_bits", "activation_bits"}  # these are chosen by the run
    rows = []
    for key, values in found.sweep.items():
        if key.lstrip("+") not in given:
            stand_in = dict.fromkeys(found.standins.get(value, value) for value in values.split(","))
            rows.append(f"{key}={','.join(stand_in)}")
    if not multirun and any("," in row for row in rows):
        if _shows(_parsed(args)):  # show what its rows have in common
            return [row for row in rows if "," not in row]
        raise ConfigError(f"{chosen[0].lstrip('+')}: has several rows; qat-run -m runs them all")
    return rows


def _fail(command: str, sentence: str, code: int) -> int:
    who = command if ranks.is_main() else f"{command}, process {os.environ['RANK']}"
    line = re.sub(r"[\x00-\x1f\x7f]", lambda found: repr(found[0])[1:-1], sentence)  # a value may contain these
    print(f"{who}: {line}", file=sys.stderr)
    return code


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"{message}; qat-run --help lists all keys and flags")


def _check_all(args: Sequence[str]) -> dict[Path, Row]:
    """Compose and check all rows of the command before any work; returns run folder -> row."""
    parsed = _parsed(args)
    for flag in ("config_dir", "config_name", "config_path", "experimental_rerun"):
        if getattr(parsed, flag) is not None:
            _refuse(f"--{flag.replace('_', '-')}: is not supported; a run is composed of the shipped configs and keys")
    if sum(map(bool, (parsed.run, parsed.multirun, parsed.cfg, parsed.info, parsed.shell_completion))) > 1:
        _refuse("--run, -m, --cfg, --info and --shell-completion: only one of them can be given")
    for flag in ("resolve", "package"):
        if getattr(parsed, flag) and not (parsed.cfg or (parsed.help and flag == "resolve")):
            _refuse(f"--{flag}: applies only to --cfg, which shows a config")
    if parsed.shell_completion:
        if len(parsed.overrides) != 1 or not _COMPLETION.fullmatch(parsed.overrides[0]):
            _refuse("--shell-completion: must be one of install=, uninstall= and query=, with bash, fish or zsh")
        return {}
    with shipped_configs():
        everything = compose_checked(parsed.overrides, RunMode.MULTIRUN if parsed.multirun else RunMode.RUN)
        if _shows(parsed):
            return {}
        overrides = OverridesParser.create().parse_overrides(parsed.overrides)
        if not parsed.multirun:
            _check_no_launcher(overrides)
            return _check_rows([(everything, parsed.overrides)])
        (rows,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
        return _check_rows((compose_checked(row), row) for row in rows)


def _check_no_launcher(overrides: Sequence[Override]) -> None:
    """Reject a launcher for a single run. Hydra would ignore it and start the run on this machine, which on a cluster
    may be the login node."""
    for override in overrides:
        if re.match(r"hydra[/.]launcher\b", override.key_or_group):
            raise ConfigError(f"{override.input_line}: applies only to sweeps; qat-run -m starts one, even of one row")


def _check_rows(composed: Iterable[tuple[DictConfig, list[str]]]) -> dict[Path, Row]:
    """Check all rows, and keep only the first of rows that are the same run; returns run folder -> row."""
    asked = [(config, Row(from_hydra(config), overrides)) for config, overrides in composed]
    check_keys_of_training([(config, row.config) for config, row in asked])
    rows = [row for _, row in asked]
    from qat_runner.experiment import preflight  # imports PyTorch, which takes seconds

    folders: dict[Path, Row] = {}
    for row in rows:
        folder = preflight(row.config)
        other = folders.setdefault(folder, row)
        if other is not row and (changed := differences(identity(other.config), identity(row.config))):
            raise ConfigError(f"run_dir={folder}: rows of the sweep that differ in {', '.join(changed)} would share it")
    if len(rows) > len(folders):
        log.info(
            f"{len(rows)} rows are {len(folders)} runs: keys without effect, such as clipping at 32 bits, are ignored"
        )
    return folders


def _detach(args: Sequence[str], runs_dir: Path) -> int:
    """Start the same command in a new process that continues when this shell ends."""
    runs_dir.mkdir(parents=True, exist_ok=True)
    path = runs_dir / f"detached-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    with open(path, "wb") as out:
        command = [sys.executable, "-m", "qat_runner", *args]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    print(f"process {process.pid} is running, its log is {path}; qat-report status {runs_dir} shows the runs")
    process.returncode = 0  # this process does not wait for it
    return 0


def _run_all(args: Sequence[str], rows: Mapping[Path, Row], outcome: Outcome) -> None:
    """Run the rows in this process or with Hydra's launcher. Without rows, let Hydra show what was requested."""
    launcher = next((arg.partition("=")[2] for arg in reversed(args) if arg.startswith("hydra/launcher=")), _HERE)
    sweep = any(arg in _MULTIRUN for arg in args)
    if not rows:
        _show(args)
    elif launcher == _HERE:  # the rows are already composed and checked
        _run_here(rows, sweep, outcome)
    else:
        launch(launcher, _parsed(args).overrides, rows, outcome)


def _run_here(rows: Mapping[Path, Row], sweep: bool, outcome: Outcome) -> None:
    """Run rows one after the other. Rows of a sweep that another process is running come last, unless a row failed."""
    from qat_runner.experiment import run, run_after_others

    waiting = deque((run, folder) for folder in rows)
    number = {folder: f"run {i} of {len(rows)}" for i, folder in enumerate(rows, 1)}
    while waiting:
        outcome.left = [folder for _, folder in waiting][1:]
        carry_out, folder = waiting.popleft()
        if carry_out is run_after_others and outcome.failures:
            return
        try:
            if len(rows) > 1:
                log.info(number[folder])
            carry_out(rows[folder].config)
            outcome.done.append(folder)
        except QatError as error:
            if sweep and isinstance(error, BusyError):
                waiting.append((run_after_others, folder))
                continue
            outcome.failures.append(error)
            # A stop ends the whole command. So does any failure in one of several processes, since the others may not
            # know about it.
            if isinstance(error, StoppedError) or ranks.launched():
                return


def _show(args: Sequence[str]) -> None:
    """Let Hydra show what was requested."""

    @hydra.main(config_path=str(config_dir()), config_name="config", version_base=HYDRA_VERSION_BASE)
    def nothing(composed: DictConfig) -> None:
        raise AssertionError("no row was requested")

    sys.argv = [sys.argv[0], *args]
    nothing()


def _print_results(rows: Mapping[Path, Row], done: Collection[Path]) -> None:
    """Print the results of a command: finished runs, means over seeds, and the command that writes an HTML report."""
    finished: dict[Path, Summary] = {}
    for folder in (folder for folder in rows if folder in done):
        with suppress(UnreadableError):  # already reported by the row itself
            if (summary := SUMMARY.read(folder)) is not None:
                finished[folder] = summary
    if not finished:
        return
    from qat_runner.report import tables
    from qat_runner.report.runs import full_precision_in, full_precision_of_searches

    place = {folder: folder.resolve().parent for folder in finished}
    results = [
        tables.Result(rows[folder].config, summary, place[folder], folder) for folder, summary in finished.items()
    ]
    beside = [
        result
        for folder in dict.fromkeys(place.values())
        for result in (*full_precision_in(folder), *full_precision_of_searches(folder))
    ]
    log.info("\n" + tables.results_table(results, beside))
    if tables.several_seeds(results):
        log.info("\nOver seeds, mean ± standard deviation:\n\n" + tables.seeds_table(results, beside))
    if sentences := tables.differences_in_words(results, beside):
        log.info("\n" + "\n".join(sentences))
    places = list(dict.fromkeys(folder.parent for folder in finished))
    words = ["qat-report", *(["compare", *map(str, places)] if len(finished) > 1 else map(str, finished))]
    log.info(f"\n{shlex.join(words)} writes an HTML report of {'them' if len(finished) > 1 else 'it'}")

"""qat-run: train, retrain or evaluate a quantized network.

    qat-run model=resnet50 bits=4
    qat-run -m bits=4,8 clipping=octav,max
    qat-run -m --detach bits=4,8 seed=0,1,2                      goes on without this shell
    qat-run -m hydra/launcher=slurm bits=4,8 seed=0,1,2          a job for each row
    torchrun --nproc-per-node 8 -m qat_runner model=resnet50 bits=4
    qat-run --help

Every row of a request is composed and checked before the first of them starts. Exit codes: 0 all is well; 1 a run
broke off; 2 the request cannot be carried out as it stands, and nothing was left behind.
"""

import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
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

from qat_runner import ranks
from qat_runner.cli.explain import explain
from qat_runner.cli.terminal import on_terminal
from qat_runner.config import Config, config_dir, differences, from_hydra, identity, register
from qat_runner.config.composing import (
    HYDRA_VERSION_BASE,
    compose_checked,
    compose_config,
    freed,
    given,
    quoted,
    shipped_configs,
)
from qat_runner.errors import BusyError, ConfigError, QatError, RunError, StoppedError, UnreadableError
from qat_runner.runs.asked import forget_asked, remember_asked
from qat_runner.runs.records import SUMMARY, Summary

_MULTIRUN = ("-m", "--multirun")
_DETACH = "--detach"
_HERE = "basic"
"""The option of hydra/launcher that runs the rows in this process, one after the other."""
SLURM_PATIENCE = 600.0
"""Seconds that a job which was told to end waits to be killed, at most."""
log = logging.getLogger("qat_runner")


def main(argv: Sequence[str] | None = None, command: str = "qat-run") -> int:
    """Run the command, which errors call by its name; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    sweep = any(arg in _MULTIRUN for arg in args)
    with on_terminal(logging.INFO if sweep else logging.DEBUG):
        return _carry_out(args, sweep, partial(_fail, command))


def _carry_out(args: list[str], sweep: bool, fail: Callable[[str, int], int]) -> int:
    main_process = ranks.is_main()
    detach = _DETACH in args
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here, and are told in a sentence below
    failures: list[QatError] = []
    asked: list[Path] = []
    made: list[Path] = []
    code = 0
    try:
        args = sorted((_renamed(_with_home(arg)) for arg in args if arg != _DETACH), key=_rank)
        register()
        args += _rows_of_experiment(args, sweep)
        for override in given([arg for arg in args if _is_override(arg)]):
            args = _with_override(args, override)
        if ranks.launched() and (detach or any(arg.startswith("hydra/launcher=") for arg in args)):
            _refuse("torchrun: each of its processes would start the request anew with --detach or hydra/launcher")
        rows = _check_all(args)
        if sweep and main_process:
            made = remember_asked(rows)
            asked = list(rows)
        if detach and rows:
            return _detach(args, next(iter(rows)).parent)
        with _group(rows):
            _run_all(args, rows, failures)
        if main_process:
            _print_results(rows)
    except (HydraException, OmegaConfBaseException) as error:
        code = fail(explain(error, config_dir()), ConfigError.exit_code)
    except QatError as error:
        code = fail(str(error), error.exit_code)
    except SystemExit as stop:  # after --help and its like
        code = int(stop.code or 0)
    except OSError as error:  # of a folder of runs, which is about to be written to
        code = fail(f"writing failed ({error})", 1)
    except KeyboardInterrupt:
        code = fail("interrupted; the same command goes on from the last checkpoint", 130)
    for failure in failures:
        _wait_for_slurm(failure)
    for sentence, failed in dict.fromkeys((str(failure), failure.exit_code) for failure in failures):
        code = max(code, fail(sentence, failed))
    if code == ConfigError.exit_code:
        forget_asked(asked, made)
    return code


def _group(rows: Mapping[Path, Config]) -> AbstractContextManager[None]:
    """One group for all rows: processes that were launched together can meet but once."""
    if not ranks.launched():
        return nullcontext()
    from qat_runner import distributed

    return distributed.group(max((row.distributed_timeout for row in rows.values()), default=600))


def _renamed(arg: str) -> str:
    """An argument as it is called in the schema."""
    if arg == "bits=auto":
        return "policy=auto"
    if arg.startswith("bits=") and "auto" in arg.split("=")[1].split(","):
        raise ConfigError(f"{arg}: auto goes with no other bits; what it may cost can be swept over: budget=3,4")
    if not arg.startswith("+scale="):
        return freed(arg)
    renamed = arg.replace("+scale=", "+stand_in=", 1)
    log.info(f"{arg} is called {renamed} now")
    return renamed


def _rank(arg: str) -> int:
    """Hydra's parser wants the flag first; an experiment stands before what changes it. Users may not."""
    return 0 if arg in _MULTIRUN else 1 if arg.startswith("+experiment=") else 2 if arg.startswith("+stand_in=") else 3


def _with_home(arg: str) -> str:
    """`key=~/x` with `~` as a shell means it: Hydra's grammar has no such character."""
    key, equals, value = arg.partition("=")
    return (
        key
        + equals
        + re.sub(
            r"(?:(?<![^,\[])|(?<=^hf/)|(?<=,hf/))~\w*(?=[/,\]]|$)", lambda found: os.path.expanduser(found[0]), value
        )
    )


def _rows_of_experiment(args: Sequence[str], multirun: bool) -> list[str]:
    """What an experiment sweeps over, its `sweep` key, as overrides; keys on the command line go first.

    Hydra has a place of its own for this, but lets it clash with the command line instead of giving way.
    """
    chosen = [arg for arg in args if arg.startswith(("+experiment=", "+stand_in="))]
    if not chosen:
        return []
    if not chosen[0].startswith("+experiment="):
        raise ConfigError(f"{chosen[0].lstrip('+')}: puts an experiment on other data; +experiment=NAME must name it")
    found = compose_config(chosen)
    given = {arg.lstrip("+~").partition("=")[0] for arg in args}
    if "policy=auto" in args or "mode=allocate" in args:
        given |= {"bits", "weight_bits", "activation_bits"}  # which are chosen
    rows = []
    for key, values in found.sweep.items():
        if key.lstrip("+") not in given:
            stand_in = dict.fromkeys(found.standins.get(value, value) for value in values.split(","))
            rows.append(f"{key}={','.join(stand_in)}")
    if not multirun and any("," in row for row in rows):
        raise ConfigError(f"{chosen[0].lstrip('+')}: holds several rows; qat-run -m runs them all")
    return rows


def _fail(command: str, sentence: str, code: int) -> int:
    who = command if ranks.is_main() else f"{command}, process {os.environ['RANK']}"
    line = re.sub(r"[\x00-\x1f\x7f]", lambda found: repr(found[0])[1:-1], sentence)  # as a value may hold
    print(f"{who}: {line}", file=sys.stderr)
    return code


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"{message}; qat-run --help shows what can be asked for")


def _check_all(args: Sequence[str]) -> dict[Path, Config]:
    """Compose and check every row of the request before any work; returns the run folders and configs of the rows."""
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    parsed = parser.parse_args(args)
    for flag in ("config_dir", "config_name", "config_path", "experimental_rerun"):
        if getattr(parsed, flag) is not None:
            _refuse(f"--{flag.replace('_', '-')}: a run is composed of the shipped configs and of keys")
    if sum(map(bool, (parsed.run, parsed.multirun, parsed.cfg, parsed.info, parsed.shell_completion))) > 1:
        _refuse("--run, -m, --cfg, --info and --shell-completion: only one of them can be carried out")
    for flag in ("resolve", "package"):
        if getattr(parsed, flag) and not (parsed.cfg or (parsed.help and flag == "resolve")):
            _refuse(f"--{flag}: is for --cfg, which shows a config")
    if parsed.shell_completion:
        return {}
    shows = parsed.help or parsed.hydra_help or parsed.cfg or parsed.info
    with shipped_configs():
        everything = compose_checked(parsed.overrides, RunMode.MULTIRUN if parsed.multirun else RunMode.RUN)
        if shows:
            return {}
        overrides = OverridesParser.create().parse_overrides(parsed.overrides)
        if not parsed.multirun:
            _check_no_launcher(overrides)
            return _check_rows([everything])
        (rows,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
        return _check_rows(map(compose_checked, rows))


def _check_no_launcher(overrides: Sequence[Override]) -> None:
    """Refuse a launcher for a single run, which Hydra would carry out here: on a cluster, where people log in."""
    for override in overrides:
        if re.match(r"hydra[/.]launcher\b", override.key_or_group):
            raise ConfigError(f"{override.input_line}: is for sweeps; qat-run -m starts one, if only of one row")


def _check_rows(rows: Iterable[DictConfig]) -> dict[Path, Config]:
    configs = [from_hydra(row) for row in rows]
    from qat_runner.experiment import preflight  # which takes PyTorch, and seconds

    folders: dict[Path, Config] = {}
    for config in configs:
        folder = preflight(config)
        other = folders.setdefault(folder, config)
        if other is not config and (changed := differences(identity(other), identity(config))):
            raise ConfigError(f"run_dir={folder}: rows of the sweep that differ in {', '.join(changed)} would share it")
    return folders


def _detach(args: Sequence[str], runs_dir: Path) -> int:
    """Start the same command in a process of its own, which this shell's end does not end."""
    runs_dir.mkdir(parents=True, exist_ok=True)
    path = runs_dir / f"detached-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    with open(path, "wb") as out:
        command = [sys.executable, "-m", "qat_runner", *args]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    print(f"process {process.pid} is at work, {path} tells how far; qat-report status {runs_dir} shows the runs")
    process.returncode = 0  # no one waits for it
    return 0


def _run_all(args: Sequence[str], rows: Mapping[Path, Config], failures: list[QatError]) -> None:
    """Run the rows, here or where Hydra's launcher says; their errors are collected. Without rows, Hydra shows what was
    asked for."""
    launcher = next((arg.partition("=")[2] for arg in reversed(args) if arg.startswith("hydra/launcher=")), _HERE)
    sweep = any(arg in _MULTIRUN for arg in args)
    if not rows:
        _launch(args, sweep)
    elif launcher == _HERE:  # composed and checked as they are
        _run_here([*rows.values()], sweep, failures)
    else:
        with TemporaryDirectory() as scratch:
            # Hydra notes a sweep down, for which no one asked; but jobs of submitit leave their logs there.
            place = scratch if launcher == "joblib" else next(iter(rows.values())).runs_dir
            try:
                _launch(_with_override(args, f"hydra.sweep.dir={quoted(place)}"), sweep)
            except QatError as error:
                failures.append(error)
            except (HydraException, OmegaConfBaseException):
                raise
            except Exception as error:  # whatever a cluster's launcher makes of a job that is gone
                reason = str(error).strip() or type(error).__name__
                failures.append(RunError(f"a job broke off: {reason.splitlines()[0]}"))


def _run_here(configs: Sequence[Config], sweep: bool, failures: list[QatError]) -> None:
    """One after the other; those of a sweep that other processes are at work on come last, unless something failed."""
    from qat_runner.experiment import run, run_after_others

    waiting = deque((run, config) for config in configs)
    while waiting:
        carry_out, config = waiting.popleft()
        if carry_out is run_after_others and failures:
            return
        try:
            carry_out(config)
        except QatError as error:
            if sweep and isinstance(error, BusyError):
                waiting.append((run_after_others, config))
                continue
            failures.append(error)
            # A stop ends the whole request; so does any failure of one of several processes: the others may not know.
            if isinstance(error, StoppedError) or ranks.launched():
                return


def _is_override(arg: str) -> bool:
    return "=" in arg and not arg.startswith("-")


def _with_override(args: Sequence[str], override: str) -> list[str]:
    """Among the overrides, which the parser wants side by side."""
    at = next((i for i, arg in enumerate(args) if _is_override(arg)), len(args))
    return [*args[:at], override, *args[at:]]


def _launch(args: Sequence[str], sweep: bool) -> None:
    """Give the rows to Hydra's launcher, or let Hydra show what was asked for."""

    @hydra.main(config_path=str(config_dir()), config_name="config", version_base=HYDRA_VERSION_BASE)
    def job(composed: DictConfig) -> float:
        return _elsewhere(from_hydra(composed), sweep)

    sys.argv = [sys.argv[0], *args]
    job()


def _elsewhere(config: Config, sweep: bool) -> float:
    """A row of a request, in a process or on a machine that Hydra's launcher gave it."""
    from qat_runner.experiment import run, run_after_others
    from qat_runner.runs.records import score

    with on_terminal():
        try:
            return score(run_after_others(config) if sweep else run(config))
        except StoppedError as error:  # no result: whoever stopped the job may start it again
            _wait_for_slurm(error)
            sys.exit(error.exit_code)


def _wait_for_slurm(error: QatError) -> None:
    """Let a job that Slurm ends be killed by it: one that ends itself before is not put back into the queue."""
    if isinstance(error, StoppedError) and "SLURM_JOB_ID" in os.environ and error.exit_code == 128 + signal.SIGTERM:
        log.info(f"{error}; waiting for Slurm to end the job")
        time.sleep(SLURM_PATIENCE)


def _print_results(rows: Mapping[Path, Config]) -> None:
    """The closing words of a request: the finished runs, what they say over seeds, and what makes a page of them."""
    finished: dict[Path, Summary] = {}
    for folder in rows:
        with suppress(UnreadableError):  # of which the row itself has told
            if (summary := SUMMARY.read(folder)) is not None:
                finished[folder] = summary
    if not finished:
        return
    from qat_runner.report import tables

    results = [tables.Result(rows[folder], summary, folder.parent) for folder, summary in finished.items()]
    log.info("\n" + tables.results_table(results))
    if tables.several_seeds(results):
        log.info("\nOver seeds, mean ± standard deviation:\n\n" + tables.seeds_table(results))
    if sentences := tables.differences_in_words(results):
        log.info("\n" + "\n".join(sentences))
    places = list(dict.fromkeys(folder.parent for folder in finished))
    words = ["qat-report", *(["compare", *map(str, places)] if len(finished) > 1 else map(str, finished))]
    log.info(f"\n{shlex.join(words)} makes a page of {'them' if len(finished) > 1 else 'it'}")

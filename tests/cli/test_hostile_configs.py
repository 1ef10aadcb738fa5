"""Untrusted configs: they cannot run code, read the environment, or write anywhere but to the folders of runs."""

import copy
import functools
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from hypothesis import assume, example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from qat_runner.config import flat, from_hydra, hydra_keys, identity, read_config, run_folder
from qat_runner.config.composing import (
    HYDRA_VERSION_BASE,
    _hydra_node,
    compose_config,
    config_dir,
    quoted,
    shipped_configs,
)
from qat_runner.config.keys import leaves
from qat_runner.config.schema import ConfigSchema, RecipeConfig, StageConfig
from qat_runner.errors import ConfigError, UnreadableError
from qat_runner.experiment import running
from qat_runner.models import hub
from tests.cli.commands import Run, run_in

SMALL = [
    *("backend=eager", "model=resnet20", "dataset=fake", "dataset.image_size=8", "dataset.fake_pictures=32"),
    *("batch_size=16", "epochs=1", "noise_batches=0"),
]
TARGET = "{_target_: torch.load, f: EVIL.pt, weights_only: false}"


class Evil:
    """An object whose pickle leaves a file when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("TRACE"),)


FOREIGN = {
    "row/callback.yaml": f"# @package _global_\nhydra: {{callbacks: {{x: {TARGET}}}}}\n",
    "row/environment.yaml": "# @package _global_\nhydra: {job: {env_set: {CXX: ./evil}, env_copy: [HOME]}}\n",
    "row/folders.yaml": "# @package _global_\nhydra: {run: {dir: TRACE}, sweep: {dir: TRACE}, output_subdir: TRACE}\n",
    "row/path.yaml": "# @package _global_\nhydra: {searchpath: ['pkg://evil']}\n",
    "row/target.yaml": "# @package _global_\nhydra: {launcher: {_target_: os.system, command: ./evil}}\n",
    "row/sweeper.yaml": "# @package _global_\nhydra: {sweeper: {params: {seed: '0,1'}}}\n",
    "row/mode.yaml": "# @package _global_\nhydra: {mode: MULTIRUN}\n",
    "row/overrides.yaml": "# @package _global_\nhydra: {overrides: {task: ['+hydra.callbacks.x=null']}}\n",
    "row/secret.yaml": "# @package _global_\ndata_dir: ${oc.env:SECRET}\n",
    "row/nested.yaml": "# @package _global_\nmodel: {_target_: os.system}\n",
    "row/pieces.yaml": "# @package _global_\nhydra: {help: {header: '{_targ', footer: 'et_: torch.load}'}}\n",
    "hydra/job_logging/evil.yaml": "version: 1\nroot: {handlers: [x]}\n"
    "handlers: {x: {class: subprocess.Popen, args: [touch, TRACE]}}\n",
    "hydra/launcher/evil.yaml": f"{TARGET[1:-1]}".replace(", ", "\n"),
    "evil.py": "import pathlib; pathlib.Path('TRACE').touch()\n",
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return qat-run in a folder with untrusted configs in D, which leave a file TRACE if any part of them is run."""
    run = run_in(tmp_path, monkeypatch, SMALL)
    monkeypatch.syspath_prepend(tmp_path / "D")
    monkeypatch.setenv("SECRET", "s3cret")
    for name, content in FOREIGN.items():
        (tmp_path / "D" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "D" / name).write_text(content)
    torch.save(Evil(), tmp_path / "EVIL.pt")
    (tmp_path / "evil").write_text("#!/bin/sh\ntouch TRACE\n")
    (tmp_path / "evil").chmod(0o755)
    return run


HOSTILE = [
    # search paths, and paths as options of groups
    ["hydra.searchpath=[file://D]", "+row=callback"],
    ["+hydra.searchpath=[file://D]", "+row=callback"],
    ["++hydra.searchpath=[pkg://evil]"],
    ["hydra.searchpath=[pkg://evil]"],
    ["--config-dir=D"],
    ["--config-path=D"],
    ["-cp=D"],
    ["-cd=D"],
    ["--config-path=pkg://evil"],
    ["--config-name=row/max"],
    ["-cn=row/max"],
    ["--experimental-rerun=EVIL.pt"],
    ["--exp=EVIL.pt"],
    *([f"+row=UP/{path.removeprefix('row/').removesuffix('.yaml')}"] for path in FOREIGN if path.startswith("row/")),
    ["+row=[octav,UP/callback]"],
    ["+row=octav,UP/callback"],
    ["+row@hydra=UP/callback"],
    ["hydra/launcher=UP/../hydra/launcher/evil"],
    # callbacks, targets, and pieces of them
    [f"+hydra.callbacks.x='{TARGET}'"],
    [f"+hydra.callbacks.x={TARGET.replace(' ', '')}"],
    ["+hydra.callbacks.x._target_=os.system"],
    [f"hydra.callbacks={{x:{TARGET.replace(' ', '')}}}"],
    ["hydra={callbacks:{x:{_target_:os.system}}}"],
    ["+hydra/callbacks@hydra.callbacks.x=basic"],
    ["+hydra/launcher@hydra.callbacks.x=basic"],
    ["+clipping@hydra.callbacks.x=max"],
    ["hydra.launcher._target_=os.system"],
    ["++hydra.launcher._args_=[x]"],
    ["~hydra.launcher._target_"],
    ["~hydra.launcher"],
    ["hydra.launcher={_target_:os.system,command:./evil}"],
    ["hydra/launcher=evil"],
    [
        "hydra.help.header='{_targ'",
        "hydra.help.footer='et_: torch.load, f: EVIL.pt, weights_only: false}'",
        "+hydra.callbacks.x='${oc.decode:${hydra.help.header}${hydra.help.footer}}'",
    ],
    ["+model._target_=os.system"],
    ["+sweep._target_=os.system"],
    # the environment
    ["+hydra.job.env_set.CXX=./evil"],
    ["++hydra.job.env_set={CXX:./evil}"],
    ["hydra.job.env_copy=[SECRET]"],
    ["data_dir=${oc.env:SECRET}"],
    ["data_dir='${oc.env:SECRET}'"],
    ["model=${oc.env:SECRET}"],
    ["bits=${oc.env:SECRET}"],
    ["run_dir='x${oc.decode:1}'"],
    ["run_dir='${oc.create:{a:1}}'"],
    ["run_dir='${hydra:job.name}'"],
    ["run_dir='${now:%Y}'"],
    ["run_dir='$${dataset}{oc.env:SECRET}'"],
    ["+sweep.x='${oc.env:SECRET}'"],
    ["dataset.mean=['${oc.env:SECRET}']"],
    # folders, files and logging
    ["hydra.run.dir=X"],
    ["hydra.sweep.dir=X"],
    ["hydra.sweep.subdir=../.."],
    ["hydra.output_subdir=X"],
    ["hydra.job.chdir=true"],
    ["hydra.job.name=X"],
    ["hydra.runtime.output_dir=X"],
    ["hydra/job_logging=default"],
    ["hydra/job_logging=default", "hydra.job_logging.handlers.file.filename=X"],
    ["hydra/hydra_logging=default"],
    ["+hydra.job_logging.handlers.x.class=subprocess.Popen"],
    ["hydra.hydra_logging.root={handlers:[x]}"],
    ["hydra.verbose=true"],
    ["hydra.help.template='$CONFIG'"],
    ["hydra.hydra_help.template=x"],
    # rows that would not be checked
    ["hydra/sweeper=basic"],
    ["hydra.mode=MULTIRUN"],
    ["+hydra.sweeper.params.seed='0,1'"],
    ["hydra.sweeper.max_batch_size=1"],
    ["hydra.overrides.task=[seed=1]"],
    # settings of a launcher that are commands, or could end the line that contains them
    ["hydra/launcher=submitit_local", "hydra.launcher.submitit_folder=X"],
    ["hydra/launcher=slurm", "hydra.launcher.setup=[./evil]"],
    ["hydra/launcher=slurm", "hydra.launcher.comment='a\n./evil'"],
    ["hydra/launcher=slurm", "hydra.launcher.partition='$(./evil)'"],
    ["hydra/launcher=slurm", "hydra.launcher.account='a;b`./evil`'"],
    ["hydra/launcher=slurm", "+hydra.launcher.additional_parameters.export=LD_PRELOAD"],
    ["hydra/launcher=slurm", "hydra.launcher.additional_parameters={task_prolog:evil}"],
    ["hydra/launcher=slurm", "hydra.launcher.nodes=[1]"],
    ["hydra/launcher=slurm", "hydra.launcher.nodes=2"],
    ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=8"],
    ["hydra/launcher=joblib", "hydra.launcher.backend=evil"],
    ["hydra/launcher=joblib", "hydra.launcher.temp_folder=X"],
    ["hydra/launcher=joblib", "hydra.launcher.pre_dispatch='9**9**9'"],
    ["hydra/launcher=joblib", "hydra.launcher.n_jobs=99999999999"],
]


@pytest.mark.parametrize("args", [*HOSTILE, *(["-m", *args] for args in HOSTILE[::9])], ids=" ".join)
def test_hostile_overrides_are_rejected(
    args: list[str], run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    up = os.path.relpath(tmp_path / "D" / "row", config_dir() / "row")
    refused(run, [arg.replace("UP", up) for arg in args], capsys)


@pytest.mark.parametrize(
    "way",
    [
        *(["--detach"], ["-m", "--detach"], ["-m", "hydra/launcher=joblib"], ["-m", "hydra/launcher=slurm"]),
        *(["-m", "hydra/launcher=submitit_local"], ["--cfg=job"], ["--cfg=all"], ["--help"], ["--info=config"]),
        ["--hydra-help"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("override", ["+hydra.callbacks.x._target_=os.system", "hydra/job_logging=default"])
def test_hostile_overrides_are_rejected_however_a_run_is_started(
    way: list[str], override: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(run, [*way[: way[0] == "-m"], override, *way[way[0] == "-m" :]], capsys)


def test_hostile_overrides_are_rejected_with_several_processes(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    refused(run, ["+hydra.callbacks.x._target_=os.system"], capsys, who="qat-run, process 1: ")


def refused(run: Run, args: list[str], capsys: pytest.CaptureFixture[str], who: str = "qat-run: ") -> str:
    """Check that a command is rejected: exit code 2, one sentence without the secret, nothing left, no code run."""
    before = sorted(path for path in Path().rglob("*") if "__pycache__" not in path.parts)
    assert run(*args) == 2
    said = capsys.readouterr()
    assert said.err.startswith(who) and said.err.count("\n") == 1, said.err
    assert "s3cret" not in said.err + said.out and "Traceback" not in said.err
    assert sorted(path for path in Path().rglob("*") if "__pycache__" not in path.parts) == before
    assert not Path("TRACE").exists()
    return said.err


@pytest.mark.parametrize("name", [name for name in FOREIGN if name.startswith("row/") and name != "row/path.yaml"])
def test_composed_configs_are_checked_as_well(name: str, run: Run) -> None:
    """As if an untrusted file had passed the check of what was typed."""
    overrides = [f"+{name.removesuffix('.yaml').replace('/', '=')}"]
    with initialize_config_dir(str(config_dir()), version_base=HYDRA_VERSION_BASE):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        search = [f"hydra.searchpath=[file://{Path('D').resolve()}]", *overrides]

        def compose_and_check() -> None:
            composed = hydra.compose_config("config", search, run_mode=RunMode.RUN, with_log_configuration=False)
            composed.hydra.searchpath = []
            hydra_keys.check_composed(composed, search, _hydra_node)

        with pytest.raises((ConfigError, HydraException), match=r"cannot be set|name code|interpolation|not in '"):
            compose_and_check()


def keys_of_hydra() -> list[str]:
    """Return the dotted names of all of Hydra's own keys, except those of launchers and those that Hydra fills in."""
    with shipped_configs():
        keys = sorted(flat(_hydra_node("basic")))
    return [key for key in keys if not key.startswith(("launcher.", *hydra_keys.FILLED_IN))]


@pytest.mark.parametrize("key", keys_of_hydra())
@pytest.mark.parametrize("value", ["X", "null", "{_target_:os.system}", "'${hydra.job.name}'"])
def test_no_command_can_set_keys_of_hydra(key: str, value: str) -> None:
    for prefix, deeper in (("", ""), ("+", ".x"), ("++", ".x._target_")):
        with pytest.raises(ConfigError, match=r"hydra.*(cannot be set|cannot name code)"):
            hydra_keys.check_typed([f"{prefix}hydra.{key}{deeper}={value}"], lambda key: False)


@given(
    key=st.sampled_from(keys_of_hydra()),
    value=st.one_of(st.none(), st.booleans(), st.integers(), st.just({"_target_": "os.system"}), st.text(max_size=5)),
)
def test_no_key_of_hydra_may_differ_in_a_composed_config(key: str, value: Any) -> None:
    own = _hydra_node("basic")
    node = copy.deepcopy(dict(own))
    *parents, last = key.split(".")
    inner = functools.reduce(lambda place, name: place[name], parents, node)
    assume(type(inner[last]) is not type(value) or inner[last] != value)
    inner[last] = value
    with pytest.raises(ConfigError, match="cannot"):
        hydra_keys.check_composed(OmegaConf.create({"hydra": node}), [], _hydra_node)


SAMPLES = {"an integer": "2", "a number": "1.5", "true or false": "true", hydra_keys._ONE.words: "1"}


@pytest.mark.parametrize("target", hydra_keys.LAUNCHERS)
def test_settings_of_the_launchers(target: str) -> None:
    option, settings = hydra_keys.LAUNCHERS[target]
    samples = {key: SAMPLES.get(kind.words, "gpu:a100") for key, kind in settings.items()}
    assert samples or option == "basic"
    compose_config([f"hydra/launcher={option}", *(f"++hydra.launcher.{key}={value}" for key, value in samples.items())])
    with pytest.raises((ConfigError, HydraException)):
        compose_config([f"hydra/launcher={option}", "++hydra.launcher.another=1"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=1"],
        ["hydra/launcher=submitit_slurm", "hydra.launcher.constraint='[a100|h100]&nvlink'"],
        ["hydra/launcher=slurm", "hydra.launcher.exclude='node[1-3,7]'", "hydra.launcher.mem_per_cpu=4G"],
        ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=null"],
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=4"],
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=-1", "hydra.launcher.verbose=10"],
        ["hydra/launcher=basic"],
        ["data_dir='${oc.env:QAT_DATA_DIR,data}'"],
        ["run_dir='${runs_dir}/mine'"],
    ],
    ids=" ".join,
)
def test_allowed_overrides(overrides: list[str]) -> None:
    composed = compose_config(overrides)
    assert "hydra" not in composed
    from_hydra(composed)


ABSURD = [
    *("dataset.num_classes=999999999999", "lr=1e308", "dataset.val_batch_size=99999999999999999999", "seed=-1"),
    *("epochs=1000000000000000000", "dataset.image_size=1000000000", f"seed={2**32}", "batch_size=1000000000000"),
    *(f"batch_size={10**400}", "recipe.scratch.batch_size=0", "recipe.scratch.lr=inf", "lr=nan", "lr=-1"),
    *("recipe.retrain.epochs=1000000000", "recipe.scratch.weight_decay=nan", "dataset.mean=[1e300]"),
    *("dataset.std=[nan]", "dataset.workers=1000000", "dataset.fake_pictures=10000000000", "model.width=1e9"),
    *("checkpoint_minutes=1e300", "checkpoint_minutes=nan", "distributed_timeout=inf", "noise_batches=1e30"),
    *("limit_train_batches=99999999999999999999", "limit_val_batches=0", "accumulate=99999999999999999999"),
    *("clipping.calibration_batches=99999999999", "clipping.calibration_batch_size=99999999999"),
    *("clipping.iterations=99999999999", "clipping.warm_iterations=99999999999", "recipe.freeze_scalars_at=1e300"),
    *("recipe.distill_temperature=1e300", "recipe.scratch.max_grad_norm=1e300", "recipe.scratch.warmup_epochs=1e300"),
    *("recipe.scratch.decay_every=99999999999", "recipe.device_batch=-5", "dataset.n_best=99999999999"),
]


@pytest.mark.parametrize("override", ABSURD, ids=lambda text: text[:40])
def test_absurd_numbers_are_rejected(override: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{override.partition('=')[0]}=" in refused(run, [override], capsys)


def test_an_endless_search_is_rejected(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(run, ["clipping=mse_sweep", "clipping.points=99999999999999"], capsys)
    assert "clipping.points=99999999999999: must be 1 to 10000" in said


def test_every_number_of_the_schema_has_a_range() -> None:
    others = {"bits", "weight_bits", "activation_bits", "first_last_bits", "schema_version"}  # have their own checks
    others |= {"clipping.q"}
    schema = ConfigSchema(recipe=RecipeConfig(scratch=StageConfig()))
    numbers = {key: field for key, field, _ in leaves(schema) if re.search(r"\b(int|float)\b", _written(field.type))}
    assert {key for key, field in numbers.items() if "range" not in field.metadata} == others
    assert {"lr", "dataset.mean", "recipe.scratch.lr", "clipping.alpha"} <= numbers.keys()


def _written(annotation: Any) -> str:
    return annotation.__name__ if type(annotation) is type else str(annotation)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("a" * 300, "at most 4000 bytes, with at most 255 bytes between two slashes"),
        ("a/" * 2500, "at most 4000 bytes, with at most 255 bytes between two slashes"),
        ("'" + "ü" * 200 + "'", "255 bytes between two slashes"),
        ("'a\nb'", "without line breaks or other control characters"),
        ("'a\0b'", "without line breaks or other control characters"),
        ("'a\x1b[31mb'", "without line breaks or other control characters"),
    ],
    ids=["long", "deep", "long in UTF-8", "line break", "NUL", "escape"],
)
@pytest.mark.parametrize("key", ["run_dir", "runs_dir", "data_dir"])
def test_impossible_paths_are_rejected(
    key: str, path: str, words: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(run, [f"{key}={path}"], capsys)


@pytest.mark.parametrize(
    ("typed", "suggested"),
    [
        ("weights=epoch=3-step=400.ckpt", "\"weights='epoch=3-step=400.ckpt'\""),
        ("run_dir=ü", "\"run_dir='ü'\""),
        ("run_dir=a#b", "\"run_dir='a#b'\""),
        ("run_dir=it's", "\"run_dir='it\\'s'\""),
        ("data_dir=a;b", "\"data_dir='a;b'\""),
    ],
)
def test_a_value_that_hydra_cannot_parse_is_answered_with_a_quoted_one(
    typed: str, suggested: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(run, [typed], capsys)
    shown = said.strip().rpartition("for the shell: ")[2]
    again = subprocess.run(["sh", "-c", f"printf %s {shown}"], capture_output=True, encoding="utf-8", check=True)
    override = OverridesParser.create().parse_override(again.stdout)
    assert (override.key_or_group, override.value()) == tuple(typed.split("=", 1))
    assert "\\" in suggested or shown == suggested


@given(st.text(max_size=12))
@example("a\\b")
@example("a\\")
@example("a\\'b")
@example("null")
@example("12")
@example("1e5")
@example("ü=${x}")
def test_quoted_values_are_read_back(text: str) -> None:
    assert OverridesParser.create().parse_override(f"k={quoted(text)}").value() == text


def test_the_home_folder(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    assert run("run_dir=~/one", "data_dir='~/data'") == 0
    assert (home / "one" / "summary.json").is_file()
    assert read_config(home / "one" / "config.yaml").data_dir == str(home / "data")
    assert run("-m", "runs_dir=~/runs", "seed=0,1") == 0
    assert len([*home.glob("runs/*/summary.json")]) == 2
    assert not Path("~").exists() and not Path("runs").exists()
    assert not [*tmp_path.rglob("multirun.yaml")]  # which Hydra writes by default
    config = from_hydra(compose_config(["run_dir='~'", "runs_dir='~/r'", "model.checkpoint='~/bert'"]))
    assert (config.runs_dir, config.model.checkpoint) == (f"{home}/r", f"{home}/bert")
    assert run_folder(config) == home


@pytest.mark.parametrize("key", ["policy", "allocation.latencies", "weights", "data_dir"])
def test_the_home_folder_of_an_unknown_user(key: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Python raises its own error for it."""
    beside = {"allocation.latencies": ["policy=auto", "latency_ms=1"], "weights": ["mode=ptq"]}
    beside |= {"data_dir": ["dataset=cifar10"]}
    assert f"{key}=~no-such-user/x" in refused(run, [f"{key}='~no-such-user/x'", *beside.get(key, [])], capsys)


def test_runs_in_the_home_folder_of_an_unknown_user() -> None:
    config = from_hydra(compose_config(["dataset=imagefolder", "dataset.num_classes=2", "data_dir='~no-such-user'"]))
    assert str(identity(config)["data_dir"]).endswith("/~no-such-user")
    assert run_folder(replace(config, runs_dir="~no-such-user")).parent == Path("~no-such-user")
    assert run_folder(replace(config, run_dir="~no-such-user")) == Path("~no-such-user")
    assert hub.load_from_checkpoint("~no-such-user", lambda place, **_: place, "a network") == "~no-such-user"


def test_rows_that_are_rejected_late_leave_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object) -> None:
        raise ConfigError("weights=x: fit no network")

    monkeypatch.setattr(running, "_run", refuse)
    assert "fit no network" in refused(run, ["-m", "seed=0,1", "runs_dir=some/runs"], capsys)


SAVED = {
    "an interpolation": "data_dir: ${oc.env:SECRET}",
    "an escaped interpolation": 'data_dir: "\\x24{oc.env:SECRET}"',
    "an interpolated key": '"${oc.env:SECRET}": 1',
    "aliases": "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))]),
    "itself": "sweep: &s {a: *s}",
    "a tag of Python's": "data_dir: !!python/object/apply:os.system [touch TRACE]",
    "a set": "sweep: !!set {a, b}",
    "a key twice": "seed: 1\nseed: 2",
    "a merge": "<<: {seed: 1}",
    "deep nesting": "a: " + "[" * 5000,
    "a huge file": "a: b\n" * 500_000,
    "bytes": b"\xff\xfe\x00",
    "two documents": "seed: 1\n---\nseed: 2",
    "a list": "[1, 2]",
    "nothing": "",
}


@pytest.mark.parametrize("content", SAVED.values(), ids=SAVED)
def test_saved_configs_that_are_not_plain_are_rejected(content: str | bytes, run: Run) -> None:
    path = Path("config.yaml")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UnreadableError) as refusal:
        read_config(path)
    assert str(refusal.value).startswith("config.yaml: cannot be read (")
    assert "s3cret" not in str(refusal.value) and "\n" not in str(refusal.value)
    assert not Path("TRACE").exists()


@pytest.mark.reliability
def test_a_locale_with_ascii_only(tmp_path: Path) -> None:
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "qat_runner", "-m", *SMALL]
    ascii_alone = functools.partial(subprocess.run, env=environment, cwd=tmp_path, capture_output=True)
    done = ascii_alone([*command, "seed=0,1"], encoding="utf-8")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "mean ± standard deviation" in done.stdout
    left = {*tmp_path.iterdir()}
    done = ascii_alone([*command, "runs_dir='ü'"], encoding="utf-8")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "LC_ALL=C.UTF-8 can encode all names" in done.stderr
    assert {*tmp_path.iterdir()} == left

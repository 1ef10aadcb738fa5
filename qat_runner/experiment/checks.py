"""Checks before any work: missing data or weights, a run folder that holds another run."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

from qat_runner import ranks
from qat_runner.config import (
    AUTO,
    BASELINE,
    Config,
    Decode,
    Mode,
    Resume,
    allocation_of,
    baseline_of,
    differences,
    identity,
    load_config,
    path_of,
    run_folder,
)
from qat_runner.config.model_names import PREFIXES
from qat_runner.config.tasks import foreign_keys
from qat_runner.data import AUGMENTATIONS, find_dataset
from qat_runner.errors import ConfigError, UnreadableError
from qat_runner.experiment.building import find_device
from qat_runner.models import STEMS, Source, find_weights, match_weights
from qat_runner.plugins import Registry
from qat_runner.policy import GRANULARITIES, WEIGHT_AND_INPUT
from qat_runner.quant.kernels import choose_backend, compiled
from qat_runner.runs.files import JsonFile, becomes
from qat_runner.runs.folder import RunFolder
from qat_runner.runs.records import LOCK, STEPS
from qat_runner.runs.trackers import TRACKERS
from qat_runner.tasks import TASKS, task_of
from qat_runner.training import checkpoint
from qat_runner.wording import meant, one_of

T = TypeVar("T")


def preflight(config: Config) -> Path:
    """Check, without doing any work, that a run can be carried out; return its folder, which need not exist.

    Raises:
        ConfigError: unknown model or device, missing data or weights, or a run folder of another config.
    """
    _check_names(config)
    _check_device(config)
    _check_batches(config)
    find_dataset(config.dataset, config.data_dir)
    task = task_of(config)
    task.check(config)
    if isinstance(task.networks, Registry) and config.model.name in [*task.networks]:  # no prefix for another library
        task.networks[config.model.name]  # imports it if it is a plugin
    _check_tensors(config)
    if config.allocating and ranks.launched():
        _check_one_process(config)
    if config.policy == AUTO:
        preflight(allocation_of(config))
    if config.weights == BASELINE:
        preflight(baseline_of(config))
    elif config.weights is not None:
        _check_weights(config, Source(config.weights, config.weights_part), new_head=config.retraining)
    if config.distilling and config.recipe.teacher is not None:
        _check_teacher(config)
    folder = run_folder(config)
    _check_folder(folder, config)
    return folder


def _check_names(config: Config) -> None:
    """Reject unknown names, and trackers whose packages are not installed."""
    for key, value, allowed in (
        ("model.stem", config.model.stem, STEMS),
        ("dataset.augment", config.dataset.augment, AUGMENTATIONS),
    ):
        if value not in allowed:
            raise ConfigError(f"{key}={value}: {one_of(value, allowed)}")
    if not any(config.model.name in task.networks for _, task in TASKS.sound()):
        names = dict.fromkeys(name for _, task in TASKS.sound() for name in task.networks)
        words = (f"{prefix}/NAME" for prefix in PREFIXES)
        raise ConfigError(f"model={config.model.name}: {one_of(config.model.name, (*names, *words))}")
    if "none" in config.trackers and len(config.trackers) > 1:
        raise ConfigError(f"trackers=[{','.join(config.trackers)}]: none cannot be combined with other trackers")
    for name in config.trackers:
        if name not in TRACKERS:
            raise ConfigError(f"trackers={name}: must be some of {', '.join(TRACKERS)}{meant(name, TRACKERS)}")
        if missing := TRACKERS[name].missing():
            raise ConfigError(f"trackers={name}: {missing}")


def _check_device(config: Config) -> None:
    """Reject a device that does not exist, and settings that it does not support."""
    device = find_device(config.device)
    if config.compile and device.type == "cpu" and not compiled.available():
        raise ConfigError("compile=true: needs a C++ compiler, and none was found")
    if config.dataset.decode == Decode.gpu and device.type != "cuda":
        raise ConfigError(f"dataset.decode=gpu: needs a CUDA device, and device={config.device} is the CPU")
    if (world := ranks.world_size()) > 1 and config.device.startswith("cuda:"):
        raise ConfigError(
            f"device={config.device}: would be shared by all {world} processes; device=cuda gives each its own"
        )
    try:
        choose_backend(config.backend, device.type)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_batches(config: Config) -> None:
    """Reject image sizes that are impossible, and batches that cannot be split over processes and parts."""
    size, resized = config.dataset.image_size, config.dataset.resize_size
    if resized is not None and resized < size and "dataset.resize_size" not in foreign_keys(config.task):
        raise ConfigError(f"dataset.resize_size={resized}: must be dataset.image_size={size} or more")
    if config.dataset.skip_corrupt and config.accumulate > 1 and (config.clipping.sync or config.sync_batchnorm):
        what = "clipping.sync" if config.clipping.sync else "sync_batchnorm"
        raise ConfigError(
            f"dataset.skip_corrupt=true: cannot be combined with accumulate={config.accumulate} and {what}=true"
        )
    world = ranks.world_size()
    if config.training and config.batch_size % world:
        raise ConfigError(f"batch_size={config.batch_size}: must be a multiple of {world}, the number of processes")
    if config.accumulate > config.batch_size // world:
        raise ConfigError(f"accumulate={config.accumulate}: must be 1 to batch_size over the number of processes")


def _check_tensors(config: Config) -> None:
    """Reject a format, a range and a clipping method that do not fit together.

    If rules change any of them, only the network shows whether a tensor has them, so the check is skipped.
    """
    if any({"format", "range", "clipping"} & rule.keys() for rule in config.rules):
        return
    for operand in WEIGHT_AND_INPUT:
        tensor = config.quantization.tensor("", "Linear", operand)
        try:
            tensor.quantizer(operand, dict.fromkeys(GRANULARITIES, ()))
        except ValueError as error:
            raise ConfigError(str(error)) from error


def _check_teacher(config: Config) -> None:
    """Reject a teacher network that does not exist, or that its weights do not fit."""
    name, task = config.recipe.teacher_model, task_of(config)
    if name is not None:
        if name not in task.networks:
            raise ConfigError(f"recipe.teacher_model={name}: {one_of(name, task.networks)}")
        task.check(config.of_teacher)
    assert config.recipe.teacher is not None
    source = Source(config.recipe.teacher, config.recipe.teacher_part, "recipe.teacher")
    _check_weights(config.of_teacher, source, new_head=False)


def _check_one_process(config: Config) -> None:
    """Reject bit allocation in several processes, which would have to agree on everything they find separately."""
    folder = run_folder(config if config.mode == Mode.allocate else allocation_of(config))
    if not RunFolder(folder).finished:
        raise ConfigError(
            "torchrun: bit allocation runs in one process; run qat-bits with the same keys first, and this run uses "
            "its result"
        )


def _check_weights(config: Config, source: Source, new_head: bool) -> None:
    """Match the weights against a model on the meta device, without its head if the number of classes is unknown."""
    find_weights(source, config.model.name)
    if source.published:
        return
    task = task_of(config)
    with torch.device("meta"):
        model = task.network(config, None)
    match_weights(model, source, config.model.name, new_head=new_head or not task.knows_head(config))


def _check_folder(folder: Path, config: Config) -> None:
    """Reject a run folder that holds anything but this run, or with overwrite=true anything but a run."""
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    if not parent.is_dir():
        raise ConfigError(f"run_dir={folder}: {parent} is a file, not a folder")
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"run_dir={folder}: {parent} cannot be written to")
    if not folder.exists():
        return
    content = {path.name for path in folder.iterdir()} - {LOCK.name}  # a run that is just starting may hold it
    if not content:
        return
    here = RunFolder(folder)
    ours = {path.name for path in here.contents}
    foreign = sorted(name for name in content if becomes(name) not in ours)
    saved, unreadable = None, ""
    try:
        saved = load_config(folder)
    except UnreadableError as error:
        unreadable = f" ({error})"
    if saved is None and not foreign and not content & {here.config.name, here.checkpoints.name}:
        return  # left by a run that failed before it started
    if saved is None or (config.overwrite and foreign):
        what = "holds no run" if saved is None else f"holds more than a run ({foreign[0]})"
        raise ConfigError(f"run_dir={folder}: {what}, so it is left alone; choose a new folder{unreadable}")
    if config.overwrite:
        for key, weights in (("weights", config.weights), ("recipe.teacher", config.recipe.teacher)):
            if weights is not None and path_of(weights).resolve().is_relative_to(folder.resolve()):
                raise ConfigError(f"run_dir={folder}: overwrite=true would delete {key}={weights}")
        return
    changed = differences(identity(saved), identity(config))
    if changed and config.resume != Resume.force:
        ways = _ways_on(here, saved, config, changed)
        raise ConfigError(f"run_dir={folder}: holds a run with a different {', '.join(changed)}; {ways}")
    if changed and config.training and not here.finished:
        reached = max((row["epoch"] for row in STEPS.read(folder)), default=0)
        if config.epochs < reached:
            raise ConfigError(
                f"run_dir={folder}: is already in epoch {reached} of {saved.epochs}, so it cannot be continued with "
                f"epochs={config.epochs}; overwrite=true starts from scratch"
            )
    if config.resume == Resume.never and not here.finished:
        raise ConfigError(f"run_dir={folder}: holds an unfinished run, and resume=never forbids resuming it")


def _ways_on(here: RunFolder, saved: Config, config: Config, changed: Sequence[str]) -> str:
    """Return which commands are possible in the folder of a run with another config. `resume=force` is one of them only
    if the network of the run can be trained on."""
    replaces = "overwrite=true replaces it"
    another = any(key.startswith("model.") or key in ("dataset.task", "dataset.num_classes") for key in changed)
    if config.training and (another or (here.finished and not checkpoint.exists(here.checkpoints))):
        return f"{replaces}, another run_dir keeps both"
    over = config.training and here.finished and config.epochs <= saved.epochs
    longer = f" with epochs={saved.epochs + 1}" if over else ""
    return f"{replaces}, resume=force{longer} continues it with the new values"


def recorded(file: JsonFile[T], folder: Path) -> T | None:
    """Return what a run recorded before an interruption; None if it recorded nothing.

    Raises:
        UnreadableError: the file cannot be read; the message says what to do.
    """
    try:
        return file.read(folder)
    except UnreadableError as error:
        raise UnreadableError(f"{error}; delete the file to resume; overwrite=true starts from scratch") from error

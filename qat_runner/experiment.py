"""config -> data, model, policy, trainer -> a run. The only room that knows them all.

`prepare` refuses what can be refused without work, and `run` builds everything before it makes the run's folder, so
that a request that cannot be carried out leaves nothing behind.
"""

import logging
import os
import shutil
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from qat_runner.config import (
    BASELINE,
    Config,
    baseline_of,
    clipping_label,
    differences,
    gradient_label,
    identity,
    load_config,
    run_name,
    scaled_lr,
)
from qat_runner.data import AUGMENTATIONS, Data, ImageData, find_dataset, load_dataset
from qat_runner.data.batches import WHOLE
from qat_runner.data.folder import FolderSource
from qat_runner.errors import BusyError, ConfigError, QatError, RunError, StoppedError
from qat_runner.insertion import calibrate, quantized_tensors, summary
from qat_runner.insertion.insert import QuantizationWarning, insert
from qat_runner.models import (
    BERTS,
    MODELS,
    STEMS,
    TORCHVISION,
    build_bert,
    build_model,
    find_weights,
    load_tokenizer,
    load_weights,
    match_weights,
    read_checkpoint,
)
from qat_runner.quant.kernels import choose_backend, set_backend
from qat_runner.report.plots import plot_curves, plot_noise
from qat_runner.training import checkpoint, distributed, lock
from qat_runner.training.lock import RunLock
from qat_runner.training.loop import Trainer
from qat_runner.training.memory import keep_freed_memory
from qat_runner.training.tracking import RECORDED, Record, Silence, environment, read_json, write_json

log = logging.getLogger("qat_runner")

CALIBRATION_EPOCH = 10**6
"""The number of the epoch whose first batches calibrate: one that training never comes to."""


def prepare(config: Config) -> Path:
    """Refuse, without doing any work, what cannot be carried out; returns the run's folder, which may exist or not.

    Raises:
        ConfigError: unknown model or device, absent data or weights, a run folder of another config.
    """
    for key, value, allowed in (
        ("model", config.model.name, (*MODELS, *BERTS)),
        ("model.stem", config.model.stem, STEMS),
        ("dataset.augment", config.dataset.augment, AUGMENTATIONS),
    ):
        if value not in allowed:
            raise ConfigError(f"{key}={value}: must be one of {', '.join(allowed)}")
    device = find_device(config.device)
    world = distributed.world_size()
    if config.batch_size is not None and config.batch_size % world:
        raise ConfigError(f"batch_size={config.batch_size}: must be a multiple of {world}, the number of processes")
    try:
        choose_backend(config.backend, device.type)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    find_dataset(config.dataset, config.data_dir)
    _check_kind(config)
    if config.weights == BASELINE:
        prepare(baseline_of(config))
    elif config.weights is not None:
        _check_weights(config, config.weights, new_head=config.retraining)
    if config.distilling and config.recipe.teacher is not None:
        _check_weights(config, config.recipe.teacher, new_head=False)
    chosen = config.run_dir or str(Path(config.runs_dir) / run_name(config))
    folder = Path(chosen).expanduser()
    _check_folder(folder, config)
    return folder


def _check_kind(config: Config) -> None:
    """Refuse a network that cannot read the data."""
    name = config.model.name
    if (name in BERTS) != config.reads_text:
        fitting = ", ".join(MODELS if name in BERTS else BERTS)
        raise ConfigError(f"model={name}: cannot read dataset={config.dataset.name}, which is for {fitting}")
    if config.reads_text:
        assert config.model.checkpoint is not None
        positions = read_checkpoint(config.model.checkpoint).max_position_embeddings
        if config.dataset.max_length > positions:
            raise ConfigError(
                f"dataset.max_length={config.dataset.max_length}: must be {positions} or less, the positions of "
                f"{config.model.checkpoint}"
            )


def _check_weights(config: Config, weights: str, new_head: bool) -> None:
    """Try the weights on a model without memory."""
    find_weights(weights, config.model.name)
    if weights != TORCHVISION and (config.reads_text or config.dataset.num_classes is not None):
        with torch.device("meta"):
            model = _model(config, config.dataset.num_classes or 0, config.dataset.image_size)
        match_weights(model, weights, config.model.name, new_head=new_head)


def _model(config: Config, num_classes: int, image_size: int) -> nn.Module:
    """The network without quantizers; num_classes and image_size mean nothing to a BERT."""
    if config.reads_text:
        assert config.model.checkpoint is not None
        return build_bert(config.model.checkpoint, pretrained=config.mode == "finetune")
    return build_model(config.model.name, num_classes, image_size, config.model.stem, config.model.width)


def _model_for(config: Config, data: Data) -> nn.Module:
    """`_model`, on the device of the data and in its layout."""
    sizes = (data.num_classes, data.image_size) if isinstance(data, ImageData) else (0, 0)
    model = _model(config, *sizes).to(data.device)
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def find_device(name: str) -> torch.device:
    """auto -> a GPU if there is one, else the CPU; any other name must exist.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto" and torch.cuda.is_available():
        return torch.device("cuda", distributed.local_rank() % torch.cuda.device_count())
    if name == "auto":
        return torch.device("cpu")
    known = {"cpu": 1, "cuda": torch.cuda.device_count()}
    kind, _, index = name.partition(":")
    if kind not in known or (index and not index.isdigit()):
        raise ConfigError(f"device={name}: must be auto, cpu, cuda or cuda:N")
    if int(index or 0) >= known[kind]:
        raise ConfigError(f"device={name}: this machine has {known[kind]} of the kind")
    return torch.device(name)


def _check_folder(folder: Path, config: Config) -> None:
    """Refuse a run folder that holds anything but this run, or under overwrite=true anything but a run."""
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    if not parent.is_dir():
        raise ConfigError(f"run_dir={folder}: {parent} is a file, not a folder")
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"run_dir={folder}: {parent} cannot be written to")
    if not folder.exists():
        return
    content = {path.name for path in folder.iterdir()} - {lock.NAME}  # which may be of one that is just beginning
    if not content:
        return
    foreign = sorted(content - {*RECORDED})
    saved = load_config(folder)
    if saved is None or (config.overwrite and foreign):
        what = "holds no run" if saved is None else f"holds more than a run ({foreign[0]})"
        raise ConfigError(f"run_dir={folder}: {what}, so it is left alone; name a new folder")
    if config.overwrite:
        for key, weights in (("weights", config.weights), ("recipe.teacher", config.recipe.teacher)):
            if weights is not None and Path(weights).resolve().is_relative_to(folder.resolve()):
                raise ConfigError(f"run_dir={folder}: overwrite=true would delete {key}={weights}")
        return
    changed = differences(identity(saved), identity(config))
    if changed and config.resume != "force":
        raise ConfigError(
            f"run_dir={folder}: holds a run with another {', '.join(changed)}; overwrite=true replaces it, "
            f"resume=force goes on with it as it is now asked for"
        )
    if config.resume == "never" and not (folder / "summary.json").is_file():
        raise ConfigError(f"run_dir={folder}: holds an unfinished run, and resume=never forbids to go on with it")


def run(config: Config) -> dict[str, Any]:
    """Carry out a run, or go on with it, or look up its result where it is finished.

    Returns:
        The content of summary.json.

    Raises:
        ConfigError: it cannot be carried out; no folder was made.
        RunError: it broke off; its folder keeps what was recorded.
        BusyError: another process is at work on it.
    """
    folder = prepare(config)
    with distributed.group(config.distributed_timeout):
        result = distributed.on_main(lambda: _finished(config, folder))
        if result is not None:
            log.info(f"{folder} is finished already (overwrite=true starts anew)")
            return result
        with _locked(folder):
            return _run(config, folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """While open, the folder is this run's own, and is there."""
    with ExitStack() as stack:

        def enter() -> None:
            try:
                stack.enter_context(RunLock(folder))
            except OSError as error:
                raise ConfigError(f"run_dir={folder}: cannot be written ({error.strerror})") from error

        distributed.on_main(enter)
        yield


def _finished(config: Config, folder: Path) -> dict[str, Any] | None:
    """The result of a run of this very config, if it is finished and is not to be begun anew."""
    saved = load_config(folder)
    if config.overwrite or saved is None or not (folder / "summary.json").is_file():
        return None
    if differences(identity(saved), identity(config)):  # resume=force
        return None
    result: dict[str, Any] = read_json(folder / "summary.json")
    return result


def _run(config: Config, folder: Path) -> dict[str, Any]:
    """`run`, in a folder that is this process's own."""
    weights = config.weights
    if weights == BASELINE:
        weights = str(_baseline(config) / "checkpoints" / checkpoint.LAST)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", QuantizationWarning)
        model, data = build(config, weights)
        teacher = _teacher(config, data, config.recipe.teacher or weights) if config.distilling else None
    distributed.on_main(lambda: _clear(config, folder))
    notes = [str(w.message) for w in caught if issubclass(w.category, QuantizationWarning)]
    return _carry_out(config, folder, model, data, teacher, notes)


def _clear(config: Config, folder: Path) -> None:
    """Remove what is out of date: all, if the run is to begin anew, and what tells of its end in any case."""
    for name in RECORDED if config.overwrite else ("summary.json", "error.txt"):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _baseline(config: Config) -> Path:
    """The folder of the finished full-precision run that goes with a config; waits for whoever is training it."""
    baseline = baseline_of(config)
    folder = prepare(baseline)
    waiting = False
    while not (folder / "summary.json").is_file():
        try:
            if not waiting:
                log.info(f"first the full-precision baseline, {folder}")
            _run_beside(baseline, folder)
        except BusyError as error:
            if not waiting:
                log.info(f"{error}: waiting for it")
            waiting = True
            time.sleep(5)
    return folder


def _run_beside(config: Config, folder: Path) -> None:
    """`run` where the processes know each other already."""
    with _locked(folder):
        if distributed.on_main(lambda: _finished(config, folder)) is None:
            _run(config, folder)


def build(config: Config, weights: str | None) -> tuple[nn.Module, Data]:
    """The data and the model of a run, weights loaded, quantizers in place and calibrated.

    Args:
        config: resolved.
        weights: as config.weights, "baseline" replaced by a file.

    Raises:
        ConfigError: data or weights turn out not to fit.
    """
    device = find_device(config.device)
    shard = distributed.shard()
    checkpoint.seed_everything(config.seed)
    set_backend(config.backend, device.type)
    keep_freed_memory()
    tokenizer = load_tokenizer(config.model.checkpoint) if config.model.checkpoint and config.reads_text else None
    data = load_dataset(config.dataset, config.data_dir, device, config.seed, config.channels_last, tokenizer, shard)
    model = _model_for(config, data)
    example = next(data.train_batches(2, epoch=0, limit=1)).inputs  # real samples: it is seen what the model does
    try:
        insert(model, config.policy, example)
    except (RuntimeError, ValueError) as error:  # a picture too small for the network, a batch too small for BatchNorm
        raise ConfigError(
            f"model={config.model.name}: cannot take a batch of {config.dataset.name} ({' '.join(str(error).split())})"
        ) from error
    if weights is not None:
        loaded = load_weights(model, weights, config.model.name, new_head=config.retraining)
        log.info(f"weights {weights}: {loaded}")
    if config.needs_calibration:
        _calibrate(config, model, data)
    for tensor in quantized_tensors(model):
        if not (config.training or tensor.quantizer.ready):
            raise ConfigError(
                f"weights={weights}: holds no clipping scalars for {tensor.name} at these bits, which "
                f"clipping={clipping_label(config)} wants to be given; mode=ptq calibrates them"
            )
    if config.sync_batchnorm:
        distributed.synchronize_batchnorm(model)
    distributed.follow_main(model)
    if shard.rank > 0:  # its own dropout
        checkpoint.seed_everything(config.seed + 2**32 * shard.rank)
    return model, data


def _teacher(config: Config, data: Data, weights: str | None) -> nn.Module:
    """The full-precision network that a distilled one learns from, in eval mode."""
    assert weights is not None
    teacher = _model_for(config, data)
    loaded = load_weights(teacher, weights, config.model.name, new_head=False)
    log.info(f"teacher {weights}: {loaded}")
    return teacher.eval().requires_grad_(False)


def _calibrate(config: Config, model: nn.Module, data: Data) -> None:
    """Section 5: mean scalars of a few random training batches; those of an epoch that training never uses."""
    assert config.batch_size is not None
    whole = replace(data, shard=WHOLE)  # type: ignore[type-var]  # every process sees the same batches
    batches = whole.train_batches(config.batch_size, CALIBRATION_EPOCH, config.clipping.calibration_batches)
    try:
        used = calibrate(model, (batch.inputs for batch in batches))
    except ValueError as error:
        raise ConfigError(f"calibration failed: {error}") from error
    log.info(f"scalars calibrated on {used} training batches of {config.batch_size}")


def _carry_out(
    config: Config, folder: Path, model: nn.Module, data: Data, teacher: nn.Module | None, notes: list[str]
) -> dict[str, Any]:
    """Train or evaluate what has been built, on the record; what goes wrong is told in a sentence, and in error.txt."""
    with ExitStack() as stack:
        try:
            if distributed.is_main():
                stack.enter_context(_log_to(folder / "log.txt"))
            checkpoints = folder / "checkpoints"
            saved = checkpoint.newest(checkpoints) if config.training and checkpoint.exists(checkpoints) else None
            record = stack.enter_context(closing(_open_record(folder, config, saved)))
            trainer = Trainer(config, model, data, record, teacher)
            _describe(config, folder, model, notes)
            if config.training:
                log.info(_recipe(config))
            if saved is not None:
                trainer.resume(saved)
                step = f", step {trainer.state.step} of the next" if trainer.state.step else ""
                log.info(f"going on after epoch {trainer.state.epoch} of {config.epochs}{step}")
            if config.training:
                trainer.fit()
            else:
                trainer.evaluate()
            result = _summarize(config, trainer)
            if distributed.is_main():
                plot_curves(folder)
                plot_noise(folder)
                write_json(folder / "summary.json", result)
            return result
        except (StoppedError, KeyboardInterrupt):
            raise
        except Exception as error:
            told = _in_a_sentence(error, config, folder)
            with suppress(OSError):
                (folder / "error.txt").write_text(f"{told}\n\n{traceback.format_exc()}")
            if told is error:
                raise
            raise told from error


def _in_a_sentence(error: Exception, config: Config, folder: Path) -> QatError:
    if isinstance(error, QatError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return RunError(f"out of memory on {config.device}: a smaller batch_size (now {config.batch_size}) needs less")
    if isinstance(error, OSError):
        return RunError(f"{folder}: writing failed ({error}); what was recorded before is intact")
    where = folder / "error.txt"
    return RunError(f"{folder}: internal error ({type(error).__name__}: {' '.join(str(error).split())}), see {where}")


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Write to a file, too, what is told on the terminal."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def _open_record(folder: Path, config: Config, saved: dict[str, Any] | None) -> Record:
    """The record of a run that begins, or goes on from a checkpoint; in all processes but the main one, of nothing."""
    if not distributed.is_main():
        return Silence(folder)
    OmegaConf.save(OmegaConf.structured(config.with_fingerprints()), folder / "config.yaml")
    _record_environment(folder / "environment.json", resuming=saved is not None)
    state = {"epoch": -1, "step": 0} if saved is None else saved["state"]
    return Record(folder, state["epoch"], state["step"])


def _record_environment(path: Path, resuming: bool) -> None:
    """What the run began in; and, under "resumed", what each later sitting went on in."""
    now = environment()
    if not (resuming and path.is_file()):
        write_json(path, now)
        return
    first = read_json(path)
    first.setdefault("resumed", []).append(now)
    for key in ("packages", "git", "machine"):
        if now[key] != first[key]:
            log.warning(f"going on with other {key} than the run began with: numbers may differ from an unbroken run's")
    write_json(path, first)


def _describe(config: Config, folder: Path, model: nn.Module, notes: list[str]) -> None:
    table = summary(model)
    count = len(quantized_tensors(model))
    if distributed.is_main():
        (folder / "quantizers.txt").write_text("\n".join([table, *notes]) + "\n")
    log.info(f"run folder {folder}")
    if count:
        log.info(f"{config.model.name}, {count} quantized tensors")
        log.debug(table)  # a sweep's terminal is spared it, quantizers.txt has it
    else:
        log.info(f"{config.model.name} in full precision")
    for note in notes:
        log.warning(note)


def _recipe(config: Config) -> str:
    """Batch size and learning rate, and the rule that they follow."""
    stage = config.stage
    assert config.batch_size is not None
    told = f"batch size {config.batch_size}, lr {config.lr:g}"
    if (config.batch_size, config.lr) == (stage.batch_size, stage.lr):
        return f"{told}: the recipe's, whatever the number of devices"
    law = "the square root of the batch size" if stage.optimizer == "adamw" else "the batch size"
    rule = f"in proportion to {law}" if config.lr == scaled_lr(stage, config.batch_size) else "set"
    return f"{told} ({rule}; the recipe has {stage.lr:g} at {stage.batch_size})"


def _summarize(config: Config, trainer: Trainer) -> dict[str, Any]:
    state = trainer.state
    mses = [row.mse for row in trainer.noise]
    sqnr = trainer.mean_sqnr()
    source = trainer.data.source if isinstance(trainer.data, ImageData) else None
    corrupt = source.corrupt if isinstance(source, FolderSource) and config.dataset.skip_corrupt else None
    return {
        "model": config.model.name,
        "dataset": config.dataset.name,
        "bits": config.weight_bits
        if config.weight_bits == config.activation_bits
        else f"{config.weight_bits}/{config.activation_bits}",
        "weight_bits": config.weight_bits,
        "activation_bits": config.activation_bits,
        "clipping": clipping_label(config),
        "gradient": gradient_label(config),
        "distilled": config.distilling,
        "mode": config.mode,
        "seed": config.seed,
        "metric": trainer.data.metric,
        **{key: value for key, value in state.val.items() if key != "samples"},
        f"best_{trainer.data.metric}": state.best,
        "epochs": state.epoch,
        "steps": state.steps,
        "samples_per_second": state.samples_per_second,
        "seconds": state.seconds,
        "sqnr_db": sqnr if sqnr == sqnr else None,
        "quantization_mse": sum(mses) / len(mses) if mses else None,
        **({"corrupt_pictures": len(corrupt)} if corrupt is not None else {}),
        "run_dir": str(trainer.record.folder),
    }

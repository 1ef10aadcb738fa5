"""config -> data, model, policy, trainer -> a run. The only room that knows them all.

`prepare` refuses what can be refused without work, and `run` builds everything before it makes the run's folder, so
that a request that cannot be carried out leaves nothing behind.
"""

import logging
import os
import shutil
import warnings
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
from qat_runner.errors import ConfigError, QatError, RunError
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
from qat_runner.training import checkpoint
from qat_runner.training.loop import Trainer
from qat_runner.training.memory import keep_freed_memory
from qat_runner.training.tracking import RECORDED, Record, environment, read_json, write_json

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
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    if not folder.exists() or not any(folder.iterdir()):
        return
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in RECORDED)
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
    if changed:
        raise ConfigError(
            f"run_dir={folder}: holds a run with another {', '.join(changed)}; overwrite=true replaces it"
        )


def run(config: Config) -> dict[str, Any]:
    """Carry out a run, or go on with it, or look up its result where it is finished.

    Returns:
        The content of summary.json.

    Raises:
        ConfigError: it cannot be carried out; no folder was made.
        RunError: it broke off; its folder keeps what was recorded.
    """
    folder = prepare(config)
    finished = folder / "summary.json"
    if finished.is_file() and not config.overwrite:
        log.info(f"{folder} is finished already (overwrite=true starts anew)")
        result: dict[str, Any] = read_json(finished)
        return result
    weights = config.weights
    if weights == BASELINE:
        weights = str(_baseline(config) / "checkpoints" / "last.pt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", QuantizationWarning)
        model, data = build(config, weights)
        teacher = _teacher(config, data, config.recipe.teacher or weights) if config.distilling else None
    if config.overwrite and folder.exists():
        shutil.rmtree(folder)  # nothing but a run: `prepare` has looked
    notes = [str(w.message) for w in caught if issubclass(w.category, QuantizationWarning)]
    return _carry_out(config, folder, model, data, teacher, notes)


def _baseline(config: Config) -> Path:
    """The folder of the finished full-precision run that goes with a config."""
    baseline = baseline_of(config)
    folder = prepare(baseline)
    if not (folder / "summary.json").is_file():
        log.info(f"first the full-precision baseline, {folder}")
        run(baseline)
    return folder


def build(config: Config, weights: str | None) -> tuple[nn.Module, Data]:
    """The data and the model of a run, weights loaded, quantizers in place and calibrated.

    Args:
        config: resolved.
        weights: as config.weights, "baseline" replaced by a file.

    Raises:
        ConfigError: data or weights turn out not to fit.
    """
    device = find_device(config.device)
    checkpoint.seed_everything(config.seed)
    set_backend(config.backend, device.type)
    keep_freed_memory()
    tokenizer = load_tokenizer(config.model.checkpoint) if config.model.checkpoint and config.reads_text else None
    data = load_dataset(config.dataset, config.data_dir, device, config.seed, config.channels_last, tokenizer)
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
    batches = data.train_batches(config.batch_size, CALIBRATION_EPOCH, config.clipping.calibration_batches)
    try:
        used = calibrate(model, (batch.inputs for batch in batches))
    except ValueError as error:
        raise ConfigError(f"calibration failed: {error}") from error
    log.info(f"scalars calibrated on {used} training batches of {config.batch_size}")


def _carry_out(
    config: Config, folder: Path, model: nn.Module, data: Data, teacher: nn.Module | None, notes: list[str]
) -> dict[str, Any]:
    resuming = config.training and (folder / "checkpoints" / "last.pt").is_file()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(folder / "log.txt")
    except OSError as error:
        raise ConfigError(f"run_dir={folder}: cannot be written ({error.strerror})") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    record: Record | None = None
    try:
        OmegaConf.save(OmegaConf.structured(config.with_fingerprints()), folder / "config.yaml")
        _record_environment(folder / "environment.json", resuming)
        record = Record(folder, epoch=_epochs_done(folder) if resuming else -1)
        trainer = Trainer(config, model, data, record, teacher)
        _describe(config, folder, model, notes)
        if config.training:
            log.info(_recipe(config))
        if resuming:
            trainer.resume()
            log.info(f"going on after epoch {trainer.state.epoch} of {config.epochs}")
        if config.training:
            trainer.fit()
        else:
            trainer.evaluate()
        result = _summarize(config, trainer)
        plot_curves(folder)
        plot_noise(folder)
        write_json(folder / "summary.json", result)
        return result
    except (QatError, KeyboardInterrupt):
        raise
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"out of memory on {data.device}: a smaller batch_size (now {config.batch_size}) needs less"
        ) from error
    except OSError as error:
        raise RunError(f"{folder}: writing failed ({error}); what was recorded before is intact") from error
    finally:
        if record is not None:
            record.close()
        log.removeHandler(handler)
        handler.close()


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


def _epochs_done(folder: Path) -> int:
    return int(checkpoint.load(folder / "checkpoints" / "last.pt")["state"]["epoch"])


def _describe(config: Config, folder: Path, model: nn.Module, notes: list[str]) -> None:
    table = summary(model)
    count = len(quantized_tensors(model))
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
        "run_dir": str(trainer.record.folder),
    }

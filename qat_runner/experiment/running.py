"""Carrying out a run: lock the folder, build everything, train or measure, and write the results."""

import logging
import math
import shlex
import shutil
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from qat_runner import distributed, ranks
from qat_runner.config import (
    AUTO,
    BASELINE,
    Config,
    Mode,
    Optimizer,
    allocation_of,
    baseline_of,
    clipping_label,
    differences,
    gradient_label,
    identity,
    load_config,
    plain,
    rules_of,
    run_name,
    scaled_lr,
)
from qat_runner.config.composing import command, quoted
from qat_runner.data import Data
from qat_runner.errors import (
    BusyError,
    ConfigError,
    QatError,
    RunError,
    StoppedError,
    UnreadableError,
    os_error_message,
)
from qat_runner.experiment import allocating
from qat_runner.experiment.building import build, find_device, load_teacher, try_policy
from qat_runner.experiment.checks import preflight, recorded
from qat_runner.insertion import quantized_share, quantized_tensors, summary
from qat_runner.insertion.insert import QuantizationWarning
from qat_runner.insertion.size import mean_bits, size_mb
from qat_runner.quant import NotCalibratedError
from qat_runner.runs.environment import environment, job, put_back
from qat_runner.runs.files import TEMPORARY, becomes, open_own, write_text
from qat_runner.runs.folder import RunFolder
from qat_runner.runs.lock import RunLock
from qat_runner.runs.record import NullRecord, Record
from qat_runner.runs.records import ENVIRONMENT, SUMMARY, Summary
from qat_runner.runs.trackers import Tracked
from qat_runner.training import checkpoint
from qat_runner.training.histograms import record_histograms
from qat_runner.training.loop import Trainer

PATIENCE = 2.0
"""Seconds between two checks of a run that another process is carrying out."""
log = logging.getLogger("qat_runner")


def run(config: Config) -> Summary:
    """Carry out a run, resume it, or read its result if it is finished.

    Returns:
        The content of summary.json.

    Raises:
        ConfigError: the run cannot be carried out; no folder was created.
        RunError: the run failed; its folder keeps what was recorded.
        BusyError: another process is carrying out the run.
    """
    folder = preflight(config)
    with distributed.group(config.distributed_timeout):
        if distributed.on_main(lambda: _already_overwritten(config, folder)):
            config = replace(config, overwrite=False)
        result = distributed.on_main(lambda: finished(config, folder))
        if result is not None:
            return result
        with _locked(folder), _reporting_failures(config, folder):
            result = distributed.on_main(lambda: _result(config, folder))  # of the process that held the lock before
            return _run(config, folder) if result is None else result


def run_after_others(config: Config) -> Summary:
    """Like `run`, but wait while another process carries the run out, and resume it if that leaves it unfinished."""
    waiting = False
    while True:
        try:
            return run(config)
        except BusyError as error:
            if not waiting:
                log.info(f"{error}: waiting for it")
            waiting = True
            time.sleep(PATIENCE)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Context in which the folder exists and is locked for this run."""
    with ExitStack() as stack:

        def enter() -> None:
            try:
                stack.enter_context(RunLock(folder))
            except OSError as error:
                raise ConfigError(f"run_dir={folder}: cannot be written ({error.strerror})") from error

        distributed.on_main(enter)
        yield


def _already_overwritten(config: Config, folder: Path) -> bool:
    """Return whether overwrite=true has already taken effect: the job of this process has started the run before."""
    if not (config.overwrite and put_back()):
        return False
    with suppress(UnreadableError):
        begun = ENVIRONMENT.read(folder)
        return begun is not None and begun.get("job") == job()
    return False


def finished(config: Config, folder: Path) -> Summary | None:
    """Return, and log, the result of a run of the same config if it is finished and is not to be overwritten.

    Raises:
        ConfigError: the run was trained to its end with other keys.
        UnreadableError: its result cannot be read.
    """
    result = _result(config, folder)
    if result is not None:
        log.info(f"{folder} is finished already (overwrite=true starts from scratch)")
    return result


def _result(config: Config, folder: Path) -> Summary | None:
    """Like `finished`, but without logging."""
    saved = load_config(folder)
    if config.overwrite or saved is None or not RunFolder(folder).finished:
        return None
    if changed := differences(identity(saved), identity(config)):  # resume=force
        if config.training and config.epochs <= saved.epochs:
            raise ConfigError(
                f"run_dir={folder}: has been trained to its end, so a different {', '.join(changed)} would change "
                f"nothing; epochs={saved.epochs + 1} continues it, overwrite=true starts from scratch"
            )
        return None
    return recorded(SUMMARY, folder)


def _run(config: Config, folder: Path) -> Summary:
    """Carry out `run` in a folder that this process has locked."""
    weights = config.weights
    if weights == BASELINE:
        weights = str(
            RunFolder(_finished_first(baseline_of(config), config, "the full-precision baseline")).checkpoints
            / checkpoint.LAST
        )
    if config.policy == AUTO:
        untrained = (
            f"bits=auto: bit-widths are chosen for trained weights, and mode={config.mode} has none, so they are "
            f"chosen for those of the full-precision baseline; mode=retrain with weights=FILE chooses them for a "
            f"file instead"
        )
        why = untrained if config.weights is None else None
        chosen = RunFolder(_finished_first(allocation_of(config), config, "the bit allocation", why)).policy
        config = replace(config, allocated=rules_of(str(chosen)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", QuantizationWarning)
        model, data = build(config, weights)
        teacher = load_teacher(config, data, weights) if config.distilling else None
    notes = [str(w.message) for w in caught if issubclass(w.category, QuantizationWarning)]
    if config.mode == Mode.allocate:
        problem = allocating.problem_of(config, model, data)
        distributed.on_main(lambda: _clear(config, folder))
        with _recorded(config, folder), _log_notes_once(notes):
            return _choose_bits(config, folder, model, data, weights, problem)
    trainer = Trainer(config, model, data, NullRecord(folder), teacher)
    if config.training and not config.overwrite and distributed.on_main(lambda: RunFolder(folder).finished):
        _check_goes_on(folder, trainer)
    distributed.on_main(lambda: _clear(config, folder))
    return _carry_out(config, folder, trainer, notes)


def _check_goes_on(folder: Path, trainer: Trainer) -> None:
    """Check that a finished run can be continued, as resume=force asks for, before anything of it is deleted.

    Raises:
        ConfigError: no checkpoint is undamaged and fits.
    """
    try:
        checkpoint.newest(RunFolder(folder).checkpoints, trainer.resume)
    except RunError as error:
        raise ConfigError(f"run_dir={folder}: is finished and cannot be continued: {error}") from error


def _clear(config: Config, folder: Path) -> None:
    """Delete outdated files: everything if the run starts from scratch, otherwise the result and error of its end."""
    own = RunFolder(folder)
    # In this order, a run killed in between is never taken for finished, resumed without its records, or seen as
    # foreign.
    first, last = (folder / SUMMARY.name, own.checkpoints), own.config
    rest = [path for path in own.contents if path not in (*first, last)]
    for path in (*first, *rest, last) if config.overwrite else (folder / SUMMARY.name, own.error):
        _remove(path)
        _remove(path.with_name(f"{path.name}{TEMPORARY}"))
    ours = {path.name for path in own.contents}
    for left in folder.glob(f"*{TEMPORARY}"):  # left by killed processes; exporting cleans up its own folder
        if becomes(left.name) in ours and not left.is_dir():
            left.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    """Delete a file or folder; of a link to a folder, which may lie on a larger disk, only delete the content."""
    if path.is_symlink() and path.is_dir():
        for inside in path.iterdir():
            _remove(inside) if not inside.is_symlink() else inside.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _finished_first(needed: Config, config: Config, what: str, why: str | None = None) -> Path:
    """Return the folder of a run that another run depends on; carry the run out first, or wait for it, if unfinished.

    Args:
        needed: the config of the run to finish first.
        config: the config of the run that depends on it; it is checked before the other run starts.
        what: description of the needed run for the log.
        why: a further sentence for the log, if the run is carried out.
    """
    folder = preflight(needed)
    if not distributed.on_main(lambda: RunFolder(folder).finished):
        _try(config)
        if why is not None:
            log.info(why)
        log.info(f"first, {what}: {folder}")
        if ranks.is_main() and (request := command(needed)) is not None:
            place = [] if needed.runs_dir == Config.runs_dir else [f"runs_dir={quoted(needed.runs_dir)}"]
            same = " ".join([request, *map(shlex.quote, place)])
            log.info(f"it takes the keys that apply to it from this run, so it is the same as: {same}")
        run_after_others(needed)
    return folder


def _try(config: Config) -> None:
    """Reject what building would reject, before another run is carried out for this one; keeps nothing in memory."""
    model, data = try_policy(config)
    if config.allocating:
        allocating.problem_of(config if config.mode == Mode.allocate else allocation_of(config), model, data)


def _choose_bits(
    config: Config, folder: Path, model: nn.Module, data: Data, weights: str | None, problem: allocating.Problem
) -> Summary:
    """Choose the bit allocation for the built network, and write the records."""
    _record_environment(folder, resuming=False)
    log.info(f"run folder {folder}")
    result = allocating.carry_out(config, folder, model, data, weights, run, problem)
    SUMMARY.write(folder, result)
    return result


@contextmanager
def _log_notes_once(notes: Sequence[str]) -> Iterator[None]:
    """Log notes about a network; while open, candidate runs write the same notes only to their own logs."""
    for note in notes:
        log.warning(note)

    def is_new(record: logging.LogRecord) -> bool:
        return record.getMessage() not in notes

    handlers = [*log.handlers]
    try:
        for handler in handlers:
            handler.addFilter(is_new)
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_new)


@contextmanager
def _recorded(config: Config, folder: Path) -> Iterator[None]:
    """Write the config to the folder; while open, also copy the log messages to it."""
    if not ranks.is_main():
        yield
        return
    write_text(RunFolder(folder).config, OmegaConf.to_yaml(OmegaConf.structured(config.with_fingerprints())))
    with _log_to(RunFolder(folder).log):
        yield


def _carry_out(config: Config, folder: Path, trainer: Trainer, notes: list[str]) -> Summary:
    """Train or evaluate the built network, and write the records."""
    model, data = trainer.model, trainer.data
    with ExitStack() as stack:
        stack.enter_context(_recorded(config, folder))
        checkpoints = RunFolder(folder).checkpoints
        resuming = config.training and distributed.on_main(lambda: checkpoint.exists(checkpoints))
        saved = checkpoint.newest(checkpoints, trainer.resume) if resuming else None
        trainer.record = stack.enter_context(closing(_open_record(config, folder, saved)))
        _describe(config, folder, model, notes)
        for note in data.notes:
            log.info(f"{config.dataset.name}: {note}")
        if config.preprocessed:
            log.info(_preprocessing(config))
        if config.training:
            log.info(_recipe(config))
        count = sum(t.tensor == "weight" for t in quantized_tensors(model))
        if trainer.oscillations is not None:
            log.info(f"codes of {len(trainer.oscillations.weights)} of {count} quantized weights are tracked")
        if trainer.dampening is not None:
            log.info(f"{len(trainer.dampening.weights)} of {count} quantized weights are dampened")
        if saved is not None:
            step = f", step {trainer.state.step} of the next" if trainer.state.step else ""
            log.info(f"resuming after epoch {trainer.state.epoch} of {config.epochs}{step}")
        if config.training:
            trainer.fit()
        else:
            trainer.evaluate()
        result = _summarize(config, trainer)
        if ranks.is_main():
            record_histograms(folder, config, trainer.measured, data)
            from qat_runner.training.plots import plot_curves, plot_noise  # matplotlib is slow to import

            plot_curves(folder, config.task)
            plot_noise(folder)
            SUMMARY.write(folder, result)
            trainer.record.close(result)
        trainer.stop_if_asked()
        return result


@contextmanager
def _reporting_failures(config: Config, folder: Path) -> Iterator[None]:
    """While open, turn each failure into one sentence, and write it to error.txt with the traceback."""
    file = RunFolder(folder).error
    earlier = file.read_bytes() if ranks.is_main() and file.is_file() else None
    if earlier is not None:
        file.unlink()
    try:
        yield
    except ConfigError:  # nothing has been done, so the earlier error stays
        if earlier is not None:
            file.write_bytes(earlier)
        raise
    except (StoppedError, BusyError):
        raise
    except Exception as error:
        reported = _as_sentence(error, config, folder)
        # "x": with several processes only the first reason counts; the others only report that they lost the first one
        with suppress(OSError), open_own(file, "x") as out:
            out.write(f"{reported}\n\n{traceback.format_exc()}")
        if reported is error:
            raise
        raise reported from error


def _as_sentence(error: Exception, config: Config, folder: Path) -> QatError:
    if isinstance(error, QatError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return RunError(f"out of memory on {find_device(config.device)}: {_what_needs_less(config)}")
    if isinstance(error, NotCalibratedError):
        return RunError(str(error))
    if isinstance(error, OSError):
        return RunError(f"{folder}: failed ({os_error_message(error)}); what was recorded before is intact")
    where = RunFolder(folder).error
    return RunError(f"{folder}: internal error ({type(error).__name__}: {' '.join(str(error).split())}), see {where}")


def _what_needs_less(config: Config) -> str:
    """Return which keys reduce memory in this mode."""
    if config.mode == Mode.allocate:
        return f"a smaller allocation.batch_size (now {config.allocation.batch_size}) needs less"
    validation = f"a smaller dataset.val_batch_size (now {config.dataset.val_batch_size})"
    if config.training:
        training = f"a larger accumulate (now {config.accumulate}) or a smaller batch_size (now {config.batch_size})"
        return f"{training} needs less, and in validation {validation}"
    if config.needs_calibration:
        size = config.clipping.calibration_batch_size
        return f"{validation} needs less, and in calibration a smaller clipping.calibration_batch_size (now {size})"
    return f"{validation} needs less"


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """While open, copy the log messages of the terminal to a file."""
    handler = logging.StreamHandler(open_own(path, "a"))
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.stream.close()


def _open_record(config: Config, folder: Path, saved: dict[str, Any] | None) -> Record:
    """Return the record of a run that starts or resumes; outside the main process, one that writes nothing."""
    if not ranks.is_main():
        return NullRecord(folder)
    _record_environment(folder, resuming=saved is not None)
    state = {"epoch": -1, "step": 0} if saved is None else saved["state"]
    return Record(Tracked(run_name(config), folder, plain(config), state["epoch"]), state["step"], config.trackers)


def _record_environment(folder: Path, resuming: bool) -> None:
    """Record the environment in which the run started and, under "resumed", that of each later start."""
    now = environment()
    first = recorded(ENVIRONMENT, folder) if resuming else None
    if first is None:
        ENVIRONMENT.write(folder, {**now, "resumed": []})
        return
    first.setdefault("resumed", []).append(now)
    for key in ("packages", "git", "machine"):
        if now[key] != first[key]:
            log.warning(f"resuming with different {key}: results may differ from those of an uninterrupted run")
    ENVIRONMENT.write(folder, first)


def _describe(config: Config, folder: Path, model: nn.Module, notes: list[str]) -> None:
    table = summary(model)
    count = len(quantized_tensors(model))
    if ranks.is_main():
        write_text(RunFolder(folder).quantizers, "\n".join([table, *notes]) + "\n")
    log.info(f"run folder {folder}")
    if count:
        log.info(f"{config.model.name}, {count} quantized tensors")
        log.debug(table)  # keeps sweeps short on the terminal; quantizers.txt has the table
    else:
        log.info(f"{config.model.name} in full precision")
    for note in notes:
        log.warning(note)


def _preprocessing(config: Config) -> str:
    """Describe the preprocessing of images for the model."""
    dataset = config.dataset
    crop = f", center-cropped from {dataset.resize_size}" if dataset.resize_size else ""
    given = f" ({', '.join(config.given)} as set)" if config.given else ""
    return (
        f"preprocessing of {config.model.name}: images of {dataset.image_size} pixels per side{crop}, "
        f"{dataset.interpolation}, mean {dataset.mean}, std {dataset.std}{given}"
    )


def _recipe(config: Config) -> str:
    """Describe batch size and learning rate, the rule they follow, and how much of a batch is seen at a time."""
    stage = config.stage
    sizes = f"batch size {config.batch_size}, lr {config.lr:g}"
    if config.epochs <= stage.warmup_epochs:
        sizes += f" (never reached: warmup_epochs={stage.warmup_epochs:g} of epochs={config.epochs})"
    if (config.batch_size, config.lr) == (stage.batch_size, stage.lr):
        return f"{sizes}: the recipe's, for any number of devices{_seen_at_a_time(config)}"
    law = "the square root of the batch size" if stage.optimizer == Optimizer.adamw else "the batch size"
    rule = f"in proportion to {law}" if config.lr == scaled_lr(stage, config.batch_size) else "set"
    return f"{sizes} ({rule}; the recipe has {stage.lr:g} at {stage.batch_size}){_seen_at_a_time(config)}"


def _seen_at_a_time(config: Config) -> str:
    """Describe over how many samples BatchNorm and activations' scalars are computed, beside the published number."""
    published, world = config.recipe.device_batch, ranks.world_size()
    if published is None or config.clipping.sync or config.sync_batchnorm:
        return ""
    own = config.batch_size // world
    seen = math.ceil(own / config.accumulate)
    share = f"; BatchNorm and activations' scalars see {seen} samples at a time"
    if seen == published:
        return f"{share}, as published"
    remedy = f" (accumulate={own // published} restores that)" if own % published == 0 else ""
    return f"{share}, but {published} in the published recipe{remedy}"


def _summarize(config: Config, trainer: Trainer) -> Summary:
    state = trainer.state
    mses = [row.mse for row in trainer.noise]
    activations = {t.quantizer.mode for t in quantized_tensors(trainer.measured) if t.tensor != "weight"}
    became_static = "static" in activations and (config.freezing or "dynamic" not in activations)
    sqnr = trainer.mean_sqnr()
    quantized_mb, full_mb = size_mb(trainer.measured)
    share = quantized_share(trainer.measured)
    mean_weights, mean_activations = (mean_bits(trainer.measured, weights) for weights in (True, False))
    corrupt = trainer.data.corrupt
    if corrupt is not None:
        corrupt = set().union(*distributed.all_gather(corrupt))
    result: Summary = {
        "model": config.model.name,
        "dataset": config.dataset.name,
        "bits": config.bits_label,
        "weight_bits": config.weight_bits,
        "activation_bits": config.activation_bits,
        "mean_weight_bits": mean_weights,
        "mean_activation_bits": mean_activations,
        "clipping": clipping_label(config, became_static=became_static),
        "gradient": gradient_label(config),
        "distilled": config.distilling,
        "mode": config.mode,
        "seed": config.seed,
        "processes": ranks.world_size(),
        "metric": trainer.metric,
        "epochs": state.epoch,
        "steps": state.steps,
        "samples_per_second": state.samples_per_second,
        "seconds": state.seconds,
        "sqnr_db": sqnr if sqnr == sqnr else None,
        "size_mb": quantized_mb,
        "fp32_size_mb": full_mb,
        "quantized_macs": None if share is None else 100 * share,
        "quantization_mse": sum(mses) / len(mses) if mses else None,
        "run_dir": str(trainer.record.folder),
    }
    if corrupt is not None:
        result["corrupt_pictures"] = len(corrupt)
    if remedies := config.remedy_labels:
        result["remedies"] = remedies
    if config.reestimating:
        result["batchnorm_batches"] = trainer.reestimation_batches
        result["before_reestimation"] = state.before_reestimation
    result.update(trainer.oscillating())  # type: ignore[typeddict-item]
    figures: Any = {key: value for key, value in state.val.items() if key != "samples"}
    figures[f"best_{trainer.metric}"] = state.best
    result.update(figures)
    return result

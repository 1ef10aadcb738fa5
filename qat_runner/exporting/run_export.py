"""Export of a run to files of integers, each of which is checked on the validation set before it is kept."""

import copy
import functools
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat_runner.config import (
    BASELINE,
    PRETRAINED,
    TORCHVISION,
    Config,
    Mode,
    baseline_of,
    clipping_label,
    load_config,
    path_of,
    rules_of,
    run_folder,
)
from qat_runner.data import Data
from qat_runner.data.batches import unsharded
from qat_runner.errors import ConfigError, RunError, one_line
from qat_runner.experiment import CALIBRATION_EPOCH, build
from qat_runner.exporting import FORMATS, verify
from qat_runner.exporting.agreement import Figures, require
from qat_runner.exporting.export_summary import FUSED
from qat_runner.exporting.folding import fold_batchnorm
from qat_runner.exporting.formats import (
    Signature,
    read_program,
    read_safetensors,
    several_samples,
    write_onnx,
    write_program,
    write_safetensors,
)
from qat_runner.exporting.integer import check_integers, to_integers
from qat_runner.insertion import freeze, quantized_tensors, remove_quantizers
from qat_runner.insertion.size import mean_bits
from qat_runner.policy import FREEZING
from qat_runner.runs.environment import environment
from qat_runner.runs.files import TEMPORARY, exchange, explaining_full_disk
from qat_runner.runs.folder import RunFolder
from qat_runner.runs.lock import RunLock
from qat_runner.runs.records import EXPORT, Export
from qat_runner.tasks import joined, task_of
from qat_runner.training.checkpoint import LAST, is_whole

log = logging.getLogger("qat_runner")

STATIC = "static"
"""The rule of a run whose activations already have constant scalars: static, perhaps since some epoch, or learned."""

DEFAULT_RULE = "averaged"


@dataclass(frozen=True)
class Request:
    """What to export, and how."""

    run: Path
    """the folder of the run"""
    out: Path
    """the folder to write"""
    rule: str | None = None
    """a rule of `freeze`; None: keep the constant scalars that the run already has, or otherwise DEFAULT_RULE"""
    batches: int = 10
    """number of training batches over which scalars are averaged"""
    checkpoint: str = "last"
    """last, previous or best"""
    fold: bool = True
    """whether to fold BatchNorm"""
    formats: tuple[str, ...] = FORMATS


def network_of(run: Path, checkpoint: str = "last") -> tuple[nn.Module, Data, Config]:
    """Return the network of a run, as it is evaluated, and its data, both on the CPU, and its config.

    Raises:
        ConfigError: the folder holds no run or no network of its own, or the run is in full precision.
    """
    config = load_config(run)
    if config is None:
        raise ConfigError(f"{run}: holds no run")
    if config.quantization.full_precision:
        raise ConfigError(f"{run}: is a run in full precision, which has no integers")
    if config.mode == Mode.allocate:
        config = _with_chosen_bits(run, config)
    weights = _weights_of(run, config, checkpoint)
    if not RunFolder(run).finished:
        log.warning(f"{run} is not finished: using its network as it was last saved")
    mode = Mode.evaluate if config.training else config.mode  # ptq calibrates again, on the same batches
    part = None if config.training else config.weights_part
    model, data = build(replace(config, mode=mode, weights_part=part, device="cpu", backend="auto"), weights)
    return model.eval(), data, config


def _with_chosen_bits(run: Path, config: Config) -> Config:
    """Return the config of a run without training that has the bit-widths chosen by the given run."""
    here = RunFolder(run)
    if config.retrain_steps or not here.finished:
        what = f"retrained networks are in {here.probes}" if here.finished else "it is not finished"
        raise ConfigError(f"{run}: chose bit-widths, and has no network of its own; {what}")
    return replace(config, mode=Mode.ptq, allocated=rules_of(str(here.policy)))


def _weights_of(run: Path, config: Config, checkpoint: str) -> str:
    """Return where the weights of a run's network are, as config.weights has it.

    A run without training has no checkpoints, so it is the place from which it read its weights.
    """
    path = RunFolder(run).checkpoints / f"{checkpoint}.pt"
    if not config.training and config.weights is not None:
        if config.weights in (PRETRAINED, TORCHVISION):
            return config.weights
        path = path_of(config.weights)
        if config.weights == BASELINE:
            path = RunFolder(run_folder(baseline_of(config))).checkpoints / LAST
    if not path.exists():
        raise ConfigError(f"{run}: has no network of its own: {path} does not exist")
    if config.training and not is_whole(path):
        raise ConfigError(f"checkpoint {path} cannot be read (it is damaged: its checksum is wrong)")
    return str(path)


def rule_for(model: nn.Module, rule: str | None) -> str:
    """Return the rule that applies to the scalars of activations.

    Raises:
        ConfigError: a rule was requested, but the scalars are already constant.
    """
    static = not any(t.quantizer.dynamic for t in quantized_tensors(model) if t.tensor != "weight")
    if static and rule is not None:
        raise ConfigError(f"--scalars {rule}: the run's activations already have constant scalars, which are kept")
    return STATIC if static else rule or DEFAULT_RULE


def made_static(model: nn.Module, data: Data, config: Config, rule: str, batches: int) -> nn.Module:
    """Return a copy of a network that is made static by a rule, on training batches of an epoch that no run reaches."""
    if rule == STATIC:
        return freeze(copy.deepcopy(model))  # only the weights
    some = unsharded(data).train_batches(config.clipping.calibration_batch_size, CALIBRATION_EPOCH, batches)
    try:
        return freeze(copy.deepcopy(model), rule, (batch.inputs for batch in some))
    except ValueError as error:
        raise ConfigError(f"--scalars {rule}: {error}") from error


def compare_rules(
    run: Path, rules: Sequence[str] | None = None, batches: int = 10, checkpoint: str = "last"
) -> dict[str, Figures]:
    """Return the figures of a run's network on the validation set, with dynamic scalars and with those of each rule.

    Args:
        run, batches, checkpoint: as in `Request`.
        rules: rules of `freeze`; None: all that apply to the run.

    Returns:
        {"dynamic": figures, rule: figures, ...}; for a run with static scalars, {"static": figures}.
    """
    model, data, config = network_of(run, checkpoint)
    networks = {"dynamic": model}
    if rule_for(model, None) == STATIC:
        networks, rules = {}, [STATIC]
    elif rules is None:
        rules = [rule for rule in FREEZING if config.training or rule != "running"]
    networks |= {rule: made_static(model, data, config, rule, batches) for rule in rules}
    (first, reference), *others = networks.items()
    computes = {name: _compute(config, network) for name, network in others}
    task = task_of(config)
    figures = verify.compare(_compute(config, reference), computes, task, data, _val_batches(config, data))
    return dict(zip([first, *computes], figures, strict=True))


def export(request: Request) -> Export:
    """Write a run's network as integers, check what was written, and move it to its place.

    Returns:
        The content of export.json, which is written next to the files.

    Raises:
        ConfigError: the run cannot be exported, or not as requested.
        RunError: a file cannot be written, or does not compute what the network computes; no new file was kept.
    """
    _check_out(request)
    model, data, config = network_of(request.run, request.checkpoint)
    _check_formats(request, model)
    rule = rule_for(model, request.rule)
    static = made_static(model, data, config, rule, request.batches)
    example = several_samples(next(unsharded(data).val_batches(2, 1)).inputs)
    integers = to_integers(copy.deepcopy(static))
    kept = fold_batchnorm(integers, *example) if request.fold else []
    with _in_place_of(request.out) as folder:
        files = _write(integers, config, data, example, folder, request.formats)
        figures = _check(model, static, files, config, data)
        result: Export = {
            "run": str(request.run),
            "model": config.model.name,
            "dataset": config.dataset.name,
            "mean_weight_bits": mean_bits(static, True),
            "mean_activation_bits": mean_bits(static, False),
            "clipping": clipping_label(config),
            "scalars": rule,
            "batches": None if rule in (STATIC, "running") else request.batches,
            "batchnorm": "folded" if request.fold else "kept",
            "batchnorm_kept": kept,
            "metric": config.task.metric,
            "processor": environment()["machine"]["processor"],
            "figures": {name: verify.recorded(found) for name, found in figures.items()},
            "bytes": _bytes(static, files),
        }
        if not config.allocating:
            result["weight_bits"], result["activation_bits"] = config.weight_bits, config.activation_bits
        if "onnx" in files:
            result["milliseconds"] = _milliseconds(static, files["onnx"], config, example)
        EXPORT.write(folder, result)
    return result


def _write(
    integers: nn.Module, config: Config, data: Data, example: Sequence[Tensor], folder: Path, formats: Sequence[str]
) -> dict[str, Path]:
    """Write the files, and return their paths by format."""
    signature = _signature(config, example)
    about = _about(config, data, signature)
    files = {name: folder / file for name, file in FILES.items() if name in formats}
    for name, path in files.items():
        log.info(f"writing {path.name}")
        if name == "onnx":
            write_onnx(integers, signature, path, about)
        elif name == "torch":
            write_program(integers, signature, path)
        else:
            write_safetensors(integers, path, about)
            state = read_safetensors(path)
            if not all(torch.equal(state[key], t) for key, t in integers.state_dict().items()):
                raise RunError(
                    f"{path.name} holds other tensors than the network when it is read back; no new file was kept"
                )
    return files


def _check(
    model: nn.Module, static: nn.Module, files: dict[str, Path], config: Config, data: Data
) -> dict[str, Figures]:
    """Return the figures of the dynamic network, the static one, and the files that can be run.

    By its own definition, a file must compute what the network computes. What a processor's fused kernels compute from
    it is only reported.
    """
    log.info("checking on the validation set")
    others: dict[str, verify.Compute] = {"dynamic": _compute(config, model)}
    if "onnx" in files:
        others["onnx"] = verify.OnnxFile(files["onnx"], fused=False)
        others[FUSED] = verify.OnnxFile(files["onnx"], fused=True)
    if "torch" in files:
        program = read_program(files["torch"])
        others["torch"] = lambda inputs: joined(program(*inputs))
    task = task_of(config)
    found = verify.compare(_compute(config, static), others, task, data, _val_batches(config, data))
    figures = dict(zip(["static", *others], found, strict=True))
    for name in others.keys() & files.keys():
        require(files[name].name, figures[name], figures["static"], task.facts.measure)
    return figures


def _bytes(static: nn.Module, files: dict[str, Path]) -> dict[str, int]:
    """Return the bytes of the files and of the full-precision state, in which a tensor with two names counts once."""
    state = remove_quantizers(copy.deepcopy(static)).state_dict()
    full = {(t.data_ptr(), t.shape): t for t in state.values()}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    return {"full_precision": sum(t.numel() * t.element_size() for t in full.values()), **sizes}


def _milliseconds(static: nn.Module, onnx: Path, config: Config, example: Sequence[Tensor]) -> dict[str, float]:
    """Return the milliseconds per sample in onnxruntime, in full precision and of the file."""
    log.info("timing")
    full = remove_quantizers(copy.deepcopy(static))
    with tempfile.TemporaryDirectory(dir=onnx.parent) as folder:
        path = Path(folder) / "full.onnx"
        try:
            write_onnx(full, _signature(config, example), path)
        except (RunError, OSError) as error:  # it may be too large, although the integers fit
            log.warning(f"full precision is not timed: {one_line(error)}")
            return {}
        timed = {"full_precision": verify.OnnxFile(path, fused=True), "onnx": verify.OnnxFile(onnx, fused=True)}
        return verify.latency(timed, [t[:1] for t in example])


def _compute(config: Config, network: nn.Module) -> verify.Compute:
    return functools.partial(task_of(config).compute, network)


def _val_batches(config: Config, data: Data) -> Iterator[Any]:
    return unsharded(data).val_batches(config.dataset.val_batch_size, config.limit_val_batches)


def _signature(config: Config, example: Sequence[Tensor]) -> Signature:
    task = task_of(config)
    return Signature(example, task.inputs[: len(example)], task.outputs, task.longest(config))


def _about(config: Config, data: Data, signature: Signature) -> dict[str, Any]:
    """Return what a reader of the files must know to use them."""
    names = {"model": config.model.name, "dataset": config.dataset.name}
    return {**names, "inputs": signature.inputs, "outputs": signature.outputs, **task_of(config).about(config, data)}


FILES = {"onnx": "model.onnx", "torch": "model.pt2", "safetensors": "model.safetensors"}
"""The file name of each format."""

OF_AN_EXPORT = {*FILES.values(), "model.json", EXPORT.name}


def _check_out(request: Request) -> None:
    """Raise a ConfigError if the export would replace anything that is not an export."""
    out = request.out
    if out.exists() and not (out / EXPORT.name).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: is not an export, so it is not replaced; choose a new folder with --out")
    others = sorted(path.name for path in out.iterdir() if path.name not in OF_AN_EXPORT) if out.is_dir() else []
    if others:
        raise ConfigError(
            f"{out}: holds more than an export ({others[0]}), which would be lost; choose a new folder with --out"
        )


def _check_formats(request: Request, model: nn.Module) -> None:
    """Raise a ConfigError if a layer or tensor cannot be written as integers."""
    try:
        check_integers(model)
    except ValueError as error:
        raise ConfigError(f"{request.run}: {error}") from error


@contextmanager
def _in_place_of(out: Path) -> Iterator[Path]:
    """Context manager with a new folder next to `out`, which replaces it on success, and is deleted otherwise.

    A process that is killed leaves the old export or the new one, and NAME.tmp beside it, which the next export clears.

    Raises:
        BusyError: another process is writing there.
        OSError: the folder cannot be written; if the disk is full, the error names the folder.
    """
    out = out.resolve()  # a symbolic link, perhaps to another disk, is kept
    work = out.with_name(f"{out.name}{TEMPORARY}")
    if work.is_symlink():
        work.unlink()
    with RunLock(work, str(out)), explaining_full_disk(work):
        new, old = work / "new", work / "old"
        if old.exists() and not out.exists():  # a process was killed between the two renames
            old.rename(out)
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
        new.mkdir()
        try:
            yield new
            if out.exists() and not exchange(new, out):
                out.rename(old)
            if new.exists() and not out.exists():
                new.rename(out)
        finally:
            for left in (new, old):
                shutil.rmtree(left, ignore_errors=True)
    with suppress(OSError):  # a process that was killed has left it, and the lock removes only what it made
        work.rmdir()

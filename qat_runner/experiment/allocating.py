"""Runs of mode=allocate: price the tensors (estimated sensitivity), choose the bit allocation, measure the result."""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from tqdm import tqdm

from qat_runner.allocation import Limit, Network, Prices, allocate_bits, network, price, rules_of
from qat_runner.config import Config, allocation_of, identity, run_folder, trained_of
from qat_runner.config.composing import command
from qat_runner.data import Data
from qat_runner.data.batches import unsharded
from qat_runner.errors import ConfigError, RunError, one_line
from qat_runner.experiment.bits_record import recorded, table
from qat_runner.experiment.building import CALIBRATION_EPOCH, EXAMPLE, check_training
from qat_runner.experiment.checks import preflight
from qat_runner.experiment.choosing import Search, measures_of, reported_costs
from qat_runner.experiment.probing import Probes, Run, probe_of
from qat_runner.quant import BITS
from qat_runner.runs.files import write_text
from qat_runner.runs.folder import RunFolder
from qat_runner.runs.records import ALLOCATION, Summary
from qat_runner.tasks import task_of

log = logging.getLogger("qat_runner")

FEW = 2
"""Number of batches for measured prices that are only shown for comparison and do not decide the allocation."""


@dataclass(frozen=True)
class Problem:
    """The problem that a bit allocation is to solve."""

    known: Network
    limits: Sequence[Limit]
    """limits that can be satisfied"""


def problem_of(config: Config, model: nn.Module, data: Data) -> Problem:
    """Derive the allocation problem from a config, rejecting impossible requests before anything is written or deleted.

    Args:
        config: resolved config of mode allocate.
        model, data: as returned by `building.build`.

    Raises:
        ConfigError: no bit-widths satisfy the limits; the latencies belong to other layers; there is no tensor whose
            bit-width can be chosen, or one whose bit-width cannot; the network or the data do not support the
            retraining.
    """
    try:
        known = network(model, config.allocation.widths, EXAMPLE)
        wanted = {*reported_costs(config), config.allocation.cost, *config.limits}
        measures = {key: measures_of(config, known, key) for key in wanted}
        limits = [Limit(measure, most) for key, most in config.limits.items() for measure in measures[key]]
        free_of_charge = {operand.name: dict.fromkeys(operand.widths, 0.0) for operand in known.free}
        allocate_bits(known, free_of_charge, limits, config.allocation.same)
    except ValueError as error:
        raise ConfigError(f"{config.asked_bits}: {error}") from error
    if config.retrain_steps:
        _check_retraining(config, model, data, known)
    return Problem(known, limits)


def _check_retraining(config: Config, model: nn.Module, data: Data, known: Network) -> None:
    """Reject retraining that would fail for the candidate networks, whatever their bit-widths."""
    probe = probe_of(config, config.weights, RunFolder(run_folder(config)).probes, data)
    preflight(probe)
    how = probe.oscillations
    check_training(replace(probe, oscillations=replace(how, max_bits=BITS.stop - 1)), model)
    weights = [operand for operation in known.operations for operand in operation.operands if operand.weight]
    if how.watching and all(min(operand.widths) > how.max_bits for operand in weights):
        raise ConfigError(
            f"oscillations.max_bits={how.max_bits}: allocation.widths={config.allocation.widths} allow no weight with "
            f"so few bits"
        )


def carry_out(
    config: Config, folder: Path, model: nn.Module, data: Data, weights: str | None, run: Run, problem: Problem
) -> Summary:
    """Choose the bit allocation, measure the network that has it, and record the result.

    Args:
        config: resolved config of mode allocate.
        folder: the run folder.
        model, data: as returned by `building.build`.
        weights: the weights of `model`: a file, or anything else that a config accepts.
        run: function that measures a network.
        problem: as returned by `problem_of`.

    Raises:
        RunError: a tensor cannot be priced, or not even the largest bit-widths satisfy max_drop.
    """
    began = time.perf_counter()
    how, known = config.allocation, problem.known
    prices = _priced(config, model, data, how.price, known.widths, how.batches)
    try:
        search = Search(config, known, prices, problem.limits)
    except ValueError as error:
        raise RunError(f"{config.asked_bits}: {error}") from error
    seconds = time.perf_counter() - began
    beside = _beside(config, model, data)
    probes = Probes(config, weights, RunFolder(folder).probes, run, data)
    chosen = search.least(probes) if config.max_drop is not None else search.within_limits(probes)
    record = recorded(search, chosen, probes, beside, seconds)
    ALLOCATION.write(folder, record)
    write_text(RunFolder(folder).policy, _policy(config, known, chosen.best.bits))
    write_text(RunFolder(folder).prices, table(record["tensors"], search.prices.widths))
    from qat_runner.training.plots import plot_bits  # matplotlib is slow to import

    plot_bits(folder, record)
    log.info(record["answer"])
    own = {"bits": config.asked_bits, "mode": str(config.mode), "answer": record["answer"], "run_dir": str(folder)}
    found: Any = {**chosen.summary, **own}
    summary: Summary = found | {"seconds": time.perf_counter() - began}
    return summary


def _policy(config: Config, known: Network, bits: Mapping[str, int]) -> str:
    """Return the policy file: bit-widths of all tensors, also of those without a choice, with comments on its use."""
    head = "# Bit-widths only: clipping, formats and all other settings come from the command that uses this file.\n"
    if (asked := command(config)) is not None:
        head += f"# Chosen by: {asked}\n"
        if _is_found_by_training(config):
            training = asked.replace("qat-bits", "qat-run bits=auto mode=retrain", 1)
            head += f"# Trains the same network: {training}\n"
    rules = {"rules": rules_of(known, bits, all=True)}
    return f"{head}{yaml.safe_dump(rules, sort_keys=False, default_flow_style=None)}"


def _is_found_by_training(config: Config) -> bool:
    """Return whether bits=auto in mode retrain, with the same keys, uses the bits that this run chooses."""
    with suppress(ConfigError):
        return identity(allocation_of(trained_of(config))) == identity(config)
    return False


def _priced(config: Config, model: nn.Module, data: Data, kind: str, widths: Sequence[int], count: int) -> Prices:
    """Return prices measured on batches of a training epoch that training never reaches."""
    objective = task_of(config).objective()
    batches = unsharded(data).train_batches(config.allocation.batch_size, CALIBRATION_EPOCH, count)
    with tqdm(total=count, desc=f"pricing ({kind})", unit="batch", disable=None, leave=False) as bar:
        try:
            return price(model, batches, objective, widths, kind, bar.update)
        except ValueError as error:
            raise RunError(f"pricing failed: {error}") from error


def _beside(config: Config, model: nn.Module, data: Data) -> Prices:
    """Return prices of another kind for comparison.

    They are gradient prices if the allocation uses measured ones, otherwise measured prices of one bit-width on a few
    batches. They do not influence the allocation; if they cannot be computed, the result is empty.
    """
    how = config.allocation
    kind, widths, count = "gradient", tuple(how.widths), how.batches
    if how.price != "measured":
        width = next((width for width in sorted(how.widths) if width >= 3), max(how.widths))
        kind, widths, count = "measured", (width,), min(FEW, how.batches)
    try:
        return _priced(config, model, data, kind, widths, count)
    except (RunError, torch.OutOfMemoryError) as error:
        log.warning(f"no {kind} prices are shown for comparison: {one_line(error)}")
        return Prices(kind, widths, {}, {})

"""The training loop."""

import functools
import logging
import math
import signal
import time
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from qat_runner import distributed, ranks
from qat_runner.config import Amp, Config, Resume, differences, flat, identity, settings
from qat_runner.data import Batch, Data
from qat_runner.data.batches import unsharded
from qat_runner.description import fit
from qat_runner.errors import RunError, StoppedError, one_line
from qat_runner.insertion import LayerNoise, noise_report, quantized_tensors
from qat_runner.insertion.insert import scalars, weights_together
from qat_runner.runs.checkpoints import Checkpoint, ProcessState
from qat_runner.runs.folder import BEST_CHECKPOINT, RunFolder
from qat_runner.runs.record import Record
from qat_runner.runs.records import PREDICTIONS
from qat_runner.tasks import Totals, task_of
from qat_runner.training import checkpoint
from qat_runner.training.averages import Averages
from qat_runner.training.batch_norm import reestimate
from qat_runner.training.dampening import dampening_of
from qat_runner.training.freezing import dynamic_activations, freeze_activations
from qat_runner.training.interval import Interval
from qat_runner.training.measure import WarmStartExcess, autocast, evaluate
from qat_runner.training.oscillations import oscillations_of
from qat_runner.training.progress import Progress
from qat_runner.training.recipe import learning_rate, make_optimizer
from qat_runner.training.stop import StopRequest

log = logging.getLogger("qat_runner")

OF_EVERY_VERSION = ("model.name", "dataset.name", "weight_bits", "activation_bits", "mode", "seed")
"""Keys that identify the run of a checkpoint whose config was written by an earlier version."""

REESTIMATION_EPOCH = 10**6 + 1
"""The epoch whose first batches are used to re-estimate BatchNorm; training never reaches it."""

DIVERGED = 1000
"""Sent by a process to the others when its loss is NaN or infinite; larger than any signal number."""


@dataclass
class State:
    """The progress of a run."""

    epoch: int = 0
    """completed epochs"""
    step: int = 0
    """completed steps of the current epoch"""
    steps: int = 0
    """completed steps in total"""
    seconds: float = 0.0
    """time of training and validation, including that before interruptions"""
    train_seconds: float = 0.0
    """the part of `seconds` spent on training in the current epoch"""
    best: float = -math.inf
    """best value of the task's metric"""
    val: dict[str, float] = field(default_factory=dict)
    """results of the latest validation: loss, the task's metric, and further figures"""
    samples_per_second: float = 0.0
    """throughput of the latest training epoch"""
    before_reestimation: float | None = None
    """the task's metric after the last epoch, before BatchNorm was re-estimated; None until then"""


def _compiled(model: nn.Module) -> nn.Module:
    """Compile a model as one graph; measurements keep using the uncompiled model.

    It is one graph even if gradients are averaged over processes, although splitting it would allow sending them
    earlier. The first step after a start or a resume averages gradients in another way than the other steps, and it has
    to give the same result as in an uninterrupted run, except for the summation order with three or more processes.
    For the same reason, kernels are not selected by timing, which could choose others after a resume.
    """
    torch._dynamo.config.optimize_ddp = False
    return torch.compile(model, fullgraph=True, options={"deterministic": True})  # type: ignore[return-value]


class Trainer:
    """Trains and measures one model according to one config, and writes the record.

    No training step waits for the device: losses and hits are summed on it and read at the end of an epoch and before a
    checkpoint.

    Args:
        config: resolved config.
        model: the model, quantized as the config asks, on the device of `data`.
        data: provides batches on its device.
        record: where results are written.
        teacher: full-precision network for distillation, on the same device; None trains on labels only.
    """

    def __init__(
        self, config: Config, model: nn.Module, data: Data, record: Record, teacher: nn.Module | None = None
    ) -> None:
        self.config, self.model, self.data, self.record = config, model, data, record
        self.teacher, self.task = teacher, task_of(config)
        self.metric, self.measure = self.task.facts.metric, self.task.facts.measure
        decay = config.stage.ema_decay if config.training else 0.0
        self.averages = Averages(model, decay) if decay else None
        """the moving average of the model, if the recipe asks for one"""
        self.mixing = self.task.mixing(config, data) if config.training else None
        self.device, self.epochs, self.batch_size, self.lr = data.device, config.epochs, config.batch_size, config.lr
        self.stage = config.stage
        self.steps = min(data.train_steps(self.batch_size), config.limit_train_batches or 10**9)
        self.begun = False
        """whether the first step of the run is done"""
        self.compiled = _compiled(model) if config.compile else model
        self.network = self.compiled
        """the module called in training from the second step on; with several processes it averages the gradients"""
        self.weights = weights_together(model, distributed.BUCKET if ranks.launched() else None)
        self.agreement = distributed.Agreement()
        self.optimizer = make_optimizer(model, self.stage, self.lr)
        self.oscillations, self.dampening = oscillations_of(config, model), dampening_of(config, model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == Amp.fp16)
        self.state = State(best=self.measure.worst)
        self._dynamic = dynamic_activations(model)
        """quantizers with dynamic activation scalars at the start, before any is frozen"""
        self.to_freeze = config.freezing and self._none_frozen
        """whether the freezing of recipe.freeze_scalars_at is still pending"""
        self.noise: list[LayerNoise] = []
        self.excess = WarmStartExcess(model) if config.log_excess_mse else None
        self.totals = self.task.totals(self.device)
        """totals of the current epoch, of this process only"""
        self.interval = Interval(self.steps)
        self.stop = StopRequest()
        self.saved_at = time.monotonic()

    @property
    def _none_frozen(self) -> bool:
        """Whether there are clipping scalars to freeze and none is frozen yet; those that training has not reached stay
        dynamic.
        """
        return bool(self._dynamic) and dynamic_activations(self.model) == self._dynamic

    @property
    def measured(self) -> nn.Module:
        """The model that is validated and saved: the moving average if there is one, otherwise the model itself."""
        return self.model if self.averages is None else self.averages.model

    def fit(self) -> None:
        """Train the remaining epochs; measure after each, and save after each and every `checkpoint_minutes`.

        Raises:
            RunError: a loss or a weight became NaN or infinite.
            StoppedError: a signal requested a stop; the state of the run is saved.
        """
        if self.state.epoch == self.state.step == 0 and all(t.quantizer.ready for t in quantized_tensors(self.model)):
            self.measure_noise()
        with self._progress(self.epochs, self.steps * self.batch_size) as progress, StopRequest() as self.stop:
            while self.state.epoch < self.epochs:
                progress.begin(f"epoch {self.state.epoch + 1}/{self.epochs}")
                train = self._train_epoch(self.state.epoch, progress)
                progress.begin(f"epoch {self.state.epoch + 1}/{self.epochs}, validation")
                began = time.perf_counter()
                distributed.broadcast(self.model, parameters=False)
                if self.averages is not None:
                    distributed.broadcast(self.averages.model, parameters=False)
                self._validate(progress)
                self.state.seconds += time.perf_counter() - began
                self.state.samples_per_second = train["samples"] / max(self.state.train_seconds, 1e-9)
                self.state.epoch, self.state.step, self.state.train_seconds = self.state.epoch + 1, 0, 0.0
                self.totals = self.task.totals(self.device)
                self.measure_noise()
                if self.oscillations is not None:
                    self.record.oscillations(self.state.epoch, self.oscillations.rows())
                self._record_epoch(train)
                self._save(end_of_epoch=True)
        self.noise = self.noise or self._noise()  # not measured yet if the run was killed after its last epoch

    def stop_if_asked(self) -> None:
        """Handle a signal that arrived after the last step: the run is finished, but nothing else may follow it.

        Raises:
            StoppedError: a process received a signal.
        """
        number = max(distributed.all_gather(self.stop.signal or 0))
        if number:
            self.stop.pass_on()
            raise StoppedError(f"stopped by {signal.Signals(number).name} after the run had finished", number)

    def _validate(self, progress: Progress) -> None:
        """Validate after an epoch; if requested, validate after the last one again with re-estimated BatchNorm."""
        state = self.state
        if self.config.reestimating and state.epoch + 1 == self.epochs and state.before_reestimation is None:
            before = self._evaluate(progress)[self.metric]
            self._reestimate()
            state.before_reestimation = before
            figure = f"{self.metric} {self.measure.describe(before)}"
            log.info(f"BatchNorm re-estimated on {self.reestimation_batches} training batches; before: {figure}")
        state.val = self._evaluate(progress)

    @property
    def reestimation_batches(self) -> int:
        """Number of training batches for re-estimating BatchNorm: the requested number, or all if there are fewer."""
        return min(self.config.recipe.batchnorm_batches, self.data.train_steps(self.batch_size))

    def _reestimate(self) -> None:
        """Re-estimate BatchNorm on the samples, the parts and the augmented images that each process would train on."""
        count, parts = self.reestimation_batches, self.config.accumulate
        batches = self.data.train_batches(self.batch_size, REESTIMATION_EPOCH, count)
        with autocast(self.device, self.config.amp):
            reestimate(self.measured, (part for batch in batches for part in batch.parts(parts)), self.task.compute)

    def evaluate(self) -> None:
        """Measure the model without training: metrics on the validation split, and quantization noise."""
        with self._progress(epochs=1, train_samples=0) as progress:
            progress.begin("validation")
            began = time.perf_counter()
            self.state.val = self._evaluate(progress)
            self.state.seconds = time.perf_counter() - began
        self.state.best = self.state.val[self.metric]
        self.state.samples_per_second = self.state.val["samples"] / self.state.seconds
        self.measure_noise()

    def _evaluate(self, progress: Progress) -> dict[str, float]:
        batches = self.data.val_batches(self.config.dataset.val_batch_size, self.config.limit_val_batches)
        score, began = self.task.score(self.data), time.perf_counter()

        def seen(samples: int, totals: Totals) -> None:
            progress.step(samples * distributed.shard().world, totals)
            if self.stop.signal and not ranks.launched():  # several processes would have to agree at each batch
                self.state.seconds += time.perf_counter() - began
                self._save()
                self._stop(self.stop.signal)

        try:
            evaluate(self.task, self.measured, batches, score, self.config.amp, seen)
            score = score.merged()
            figures = score.read()
        except ValueError as error:  # a quantizer met NaN or infinity
            raise RunError(f"validation failed, the network has diverged: {error}") from error
        if score.predictions is not None and ranks.is_main():
            PREDICTIONS.write(self.record.folder, score.predictions)
        return figures

    def _progress(self, epochs: int, train_samples: int) -> AbstractContextManager[Progress]:
        limit = (self.config.limit_val_batches or 10**9) * self.config.dataset.val_batch_size
        samples = train_samples + min(self.data.val_size, limit)
        live = None if ranks.is_main() else False
        return closing(Progress(epochs, samples, self.state.epoch, self.task.unit, live))

    def measure_noise(self) -> None:
        """Measure the quantization noise of every tensor on the first validation batches; record it for this epoch."""
        self.noise = self._noise()
        if self.noise:
            self.record.layers(self.state.epoch, self.noise, scalars(self.measured))

    def oscillating(self) -> dict[str, float]:
        """Return the percentages of tracked elements that oscillate and that are frozen; empty if none is tracked."""
        return {} if self.oscillations is None else self.oscillations.totals()

    def _noise(self) -> list[LayerNoise]:
        if self.config.noise_batches == 0 or self.config.quantization.full_precision:
            return []
        batches = unsharded(self.data).val_batches(self.config.dataset.val_batch_size, self.config.noise_batches)
        with autocast(self.device, self.config.amp):
            return noise_report(self.measured, (batch.inputs for batch in batches))

    def mean_sqnr(self) -> float:
        """Return the mean SQNR in dB over the tensors whose SQNR is finite; NaN if there is none."""
        finite = [row.sqnr_db for row in self.noise if math.isfinite(row.sqnr_db)]
        return sum(finite) / len(finite) if finite else math.nan

    def resume(self, saved: dict[str, Any]) -> None:
        """Resume from a checkpoint: model, optimizer, gradient scaler, random state, and the position in the epoch.

        The data order stays the same if the number of processes has changed. The state that each process had of its
        own, its buffers and random state, is assigned to the current processes in turn; additional processes keep
        their own random state.

        Raises:
            RunError: the checkpoint does not belong to this run.
        """
        shard = distributed.shard()
        try:
            found: Checkpoint = fit(Checkpoint, saved)
            self._check_same_run(found)
            processes = found["processes"]
            own = processes[shard.rank % len(processes)]
            _load(self.model, found.get("trained", found["model"]) | own["buffers"])
            if self.averages is not None:
                averaged = found["model"] | own.get("averaged", {})
                _load(self.averages.model, averaged)
                self.averages.resume(averaged, found.get("averaged_steps", 0))
            self.optimizer.load_state_dict(checkpoint.checked_optimizer(found["optimizer"], self.optimizer))
            self.scaler.load_state_dict(found["scaler"])
            self._resume_oscillations(found.get("oscillations", {}))
            if shard.rank < len(processes):
                checkpoint.set_random_state(own["random"])
            self.totals.sums.zero_()
            for process in processes[shard.rank :: shard.world]:
                if process["totals"].shape != self.totals.sums.shape:
                    raise ValueError(f"totals: is of shape {list(process['totals'].shape)}")
                self.totals.sums += process["totals"].to(self.totals.sums.device)
                if self.data.corrupt is not None:
                    self.data.corrupt.update(process.get("corrupt", []))
        except Exception as error:  # PyTorch may raise anything on an invalid state
            raise RunError(f"does not fit this run ({one_line(error)})") from error
        self.state = State(**found["state"])
        self.begun = self.state.steps > 0
        at_the_end = (self.state.epoch, self.state.step) in ((self.epochs - 1, self.steps), (self.epochs, 0))
        if not at_the_end:  # resume=force has made the run longer
            self.state.before_reestimation = None
        if len(processes) != shard.world:
            log.info(
                f"{shard.world} process(es) resume a run of {len(processes)}: the data order stays the same; sums are "
                f"rounded differently, and BatchNorm and activations' scalars see different parts of a batch"
            )
        self.to_freeze = self.config.freezing and self._none_frozen

    def _resume_oscillations(self, tracked: dict[str, Tensor]) -> None:
        if self.oscillations is None:
            return
        try:
            self.oscillations.load(tracked)
        except ValueError as error:  # the state does not fit, or there is none
            if self.config.resume != Resume.force:
                raise
            log.info(f"{error}: tracking starts over from here")

    def _check_same_run(self, saved: Checkpoint) -> None:
        state = saved["state"]
        if state["epoch"] > self.epochs or (state["epoch"] == self.epochs and state["step"]):
            raise ValueError(f"state.epoch: is {state['epoch']}, past the end of a run of {self.epochs} epochs")
        if self.config.reestimating and state["epoch"] == self.epochs and state.get("before_reestimation") is None:
            raise ValueError(f"it was trained to its last epoch, {self.epochs}, without recipe.batchnorm_batches")
        if state["step"] > self.steps:
            raise ValueError(f"state.step: is {state['step']}, but an epoch has {self.steps} steps")
        if self.config.resume == Resume.force:
            return
        now, then = identity(self.config), saved["config"]
        if any(isinstance(value, dict) for value in then.values()):  # earlier version: compare keys that still exist
            then = {key: value for key, value in flat(then).items() if key in OF_EVERY_VERSION}
            now = {key: value for key, value in settings(self.config).items() if key in then}
        if changed := differences(then, now):
            raise ValueError(f"it belongs to a run with a different {', '.join(changed)}")

    def _train_epoch(self, epoch: int, progress: Progress) -> dict[str, float]:
        """Train the rest of an epoch; return the figures of the whole epoch."""
        self.model.train()
        self.interval = Interval(self.steps)
        batches = self.data.train_batches(self.batch_size, epoch, self.steps, self.state.step)
        for step, batch in enumerate(batches, self.state.step):
            lr = learning_rate(self.stage, self.lr, self.epochs, epoch, step, self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self._freeze_if_due(epoch + step / self.steps)
            loss = self._step(batch if self.mixing is None else self.mixing(batch, epoch, step))
            self.interval.add(loss, lr, None if self.excess is None else self.excess.take())
            finite = progress.step(batch.size * distributed.shard().world, self.totals)
            self._check_requests(epoch, finite)
        self._fulfil(epoch, self.agreement.settle())
        self._end_interval(epoch)
        return self.totals.merged().read()

    @property
    def position(self) -> float:
        """Position of the current step in the whole training, at least 0 and below 1."""
        steps = self.state.step + len(self.interval.rates)
        return (self.state.epoch + steps / self.steps) / self.epochs

    def _step(self, batch: Batch) -> Tensor:
        """Forward pass, backward pass and weight update; return the mean loss of the batch, [], on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._add_gradients(batch)
        if self.network is self.compiled and ranks.launched():  # the first step shows what takes part
            self.network = distributed.data_parallel(self.compiled)
        elif isinstance(self.network, distributed.DataParallel):
            self.network.check()
        self.begun = True
        self._regularize()
        if self.stage.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.stage.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.oscillations is not None:
            self.oscillations.restore_frozen()
        if self.averages is not None:
            self.averages.update(self.model)
        return loss

    def _regularize(self) -> None:
        """Unscale the gradients if something needs their true values, then apply dampening and freezing to them."""
        if self.stage.max_grad_norm is not None or self.oscillations is not None or self.dampening is not None:
            self.scaler.unscale_(self.optimizer)
        if self.dampening is not None:
            self.dampening.add_gradients(self.position)
        if self.oscillations is not None:
            self.oscillations.observe(self.position)

    def _freeze_if_due(self, position: float) -> None:
        """Make the clipping scalars of activations static, at their averages, once training reaches
        recipe.freeze_scalars_at; at the latest before the last step.

        Args:
            position: position in training, in epochs.
        """
        due = self.config.recipe.freeze_scalars_at
        if not self.to_freeze or due is None or position < min(due, self.epochs - 1.5 / self.steps):
            return
        freeze_activations(self.model)
        if self._none_frozen:  # no quantizer has seen a batch yet
            return
        self.to_freeze = False
        left = ", except per-token ones" if any(t.quantizer.per_token for t in quantized_tensors(self.model)) else ""
        log.info(f"activations' clipping scalars are static from here on (epoch {position:g}){left}")

    def _check_requests(self, epoch: int, finite: bool) -> None:
        """After a step: abort, save or stop if any process asks for it.

        With several processes this takes effect one step later, in all of them at the same step.
        """
        due = time.monotonic() - self.saved_at > 60 * self.config.checkpoint_minutes
        asked = self.stop.signal or 0
        wish = self.agreement.ask(DIVERGED if not finite else asked + 1 if asked else int(due))
        self._fulfil(epoch, wish)

    def _fulfil(self, epoch: int, wish: int) -> None:
        """Carry out what processes have asked for; a request made in the meantime is repeated by its process."""
        if wish:
            self.agreement.settle()
            self._end_interval(epoch)  # raises if training has diverged
            self._save()
            self.interval = Interval(self.steps)  # so that its time starts after saving
        if 1 < wish < DIVERGED:
            self._stop(wish - 1)

    def _stop(self, number: int) -> NoReturn:
        self.stop.pass_on()
        where = f"after step {self.state.step} of epoch {self.state.epoch + 1}"
        again = "the same command without overwrite=true" if self.config.overwrite else "the same command"
        raise StoppedError(f"stopped by {signal.Signals(number).name} {where}; {again} resumes it", number)

    def _end_interval(self, epoch: int) -> None:
        """Record the steps since the last call, and check that losses and weights are finite.

        Raises:
            RunError: a loss or a weight is NaN or infinite.
        """
        interval, first = self.interval, self.state.step
        losses = self._mean_over_processes(interval.losses).tolist() if interval.rates else []
        seconds = interval.seconds()  # includes pending work of the device, which reading the losses waited for
        self.state.seconds += seconds
        self.state.train_seconds += seconds
        self.state.step += len(interval.rates)
        self.state.steps += len(interval.rates)
        rows = [
            {"epoch": epoch + 1, "step": first + i + 1, "loss": loss, "lr": lr}
            for i, (loss, lr) in enumerate(zip(losses, interval.rates, strict=True))
        ]
        excess = self._mean_over_processes(interval.excess).tolist() if len(interval.excess) else []
        for row, figures in zip(rows, excess, strict=False):
            row["excess_mse_mean"], row["excess_mse_max"] = figures
        self.record.steps(rows)
        self.interval = Interval(self.steps)
        bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if bad is not None:
            raise RunError(self._diverged(f"the loss became {losses[bad]}", epoch, first + bad, interval.rates[bad]))
        if rows and not torch.stack([torch.isfinite(p).all() for p in self.model.parameters()]).all():  # waits once
            raise RunError(
                self._diverged("a weight became NaN or infinite", epoch, self.state.step - 1, interval.rates[-1])
            )

    def _mean_over_processes(self, losses: Tensor) -> Tensor:
        return distributed.all_reduce(losses.clone()) / distributed.shard().world

    def _diverged(self, what: str, epoch: int, step: int, lr: float) -> str:
        noisy = min(self.noise, key=lambda row: row.sqnr_db, default=None)
        where = f"{self.record.folder / 'layers.csv'} lists the noise of all layers"
        if noisy is not None:
            where = f"the noisiest tensor was {noisy.layer}.{noisy.tensor} at {noisy.sqnr_db:.1f} dB ({where})"
        there = checkpoint.exists(RunFolder(self.record.folder).checkpoints)
        kept = "the last checkpoint dates from before that" if there else "no checkpoint had been saved yet"
        return (
            f"{what} at step {step + 1} of epoch {epoch + 1}; a smaller lr (now {lr:g}) or more bits may help, and "
            f"{where}; {kept}"
        )

    def _add_gradients(self, batch: Batch) -> Tensor:
        """Run forward and backward passes in `accumulate` parts; return the mean loss, [], weighted like the gradients.

        The first step of a run is not compiled, because clipping scalars without initial values would need a separate
        graph.
        """
        network = self.network if self.begun else self.model
        losses: list[Tensor] = []
        count = self.config.accumulate
        of_process = self.data.shard.weight(min(self.batch_size, self.data.train_size))
        with nullcontext() if self.config.compile else self.weights.quantized(count):
            parts = list(batch.parts(count))
            for part in parts:
                with nullcontext() if part is parts[-1] else distributed.accumulating(network):
                    with autocast(self.device, self.config.amp):
                        logits = self.task.compute(network, part.inputs)
                        loss = self._loss(logits, part)
                    share = part.size / batch.size * of_process
                    weighed = loss if share == 1 else loss * share
                    self.scaler.scale(weighed).backward()
                losses.append(weighed.detach())
                self.totals.add(loss, logits.detach(), part.targets)
        return functools.reduce(torch.add, losses)

    def _loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the task's loss, or under distillation its mix with the distance from the teacher, or that alone."""
        if self.teacher is None:
            return self._loss_of_labels(logits, batch)
        recipe = self.config.recipe
        with torch.no_grad():
            wanted = self.task.compute(self.teacher, batch.inputs)
        distance = self.task.distance(logits, wanted, recipe.distill_temperature)
        if recipe.distill_weight == 1:
            return distance
        loss = self._loss_of_labels(logits, batch)
        return (1 - recipe.distill_weight) * loss + recipe.distill_weight * distance

    def _loss_of_labels(self, logits: Tensor, batch: Batch) -> Tensor:
        return self.task.loss(logits, batch.targets, self.stage.label_smoothing)

    def _record_epoch(self, train: dict[str, float]) -> None:
        state, val = self.state, self.state.val
        # of the last step of the epoch, which may have run before an interruption
        lr = learning_rate(self.stage, self.lr, self.epochs, state.epoch - 1, self.steps - 1, self.steps)
        hit, metric = self.totals.names[0], self.metric
        figure = self.measure.describe(val[metric])
        self.record.epoch(
            {
                "epoch": state.epoch,
                "train_loss": train["loss"],
                f"train_{hit}": train[hit],
                **{f"val_{name}": value for name, value in val.items() if name != "samples"},
                "lr": lr,
                "samples_per_second": state.samples_per_second,
                "sqnr_db": self.mean_sqnr(),
                **self.oscillating(),
                "seconds": state.seconds,
            }
        )
        log.info(
            f"epoch {state.epoch}/{self.epochs}: train loss {train['loss']:.4f}, {hit} {train[hit]:.2f} %; "
            f"val loss {val['loss']:.4f}, {metric} {figure}; "
            f"{state.samples_per_second:.{0 if state.samples_per_second >= 100 else 1}f} {self.task.unit}/s"
        )

    def _save(self, end_of_epoch: bool = False) -> None:
        """Write last.pt, keeping the old one as previous.pt, and best.pt if this epoch's validation is the best."""
        value = self.state.val[self.metric] if end_of_epoch else self.measure.worst
        if best := self.measure.better(value, self.state.best):
            self.state.best = value
        own: ProcessState = {
            "random": checkpoint.random_state(),
            "totals": self.totals.sums.cpu(),
            "buffers": _own_buffers(self.model),
        }
        if self.averages is not None:
            own["averaged"] = _own_buffers(self.averages.model)
        if self.data.corrupt is not None:
            own["corrupt"] = sorted(self.data.corrupt)
        processes = distributed.all_gather(own)
        content: Checkpoint = {
            "model": self.measured.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "processes": processes,
            "state": vars(self.state),  # type: ignore[typeddict-item]
            "config": identity(self.config),
        }
        if self.averages is not None:
            content |= {"trained": self.model.state_dict(), "averaged_steps": self.averages.steps}
        if self.oscillations is not None:
            content["oscillations"] = self.oscillations.state
        self.saved_at = time.monotonic()
        if not ranks.is_main():
            return
        folder = RunFolder(self.record.folder).checkpoints
        # best.pt first: otherwise, after a kill in between, last.pt would know of a best epoch that was never saved.
        if best:
            best_one = {"model": content["model"], "state": content["state"], "config": content["config"]}
            checkpoint.save(folder / BEST_CHECKPOINT, best_one)
        checkpoint.save(folder / checkpoint.LAST, {**content}, keep=folder / checkpoint.PREVIOUS)


def _load(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state into a model after checking dtypes and layouts.

    Raises:
        Exception: the state does not fit the model.
    """
    checkpoint.check_model(state, model)
    model.load_state_dict(state)


def _own_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the part of a model's state that each of several processes has of its own: the buffers."""
    buffers = {name for name, _ in model.named_buffers()} if ranks.launched() else set()
    return {name: t.cpu() for name, t in model.state_dict().items() if name in buffers}

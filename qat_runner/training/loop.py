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
from qat_runner.errors import RunError, StoppedError, told
from qat_runner.insertion import LayerNoise, noise_report, quantized_tensors
from qat_runner.insertion.insert import scalars, weights_together
from qat_runner.runs.checkpoints import Checkpoint, ProcessState
from qat_runner.runs.folder import RunFolder
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
"""Keys that tell the runs of checkpoints from one another whose config is that of an earlier version."""

REESTIMATION_EPOCH = 10**6 + 1
"""The number of the epoch whose first batches BatchNorm is estimated anew on: one that training never comes to."""

DIVERGED = 1000
"""What a process tells the others when its loss is no number; above all numbers of signals."""


@dataclass
class State:
    """How far a run has come."""

    epoch: int = 0
    """epochs done"""
    step: int = 0
    """steps done of the next one"""
    steps: int = 0
    """in all"""
    seconds: float = 0.0
    """training and validation, over all sittings"""
    train_seconds: float = 0.0
    """of them, training of the epoch that is under way"""
    best: float = -math.inf
    """of the task's metric"""
    val: dict[str, float] = field(default_factory=dict)
    """the latest validation: loss, the task's metric, and what else it tells"""
    samples_per_second: float = 0.0
    """of the latest training epoch"""
    before_reestimation: float | None = None
    """the task's metric after the last epoch, before BatchNorm was estimated anew, once it was"""


def _compiled(model: nn.Module) -> nn.Module:
    """A model in one graph; what measures it goes on with the model as it is.

    In one also where gradients are averaged over processes, though split it could send them earlier: the first step of
    a sitting, which is not averaged like the others, is to give what it gave in a run that was not interrupted, but for
    the order in which three processes or more are added up. Nor are kernels chosen by timing, which may end otherwise
    where the run goes on.
    """
    torch._dynamo.config.optimize_ddp = False
    return torch.compile(model, fullgraph=True, options={"deterministic": True})  # type: ignore[return-value]


class Trainer:
    """Trains and measures one model by one config, and keeps the record.

    No training step waits for the device: losses and hits are summed there, and read at the end of an epoch and before
    a checkpoint.

    Args:
        config: resolved.
        model: on `device`, quantized as it is to be.
        data: its batches come out on `device`.
        record: where all is written.
        teacher: a full-precision network to learn from, on `device`; None: labels alone.
    """

    def __init__(
        self, config: Config, model: nn.Module, data: Data, record: Record, teacher: nn.Module | None = None
    ) -> None:
        self.config, self.model, self.data, self.record = config, model, data, record
        self.teacher, self.task = teacher, task_of(config)
        self.metric, self.measure = self.task.facts.metric, self.task.facts.measure
        decay = config.stage.ema_decay if config.training else 0.0
        self.averages = Averages(model, decay) if decay else None
        """the moving average of the model, where the recipe asks for one"""
        self.mixing = self.task.mixing(config, data) if config.training else None
        self.device, self.epochs, self.batch_size, self.lr = data.device, config.epochs, config.batch_size, config.lr
        self.stage = config.stage
        self.steps = min(data.train_steps(self.batch_size), config.limit_train_batches or 10**9)
        self.begun = False
        """whether the run's first step is done"""
        self.compiled = _compiled(model) if config.compile else model
        self.network = self.compiled
        """what is called in training from the second step on; what averages its gradients over processes, if several"""
        self.weights = weights_together(model, distributed.BUCKET if ranks.launched() else None)
        self.agreement = distributed.Agreement()
        self.optimizer = make_optimizer(model, self.stage, self.lr)
        self.oscillations, self.dampening = oscillations_of(config, model), dampening_of(config, model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == Amp.fp16)
        self.state = State(best=self.measure.worst)
        self._dynamic = dynamic_activations(model)
        """at the start, when nothing has been frozen yet"""
        self.to_freeze = config.freezing and self._none_frozen
        """whether recipe.freeze_scalars_at is still to come"""
        self.noise: list[LayerNoise] = []
        self.excess = WarmStartExcess(model) if config.log_excess_mse else None
        self.totals = self.task.totals(self.device)
        """of the epoch that is under way, of this process"""
        self.interval = Interval(self.steps)
        self.stop = StopRequest()
        self.saved_at = time.monotonic()

    @property
    def _none_frozen(self) -> bool:
        """Whether there are scalars to be frozen in training, and none has been: some that it did not reach stay."""
        return bool(self._dynamic) and dynamic_activations(self.model) == self._dynamic

    @property
    def measured(self) -> nn.Module:
        """What is validated and kept: the moving average of the model, or itself."""
        return self.model if self.averages is None else self.averages.model

    def fit(self) -> None:
        """Train the epochs that are left; measure after each, and save after each and every so many minutes.

        Raises:
            RunError: the loss became NaN or infinite.
            StoppedError: a signal asked for it; the run is saved as it is.
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
        self.noise = self.noise or self._noise()  # of a run that was killed after its last epoch

    def stop_if_asked(self) -> None:
        """What is left of a signal that came when there was no step to come: the run is done, and nothing follows it.

        Raises:
            StoppedError: a process got one.
        """
        number = max(distributed.all_gather(self.stop.signal or 0))
        if number:
            self.stop.pass_on()
            raise StoppedError(
                f"stopped by {signal.Signals(number).name} at the end of a run, which is finished", number
            )

    def _validate(self, progress: Progress) -> None:
        """Validate after an epoch; after the last one again, with BatchNorm's statistics taken anew, if so asked."""
        state = self.state
        if self.config.reestimating and state.epoch + 1 == self.epochs and state.before_reestimation is None:
            before = self._evaluate(progress)[self.metric]
            self._reestimate()
            state.before_reestimation = before
            told = f"{self.metric} {self.measure.told(before)}"
            log.info(f"BatchNorm estimated anew on {self.reestimation_batches} training batches; {told} before")
        state.val = self._evaluate(progress)

    @property
    def reestimation_batches(self) -> int:
        """Training batches that BatchNorm is estimated anew on: as many as asked for, or all that there are."""
        return min(self.config.recipe.batchnorm_batches, self.data.train_steps(self.batch_size))

    def _reestimate(self) -> None:
        """On the samples, in the parts and with the augmentation of pictures that each process would train on."""
        count, parts = self.reestimation_batches, self.config.accumulate
        batches = self.data.train_batches(self.batch_size, REESTIMATION_EPOCH, count)
        with autocast(self.device, self.config.amp):
            reestimate(self.measured, (part for batch in batches for part in batch.parts(parts)), self.task.compute)

    def evaluate(self) -> None:
        """Measure the model as it is: its figures on the validation split, and noise."""
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
            if self.stop.signal and not ranks.launched():  # several would have to agree, batch by batch
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
        """Measure the noise of every tensor on the first validation batches, and record it under the present epoch."""
        self.noise = self._noise()
        if self.noise:
            self.record.layers(self.state.epoch, self.noise, scalars(self.measured))

    def oscillating(self) -> dict[str, float]:
        """Of all elements that are watched, those that oscillate and are frozen, in percent; empty where none is."""
        return {} if self.oscillations is None else self.oscillations.of_all()

    def _noise(self) -> list[LayerNoise]:
        if self.config.noise_batches == 0 or self.config.quantization.full_precision:
            return []
        batches = unsharded(self.data).val_batches(self.config.dataset.val_batch_size, self.config.noise_batches)
        with autocast(self.device, self.config.amp):
            return noise_report(self.measured, (batch.inputs for batch in batches))

    def mean_sqnr(self) -> float:
        """Mean SQNR over the tensors that have noise, in dB; NaN where none was measured."""
        finite = [row.sqnr_db for row in self.noise if math.isfinite(row.sqnr_db)]
        return sum(finite) / len(finite) if finite else math.nan

    def resume(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint: model, optimizer, scaler and random state as they were, and the place in the epoch.

        Where there were more or fewer processes, data come in the same order. What each has of its own, its buffers and
        random state, goes to them in turn; those that are new have random state of their own.

        Raises:
            RunError: it is no checkpoint of this run.
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
                self.averages.go_on(averaged, found.get("averaged_steps", 0))
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
        except Exception as error:  # whatever PyTorch may raise on state that is none
            raise RunError(f"does not fit this run ({told(error)})") from error
        self.state = State(**found["state"])
        self.begun = self.state.steps > 0
        at_the_end = (self.state.epoch, self.state.step) in ((self.epochs - 1, self.steps), (self.epochs, 0))
        if not at_the_end:  # of a longer run than it was, under force
            self.state.before_reestimation = None
        if len(processes) != shard.world:
            log.info(
                f"{shard.world} process(es) go on with a run of {len(processes)}: data come in the same order; sums "
                f"are rounded otherwise, and BatchNorm and activations' scalars see other parts of a batch"
            )
        self.to_freeze = self.config.freezing and self._none_frozen

    def _resume_oscillations(self, watched: dict[str, Tensor]) -> None:
        if self.oscillations is None:
            return
        try:
            self.oscillations.load(watched)
        except ValueError as error:  # of another kind, or none
            if self.config.resume != Resume.force:
                raise
            log.info(f"{error}: watched anew from here")

    def _check_same_run(self, saved: Checkpoint) -> None:
        state = saved["state"]
        if state["epoch"] > self.epochs or (state["epoch"] == self.epochs and state["step"]):
            raise ValueError(f"state.epoch: is {state['epoch']}, of {self.epochs}")
        if self.config.reestimating and state["epoch"] == self.epochs and state.get("before_reestimation") is None:
            raise ValueError(f"it has been trained to epoch {self.epochs}, its last, without recipe.batchnorm_batches")
        if state["step"] > self.steps:
            raise ValueError(f"state.step: is {state['step']}, of {self.steps} an epoch")
        if self.config.resume == Resume.force:
            return
        now, then = identity(self.config), saved["config"]
        if any(isinstance(value, dict) for value in then.values()):  # of before: what has kept its name and meaning
            then = {key: value for key, value in flat(then).items() if key in OF_EVERY_VERSION}
            now = {key: value for key, value in settings(self.config).items() if key in then}
        if changed := differences(then, now):
            raise ValueError(f"it is of a run with another {', '.join(changed)}")

    def _train_epoch(self, epoch: int, progress: Progress) -> dict[str, float]:
        """What is left of an epoch; returns the figures of all of it."""
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
            self._look_around(epoch, finite)
        self._grant(epoch, self.agreement.settle())
        self._end_interval(epoch)
        return self.totals.merged().read()

    @property
    def position(self) -> float:
        """Of the present step, in all of training: 0 to below 1."""
        steps = self.state.step + len(self.interval.rates)
        return (self.state.epoch + steps / self.steps) / self.epochs

    def _step(self, batch: Batch) -> Tensor:
        """Forward, backward and an update of the weights; returns the mean loss of the batch, [], on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._add_gradients(batch)
        if self.network is self.compiled and ranks.launched():  # a sitting's first step says what takes part
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
            self.oscillations.hold()
        if self.averages is not None:
            self.averages.update(self.model)
        return loss

    def _regularize(self) -> None:
        """See to gradients, in their own scale where someone wants to, before the weights move by them."""
        if self.stage.max_grad_norm is not None or self.oscillations is not None or self.dampening is not None:
            self.scaler.unscale_(self.optimizer)
        if self.dampening is not None:
            self.dampening.add_gradients(self.position)
        if self.oscillations is not None:
            self.oscillations.observe(self.position)

    def _freeze_if_due(self, position: float) -> None:
        """From recipe.freeze_scalars_at on, or from the last step if that is later, activations have the average of
        their scalars.

        Args:
            position: in epochs.
        """
        due = self.config.recipe.freeze_scalars_at
        if not self.to_freeze or due is None or position < min(due, self.epochs - 1.5 / self.steps):
            return
        freeze_activations(self.model)
        if self._none_frozen:  # nothing has been seen yet
            return
        self.to_freeze = False
        left = ", but for those of tokens" if any(t.quantizer.per_token for t in quantized_tensors(self.model)) else ""
        log.info(f"activations' clipping scalars are static from here on (epoch {position:g}){left}")

    def _look_around(self, epoch: int, finite: bool) -> None:
        """After a step: break off, save or stop, whichever any of the processes finds it is time for.

        Several processes do so a step later, all at the same one.
        """
        due = time.monotonic() - self.saved_at > 60 * self.config.checkpoint_minutes
        asked = self.stop.signal or 0
        wish = self.agreement.ask(DIVERGED if not finite else asked + 1 if asked else int(due))
        self._grant(epoch, wish)

    def _grant(self, epoch: int, wish: int) -> None:
        """Do what processes asked for; those that did have not forgotten it, should they ask for more by now."""
        if wish:
            self.agreement.settle()
            self._end_interval(epoch)  # where what has diverged is told
            self._save()
            self.interval = Interval(self.steps)  # whose time begins here
        if 1 < wish < DIVERGED:
            self._stop(wish - 1)

    def _stop(self, number: int) -> NoReturn:
        self.stop.pass_on()
        where = f"after step {self.state.step} of epoch {self.state.epoch + 1}"
        again = "the same command without overwrite=true" if self.config.overwrite else "the same command"
        raise StoppedError(f"stopped by {signal.Signals(number).name} {where}; {again} goes on", number)

    def _end_interval(self, epoch: int) -> None:
        """Record the steps since the last time, and make sure that they were sound.

        Raises:
            RunError: a loss or a weight is NaN or infinite.
        """
        interval, first = self.interval, self.state.step
        losses = self._mean_over_processes(interval.losses).tolist() if interval.rates else []
        seconds = interval.seconds()  # with what the device had still to do, which the losses have waited for
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
        where = f"{self.record.folder / 'layers.csv'} shows which layers are noisiest"
        if noisy is not None:
            where = f"the noisiest tensor was {noisy.layer}.{noisy.tensor} at {noisy.sqnr_db:.1f} dB ({where})"
        there = checkpoint.exists(RunFolder(self.record.folder).checkpoints)
        kept = "the last checkpoint is from before" if there else "no checkpoint had been saved yet"
        return (
            f"{what} at step {step + 1} of epoch {epoch + 1}; a smaller lr (now {lr:g}) or more bits may help, and "
            f"{where}; {kept}"
        )

    def _add_gradients(self, batch: Batch) -> Tensor:
        """Forward and backward of a batch, in `accumulate` parts; returns its mean loss, [], weighed as gradients are.

        The first step of a run is not compiled: scalars that start from nothing would take a graph of their own.
        """
        network = self.network if self.begun else self.model
        losses: list[Tensor] = []
        count = self.config.accumulate
        of_process = self.data.shard.weight(min(self.batch_size, self.data.train_size))
        with nullcontext() if self.config.compile else self.weights.quantized(count):
            parts = list(batch.parts(count))
            for part in parts:
                with nullcontext() if part is parts[-1] else distributed.adding_up(network):
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
        """The task's; under distillation in parts, or altogether, the distance from the teacher."""
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
        # of its last step, which may have been another sitting's
        lr = learning_rate(self.stage, self.lr, self.epochs, state.epoch - 1, self.steps - 1, self.steps)
        hit, metric = self.totals.names[0], self.metric
        told = self.measure.told(val[metric])
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
            f"val loss {val['loss']:.4f}, {metric} {told}; "
            f"{state.samples_per_second:.{0 if state.samples_per_second >= 100 else 1}f} {self.task.unit}/s"
        )

    def _save(self, end_of_epoch: bool = False) -> None:
        """Write last.pt, keeping the one before as previous.pt; and best.pt, if this epoch's validation is the best."""
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
        if best:  # first: killed in between, the run would know of it, and not write it again
            best_one = {"model": content["model"], "state": content["state"], "config": content["config"]}
            checkpoint.save(folder / "best.pt", best_one)
        checkpoint.save(folder / checkpoint.LAST, {**content}, keep=folder / checkpoint.PREVIOUS)


def _load(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Raises:
    Exception: it is no state of the model's.
    """
    checkpoint.check_model(state, model)
    model.load_state_dict(state)


def _own_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What of a model's state is this process's own, where there are several."""
    buffers = {name for name, _ in model.named_buffers()} if ranks.launched() else set()
    return {name: t.cpu() for name, t in model.state_dict().items() if name in buffers}

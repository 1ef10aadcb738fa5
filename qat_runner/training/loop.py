"""The training loop."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat_runner.config import Config, identity
from qat_runner.data import Batch, Data, Totals
from qat_runner.data.answers import AnswerScore
from qat_runner.errors import RunError
from qat_runner.insertion.insert import scalars, weights_quantized_once
from qat_runner.training import checkpoint
from qat_runner.training.measure import LayerNoise, WarmStartExcess, autocast, compute, evaluate, measure_noise
from qat_runner.training.progress import Progress
from qat_runner.training.recipe import learning_rate, make_optimizer
from qat_runner.training.tracking import Record, write_json

log = logging.getLogger("qat_runner")


@dataclass
class State:
    """How far a run has come."""

    epoch: int = 0
    """epochs done"""
    steps: int = 0
    seconds: float = 0.0
    """training and validation, over all sittings"""
    best: float = -math.inf
    """of the data's metric, in percent"""
    val: dict[str, float] = field(default_factory=dict)
    """the latest validation: loss, the data's metric, and what else it tells"""
    samples_per_second: float = 0.0
    """of the latest training epoch"""


class Trainer:
    """Trains and measures one model by one config, and keeps the record.

    No training step waits for the device: losses and hits are summed there and read once an epoch.

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
        assert config.epochs is not None and config.batch_size is not None and config.lr is not None
        self.config, self.model, self.data, self.record = config, model, data, record
        self.teacher = teacher
        self.device, self.epochs, self.batch_size, self.lr = data.device, config.epochs, config.batch_size, config.lr
        self.stage = config.stage
        self.steps = min(data.train_steps(self.batch_size), config.limit_train_batches or 10**9)
        self.optimizer = make_optimizer(model, self.stage, self.lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.state = State()
        self.noise: list[LayerNoise] = []
        self.excess = WarmStartExcess(model) if config.log_excess_mse else None

    def fit(self) -> None:
        """Train the epochs that are left, measuring and saving after each.

        Raises:
            RunError: the loss became NaN or infinite.
        """
        if self.state.epoch == 0:
            self.measure_noise()
        with self._progress(self.epochs, self.steps * self.batch_size) as progress:
            for epoch in range(self.state.epoch, self.epochs):
                began = time.perf_counter()
                progress.begin(f"epoch {epoch + 1}/{self.epochs}")
                train = self._train_epoch(epoch, progress)
                trained = time.perf_counter() - began
                progress.begin(f"epoch {epoch + 1}/{self.epochs}, validation")
                self.state.val = self._evaluate(progress)
                self.state.epoch = epoch + 1
                self.state.seconds += time.perf_counter() - began
                self.state.samples_per_second = train["samples"] / trained
                self.measure_noise()
                self._record_epoch(train)
                self._save()
        self.noise = self.noise or self._noise()  # of a run that was killed after its last epoch

    def evaluate(self) -> None:
        """Measure the model as it is: its figures on the validation half, and noise."""
        with self._progress(epochs=1, train_samples=0) as progress:
            progress.begin("validation")
            began = time.perf_counter()
            self.state.val = self._evaluate(progress)
            self.state.seconds = time.perf_counter() - began
        self.state.best = self.state.val[self.data.metric]
        self.state.samples_per_second = self.state.val["samples"] / self.state.seconds
        self.measure_noise()

    def _evaluate(self, progress: Progress) -> dict[str, float]:
        batches, score = self._val_batches(self.config.limit_val_batches), self.data.score()
        try:
            figures = evaluate(self.model, batches, score, self.config.amp, progress.step)
        except ValueError as error:  # a quantizer met NaN or infinity
            raise RunError(f"validation failed, the network has diverged: {error}") from error
        if isinstance(score, AnswerScore):
            write_json(self.record.folder / "predictions.json", score.predictions)
        return figures

    def _progress(self, epochs: int, train_samples: int) -> AbstractContextManager[Progress]:
        limit = (self.config.limit_val_batches or 10**9) * self.config.dataset.val_batch_size
        samples = train_samples + min(self.data.val_size, limit)
        return closing(Progress(epochs, samples, self.state.epoch, unit=self.data.unit))

    def measure_noise(self) -> None:
        """Measure the noise of every tensor on the first validation batches, and record it under the present epoch."""
        self.noise = self._noise()
        if self.noise:
            self.record.layers(self.state.epoch, self.noise, scalars(self.model))

    def _noise(self) -> list[LayerNoise]:
        if self.config.noise_batches == 0 or self.config.policy.full_precision:
            return []
        return measure_noise(self.model, self._val_batches(self.config.noise_batches), self.device, self.config.amp)

    def mean_sqnr(self) -> float:
        """Mean SQNR over the tensors that have noise, in dB; NaN where none was measured."""
        finite = [row.sqnr_db for row in self.noise if math.isfinite(row.sqnr_db)]
        return sum(finite) / len(finite) if finite else math.nan

    def resume(self) -> None:
        """Go on from the last checkpoint: model, optimizer, scaler and random state as they were."""
        saved = checkpoint.load(self.record.folder / "checkpoints" / "last.pt")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        checkpoint.set_random_state(saved["random"])
        self.state = State(**saved["state"])

    def _train_epoch(self, epoch: int, progress: Progress) -> dict[str, float]:
        self.model.train()
        totals = self.data.totals()
        losses = torch.zeros(self.steps, device=self.device)
        rates: list[float] = []
        excess: list[Tensor] = []
        for step, batch in enumerate(self.data.train_batches(self.batch_size, epoch, self.steps)):
            rates.append(learning_rate(self.stage, self.lr, self.epochs, epoch, step, self.steps))
            for group in self.optimizer.param_groups:
                group["lr"] = rates[-1]
            self.optimizer.zero_grad(set_to_none=True)
            losses[step] = self._add_gradients(batch, totals)
            if self.stage.max_grad_norm is not None:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), self.stage.max_grad_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.excess is not None:
                excess.append(self.excess.take())
            if not progress.step(batch.size, totals):
                break
        self._check_losses(epoch, losses[: len(rates)].tolist(), rates, excess)
        self.state.steps += len(rates)
        return totals.read()

    def _add_gradients(self, batch: Batch, totals: Totals) -> Tensor:
        """Forward and backward of a batch, in `accumulate` parts; returns its mean loss, []."""
        mean = torch.zeros((), device=self.device)
        count = self.config.accumulate
        with weights_quantized_once(self.model) if count > 1 else nullcontext():
            for part in batch.parts(count):
                with autocast(self.device, self.config.amp):
                    logits = compute(self.model, part)
                    loss = self._loss(logits, part)
                share = part.size / batch.size
                self.scaler.scale(loss * share).backward()
                mean += loss.detach() * share
                totals.add(loss, logits.detach(), part.targets)
        return mean

    def _loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross entropy with the targets; under distillation in parts with the teacher (Hinton et al. 2015)."""
        loss = F.cross_entropy(logits, batch.targets, label_smoothing=self.stage.label_smoothing)
        if self.teacher is None:
            return loss
        recipe, t = self.config.recipe, self.config.recipe.distill_temperature
        with torch.no_grad():
            wanted = F.log_softmax(compute(self.teacher, batch).float() / t, dim=1)
        found = F.log_softmax(logits.float() / t, dim=1)
        divergence = F.kl_div(found, wanted, reduction="sum", log_target=True) / batch.targets.numel()
        divergence = divergence * t**2  # gradients keep their size
        return (1 - recipe.distill_weight) * loss + recipe.distill_weight * divergence

    def _check_losses(self, epoch: int, losses: list[float], rates: list[float], excess: list[Tensor]) -> None:
        rows = [
            {"epoch": epoch + 1, "step": i + 1, "loss": loss, "lr": lr}
            for i, (loss, lr) in enumerate(zip(losses, rates, strict=True))
        ]
        for row, figures in zip(rows, excess, strict=False):
            row["excess_mse_mean"], row["excess_mse_max"] = figures.tolist()
        self.record.steps(rows)
        bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if bad is not None:
            raise RunError(
                f"the loss became {losses[bad]} at step {bad + 1} of epoch {epoch + 1}; "
                f"a smaller lr (now {rates[bad]:g}) or more bits may help, "
                f"and {self.record.folder / 'layers.csv'} shows which layers are noisiest"
            )

    def _record_epoch(self, train: dict[str, float]) -> None:
        state, val = self.state, self.state.val
        lr = self.optimizer.param_groups[0]["lr"]
        hit, metric = self.data.totals().names[0], self.data.metric
        self.record.epoch(
            {
                "epoch": state.epoch,
                "train_loss": train["loss"],
                f"train_{hit}": train[hit],
                **{f"val_{name}": value for name, value in val.items() if name != "samples"},
                "lr": lr,
                "samples_per_second": state.samples_per_second,
                "sqnr_db": self.mean_sqnr(),
                "seconds": state.seconds,
            }
        )
        log.info(
            f"epoch {state.epoch}/{self.epochs}: train loss {train['loss']:.4f}, {hit} {train[hit]:.2f} %; "
            f"val loss {val['loss']:.4f}, {metric} {val[metric]:.2f} %; "
            f"{state.samples_per_second:.{0 if state.samples_per_second >= 100 else 1}f} {self.data.unit}/s"
        )

    def _save(self) -> None:
        value = self.state.val[self.data.metric]
        best = value > self.state.best
        self.state.best = max(value, self.state.best)
        content: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": checkpoint.random_state(),
            "state": vars(self.state),
            "config": identity(self.config),
        }
        folder = self.record.folder / "checkpoints"
        if best:
            checkpoint.save(
                folder / "best.pt", {"model": content["model"], "state": content["state"], "config": content["config"]}
            )
        checkpoint.save(folder / "last.pt", content)

    def _val_batches(self, limit: int | None) -> Iterator[Batch]:
        return self.data.val_batches(self.config.dataset.val_batch_size, limit)

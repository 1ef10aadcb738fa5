"""Weights & Biases. Nothing leaves the machine unless the user sets WANDB_MODE=online."""

import os
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from torch import Tensor

from qat_runner.runs.trackers.tracker import Tracked, Tracker

NAME = "wandb"
PROJECT = "qat_runner"
"""The default project; the environment variable WANDB_PROJECT overrides it."""


class WeightsAndBiases(Tracker):
    """Writes offline files to the run folder, which `wandb sync` uploads, unless WANDB_MODE sets another mode.

    A resumed run stays the same W&B run. The config, the figures and the result are logged, but nothing about the
    machine, the code or the terminal.
    """

    package, extra = "wandb", "wandb"

    def __init__(self, run: Tracked) -> None:
        import wandb

        super().__init__(run)
        self._wandb = wandb
        identifier = run.known_as(NAME) or uuid4().hex[:16]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=identifier,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.config),
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            settings=wandb.Settings(
                host="",
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_save_requirements=False,
                x_disable_stats=True,
                x_disable_machine_info=True,
            ),
        )
        run.remember(NAME, identifier)

    def epoch(self, number: int, figures: Mapping[str, float]) -> None:
        self._run.log({**figures, "epoch": number})

    def layers(self, number: int, figures: Mapping[str, Mapping[str, float]], scalars: Mapping[str, Tensor]) -> None:
        logged: dict[str, Any] = {
            f"layers_{key}/{tensor}": value for key, values in figures.items() for tensor, value in values.items()
        }
        for name, s in scalars.items():
            logged[f"clipping_scalars/{name}"] = self._wandb.Histogram(s.float().cpu().flatten().tolist())
        self._run.log({**logged, "epoch": number})

    def finish(self, result: Mapping[str, Any] | None) -> None:
        if result is not None:
            self._run.summary.update(dict(result))
        self._run.finish(exit_code=0 if result is not None else 1)

"""The folder of a run, and the names of all files in it.

| file              | what                                                                                          |
|-------------------|-----------------------------------------------------------------------------------------------|
| config.yaml       | the resolved config                                                                           |
| environment.json  | versions, git state, command, machine                                                         |
| quantizers.txt    | table of the quantized tensors                                                                |
| log.txt           | the messages shown on the terminal                                                            |
| metrics.csv       | one row per epoch                                                                             |
| steps.csv         | one row per training step                                                                     |
| layers.csv        | noise of each quantized tensor, one block per epoch; epoch 0 is before any training           |
| oscillations.csv  | oscillating and frozen elements of each weight, one block per epoch, if `oscillations` asks   |
| tensorboard/      | the figures of metrics.csv and layers.csv, and histograms of the scalars                      |
| wandb/, mlruns/   | the same, if `trackers` asks for it; trackers.json: the ids that the trackers gave the run    |
| checkpoints/      | last.pt, previous.pt (the one before it) and best.pt                                          |
| histograms.json   | distribution of the values of each quantized tensor over its grid, at the end                 |
| curves.png, noise.png | plots                                                                                     |
| report.html       | the HTML report of the run, if qat-report has written it                                      |
| predictions.json  | the answers of the latest validation, in SQuAD's format (question answering only)             |
| error.txt         | why the run failed, if it did                                                                 |
| allocation.json   | prices, front, measurements and the answer (mode allocate only, like the next four)           |
| policy.yaml       | the chosen bit allocation, as rules                                                           |
| bits.png          | the Pareto front, and the bit-widths of all tensors                                           |
| prices.csv        | one row per tensor: its bits, and its noise and price at every bit-width                      |
| probes/           | run folders of the measured networks                                                          |
| summary.json      | the result; the run is finished if it exists                                                  |
"""

from dataclasses import dataclass
from pathlib import Path

from qat_runner.config import CONFIG_FILE
from qat_runner.runs.records import (
    ALLOCATION,
    ENVIRONMENT,
    ERROR,
    HISTOGRAMS,
    LAYERS,
    METRICS,
    OSCILLATIONS,
    PREDICTIONS,
    QUANTIZERS,
    STEPS,
    SUMMARY,
)

CHECKPOINTS = "checkpoints"
"""Name of the folder of checkpoints."""

LAST_CHECKPOINT, BEST_CHECKPOINT = "last.pt", "best.pt"
"""Names of the checkpoints of the end of training and of its best epoch."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, which need not exist; `records` reads files with typed contents from its path."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / CONFIG_FILE

    @property
    def quantizers(self) -> Path:
        return self.path / QUANTIZERS.name

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def error(self) -> Path:
        return self.path / ERROR.name

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    @property
    def mlruns(self) -> Path:
        return self.path / "mlruns"

    @property
    def trackers(self) -> Path:
        """The id of the run in each tracker, by the name of the tracker."""
        return self.path / "trackers.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def noise(self) -> Path:
        return self.path / "noise.png"

    @property
    def page(self) -> Path:
        return self.path / "report.html"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def policy(self) -> Path:
        return self.path / "policy.yaml"

    @property
    def bits(self) -> Path:
        return self.path / "bits.png"

    @property
    def prices(self) -> Path:
        return self.path / "prices.csv"

    @property
    def probes(self) -> Path:
        return self.path / "probes"

    @property
    def finished(self) -> bool:
        """Whether the run is finished."""
        return (self.path / SUMMARY.name).is_file()

    @property
    def contents(self) -> tuple[Path, ...]:
        """All files that a run may leave here, whether they exist or not; the lock is never left."""
        typed = (ENVIRONMENT, METRICS, STEPS, LAYERS, OSCILLATIONS, HISTOGRAMS, PREDICTIONS, ALLOCATION, SUMMARY)
        return (
            *(self.path / file.name for file in typed),
            *(self.config, self.quantizers, self.log, self.error, self.tensorboard, self.checkpoints),
            *(self.curves, self.noise, self.page, self.export),
            *(self.trackers, self.wandb, self.mlruns, self.policy, self.bits, self.prices, self.probes),
        )

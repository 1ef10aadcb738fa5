"""A run's folder, and the name of everything in it.

| file              | what                                                                                          |
|-------------------|-----------------------------------------------------------------------------------------------|
| config.yaml       | the resolved config                                                                           |
| environment.json  | versions, git state, command, machine                                                         |
| quantizers.txt    | table of the quantized tensors                                                                |
| log.txt           | what was said on the terminal                                                                 |
| metrics.csv       | a row an epoch                                                                                |
| steps.csv         | a row a training step                                                                         |
| layers.csv        | noise of each quantized tensor, a block an epoch; epoch 0 is before any training              |
| oscillations.csv  | how often codes of each weight flip, a block an epoch, where `oscillations` asks for it       |
| tensorboard/      | the figures of metrics.csv and layers.csv, and histograms of the scalars                      |
| wandb/, mlruns/   | the same, where `trackers` asks for it; trackers.json: what they call the run                 |
| checkpoints/      | last.pt, previous.pt (the one before it) and best.pt                                          |
| histograms.json   | how the values of each quantized tensor lie on its grid, at the end                           |
| curves.png, noise.png | plots                                                                                     |
| report.html       | the run's page, where qat-report was asked for it                                             |
| predictions.json  | the answers of the latest validation, in SQuAD's format (question answering only)             |
| error.txt         | why the run broke off, if it did                                                              |
| allocation.json   | prices, front, what was measured, and the answer (mode allocate only, as the next four)        |
| policy.yaml       | the bits that were chosen, as rules                                                           |
| bits.png          | the front, and the bits of all tensors                                                        |
| prices.csv        | a row a tensor: its bits, and its noise and price at every width                              |
| probes/           | run folders of the networks that were measured                                                |
| summary.json      | the result; a folder that has it is a finished run                                            |
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


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, which need not exist; files with typed contents are read by `records` from its path."""

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
        """What each tracker calls the run, by the tracker's name."""
        return self.path / "trackers.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

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
        """Whether the run came to its end."""
        return (self.path / SUMMARY.name).is_file()

    @property
    def contents(self) -> tuple[Path, ...]:
        """All that a run may leave here, whether it is there or not; the lock is not left."""
        typed = (ENVIRONMENT, METRICS, STEPS, LAYERS, OSCILLATIONS, HISTOGRAMS, PREDICTIONS, ALLOCATION, SUMMARY)
        return (
            *(self.path / file.name for file in typed),
            *(self.config, self.quantizers, self.log, self.error, self.tensorboard, self.checkpoints),
            *(self.curves, self.noise, self.page, self.export),
            *(self.trackers, self.wandb, self.mlruns, self.policy, self.bits, self.prices, self.probes),
        )

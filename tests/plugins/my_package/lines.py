"""A tracker that writes one line per epoch to a file."""

from collections.abc import Mapping

from qat_runner.runs.trackers import Tracker


class Lines(Tracker):
    def epoch(self, number: int, figures: Mapping[str, float]) -> None:
        with open(self.run.folder / "lines.txt", "a") as file:
            file.write(f"{number} {figures['train/loss']:.3f}\n")

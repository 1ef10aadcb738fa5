"""The cells of the paper's tables, the runs that may stand in for each, and the estimated cost of reproducing it."""

import functools
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qat_runner.config.composing import compose_config
from qat_runner.paper.claims import content
from qat_runner.paper.evidence import FULL_PRECISION, Result, Setup, fits
from qat_runner.paper.tables import FULL_PRECISION_ROWS, TABLES, paper, published
from qat_runner.report.differences import Differences, Verdict

NEAR = 1.0
"""Largest distance, in points, between our and the published difference from full precision for a cell to hold."""

BASELINE = "baseline"
"""Replaces the verdict of full-precision cells that were run, which the other cells are compared with."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table of the paper, and a setup whose runs give evidence about it."""

    table: str
    model: str
    row: str
    bits: int | None
    """None for full precision"""
    setup: Setup | None = None
    """None if no run may stand in for the cell"""

    @property
    def name(self) -> str:
        return ", ".join([self.model, self.row, *([] if self.bits is None else [f"{self.bits} bits"])])

    @property
    def published(self) -> float:
        """The published number, in percent."""
        value = published(self.table, self.model, self.row, self.bits)
        assert value is not None
        return value

    @property
    def published_gap(self) -> float | None:
        """Difference from the published full precision, in points; None for full precision itself."""
        return None if self.bits is None else self.published - float(paper()["full_precision"][self.model])

    @property
    def results(self) -> dict[int, Result]:
        """The results of the setup's runs, by seed."""
        return {} if self.setup is None else self.setup.cell(self.row, self.bits)

    @property
    def gap(self) -> Differences:
        """Our differences from full precision."""
        if self.setup is None or self.bits is None:
            return Differences(())
        return self.setup.differences(self.row, FULL_PRECISION, self.bits)

    @property
    def ends(self) -> tuple[float, float] | None:
        """Lower and upper bound of our difference for the cell to hold; None for full precision."""
        gap = self.published_gap
        return None if gap is None else (gap - NEAR, gap + NEAR)

    @property
    def verdict(self) -> str:
        if not self.results:
            return str(Verdict.NOT_RUN)
        return BASELINE if self.ends is None else str(self.gap.verdict(*self.ends))

    @property
    def _mode(self) -> str:
        return str(paper()[self.table]["mode"])

    @property
    def _data(self) -> str:
        """The data set that the paper used."""
        return "squad" if self._mode == "finetune" else "imagenet"

    @property
    def command(self) -> str:
        """The command that reproduces the cell with the paper's own network and data."""
        bits = [] if self.bits is None else [f"bits={self.bits}"]
        start = ["weights=torchvision"] if self._mode in ("retrain", "long_retrain") else []
        mode = [f"mode={self._mode}"] if start and self.row != "pretrained" else []
        words = [f"model={self.model}", f"dataset={self._data}", "data_dir=/data", *bits, *mode, *start]
        return shlex.join(["qat-run", f"+row={self.row}", *words])

    @property
    def gpu_hours(self) -> float:
        """Estimated GPU hours of that command, based on gpu_hours.yaml; evaluation alone counts as zero."""
        if self.row == "pretrained":
            return 0.0
        facts = estimates()
        samples = facts["samples"][self._data] * _recipe(self.model, self._data)[self._mode]["epochs"]
        quantized = 1 if self.bits is None else facts["quantized"]
        return float(samples * quantized / facts["samples_per_second"][self.model] / 3600)


def cells_of(setups: Sequence[Setup]) -> dict[str, list[Cell]]:
    """Return all published cells by table: one per setup that may stand in for the cell, or one without a setup."""
    own = [name for name in TABLES if "published" in paper()[name] and "source" not in paper()[name]]
    return {name: [with_it for cell in _cells(name) for with_it in _for_setups(cell, setups)] for name in own}


def _cells(name: str) -> Iterator[Cell]:
    layout = paper()[name]
    for model in layout["published"]:
        for row in layout["rows"]:
            for bits in [None] if row in FULL_PRECISION_ROWS else layout["bits"]:
                yield Cell(name, model, row, bits)


def _for_setups(cell: Cell, setups: Sequence[Setup]) -> list[Cell]:
    mode = "evaluate" if cell.row == "pretrained" else paper()[cell.table]["mode"]
    pattern = content()["stand_ins"][cell.model]
    some = [setup for setup in setups if setup.config.mode == mode and fits(setup.model, [pattern])]
    return [replace(cell, setup=setup) for setup in some if setup.cell(cell.row, cell.bits)] or [cell]


@functools.cache
def _recipe(model: str, data: str) -> Any:
    return compose_config([f"model={model}", f"dataset={data}"]).recipe


@functools.cache
def estimates() -> Any:
    """The content of gpu_hours.yaml."""
    return OmegaConf.load(Path(__file__).with_name("gpu_hours.yaml"))

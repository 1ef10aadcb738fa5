"""The paper's claims in words (claims.yaml), and the evidence that runs give for each."""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qat_runner.paper.evidence import CHANCE, FULL_PRECISION, Setup, fits
from qat_runner.paper.tables import TABLES, paper, published
from qat_runner.report.differences import Differences, Verdict


@dataclass(frozen=True)
class Statement:
    """A difference between two rows, and the bounds that it has to lie between."""

    of: str
    """a row of the tables"""
    minus: str
    """another row, FULL_PRECISION or CHANCE"""
    bits: int
    above: float
    below: float
    minus_mode: str | None
    """the mode in which the subtracted row was run, if it differs"""

    def text(self, other: Setup | None = None) -> str:
        """Return the statement in words, with the setup of the subtracted row if it is named."""
        where = ", ".join([*filter(None, [self.minus_mode]), *([other.name] if other else [])])
        elsewhere = f" ({where})" if where else ""
        ends = [f"{word} {end:g}" for word, end in (("above", self.above), ("below", self.below)) if math.isfinite(end)]
        return f"{_label(self.of)} minus {_label(self.minus)}{elsewhere}, {self.bits} bits: {' and '.join(ends)}"


@dataclass(frozen=True)
class Finding:
    """The evidence of one setup's runs about a statement."""

    statement: Statement
    setup: Setup
    differences: Differences
    other: Setup | None = None
    """the setup in which the subtracted row was run, if it is another one"""

    @property
    def text(self) -> str:
        return self.statement.text(self.other)

    @property
    def verdict(self) -> Verdict:
        return self.differences.verdict(self.statement.above, self.statement.below)


@dataclass(frozen=True)
class Found:
    """What the project found about a claim that runs of table rows cannot test."""

    verdict: str
    says: str


@dataclass(frozen=True)
class Claim:
    """An entry of claims.yaml."""

    id: str
    says: str
    source: str
    see: str | None
    found: Found | None
    """set if runs of table rows cannot test the claim"""
    models: tuple[str, ...]
    mode: str
    statements: tuple[Statement, ...]
    """empty if `found` is set"""

    def findings(self, setups: Sequence[Setup]) -> list[Finding]:
        """Return the findings on all statements in all setups that the claim is about, except where nothing was run."""
        mine = [setup for setup in setups if setup.config.mode == self.mode and fits(setup.model, self.models)]
        return [
            finding
            for setup in mine
            for statement in self.statements
            if setup.cell(statement.of, statement.bits)
            for finding in _findings(statement, setup, setups)
        ]

    def verdict(self, findings: Sequence[Finding]) -> str:
        """Return the verdict of all setups that test the claim; if they differ, the number of setups with each."""
        if self.found:
            return self.found.verdict
        setups = dict.fromkeys(finding.setup.name for finding in findings)
        verdicts = [together([f for f in findings if f.setup.name == name], len(self.statements)) for name in setups]
        decisive = (Verdict.HOLDS, Verdict.FAILS)
        kinds = [verdict if verdict in decisive else Verdict.OPEN for verdict in verdicts]
        counts = {kind: kinds.count(kind) for kind in (*decisive, Verdict.OPEN) if kind in kinds}
        if not verdicts:
            return str(Verdict.NOT_RUN)
        if len(counts) == 1:
            return str(verdicts[0] if len({*verdicts}) == 1 else Verdict.OPEN)
        first, *others = (f"{kind} in {count}" for kind, count in counts.items())
        return ", ".join([f"{first} of {len(verdicts)} setups", *others])

    def published(self, statement: Statement) -> dict[str, float]:
        """Return the difference in the paper's own numbers, by network."""
        models = [model for model in paper()["full_precision"] if fits(model, self.models)]
        found = {model: _published_difference(statement, model, self.mode) for model in models}
        return {model: value for model, value in found.items() if value is not None}


def together(findings: Sequence[Finding], wanted: int) -> Verdict:
    """Return the verdict on a claim in one setup: it fails if any statement fails, and holds if all hold.

    Args:
        findings: at least one, for the statements that have runs; a statement that subtracts runs of several other
            setups has several.
        wanted: number of statements of the claim.
    """
    verdicts = [finding.verdict for finding in findings]
    if Verdict.FAILS in verdicts:
        return Verdict.FAILS
    if len({finding.statement for finding in findings}) >= wanted and {*verdicts} == {Verdict.HOLDS}:
        return Verdict.HOLDS
    return verdicts[0] if len({*verdicts}) == 1 and Verdict.HOLDS not in verdicts else Verdict.OPEN


def _findings(statement: Statement, setup: Setup, setups: Sequence[Setup]) -> list[Finding]:
    """Return the finding of a setup on a statement.

    If the statement subtracts runs of another mode, there is a finding for each setup that agrees with this one and has
    runs with the same seed and start, or one without differences.
    """
    rows = statement.of, statement.minus, statement.bits
    if statement.minus_mode is None:
        return [Finding(statement, setup, setup.differences(*rows))]
    others = [other for other in setups if other.config.mode == statement.minus_mode and setup.agrees(other)]
    found = [Finding(statement, setup, setup.differences(*rows, other), other) for other in others]
    return [finding for finding in found if finding.differences.values] or [Finding(statement, setup, Differences(()))]


def _published_difference(statement: Statement, model: str, mode: str) -> float | None:
    value = published_in(mode, model, statement.of, statement.bits)
    if statement.minus == CHANCE:  # 0.1 %, for the 1000 classes of ImageNet
        return None if value is None else value - 0.1
    full = statement.minus == FULL_PRECISION
    other = published_in(statement.minus_mode or mode, model, statement.minus, None if full else statement.bits)
    return None if value is None or other is None else value - other


def published_in(mode: str, model: str, row: str, bits: int | None) -> float | None:
    """Return the number published for a row and mode in any table, in percent; None if there is none."""
    own = [name for name in TABLES if paper()[name]["mode"] == mode and "source" not in paper()[name]]
    known = [name for name in own if bits is None or bits in paper()[name]["bits"]]
    found = [published(name, model, row, bits) for name in known]
    return next((value for value in found if value is not None), None)


@functools.cache
def content() -> dict[str, Any]:
    """Return the content of claims.yaml."""
    read = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("claims.yaml")))
    assert isinstance(read, dict)
    return {str(key): value for key, value in read.items()}


@functools.cache
def claims() -> tuple[Claim, ...]:
    """Return all claims of claims.yaml."""
    return tuple(
        Claim(
            entry["id"],
            entry["says"],
            entry["source"],
            entry.get("see"),
            Found(**entry["found"]) if "found" in entry else None,
            tuple(entry.get("models", ())),
            entry.get("mode", ""),
            tuple(statement for asked in entry.get("statements", ()) for statement in _statements(**asked)),
        )
        for entry in content()["claims"]
    )


def _statements(
    of: str | list[str],
    minus: str,
    bits: int | list[int],
    above: float = -math.inf,
    below: float = math.inf,
    minus_mode: str | None = None,
) -> Iterator[Statement]:
    for row in [of] if isinstance(of, str) else of:
        for width in [bits] if isinstance(bits, int) else bits:
            yield Statement(row, minus, width, above, below, minus_mode)


def _label(row: str) -> str:
    return str(paper()["labels"].get(row, row))

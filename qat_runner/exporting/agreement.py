"""Whether a file does what its network does: the figures of both, and how far they may lie apart."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qat_runner.config.tasks import Measure
from qat_runner.errors import RunError

LEAST_AGREEMENT = 95.0
"""Percent of the predictions that a file must share with the network. Rounding differs from library to library, and a
value on the edge between two codes then falls to the other side; at few bits that changes some predictions, too."""

LARGEST_LOSS = 0.5
"""Percent points that its accuracy may lie below the network's; of a plain number, percent that it may be worse by."""


@dataclass(frozen=True)
class Figures:
    """What came out over the validation set."""

    accuracy: float
    """the task's metric"""
    agreement: float | None = None
    """percent of samples for which all predictions are the reference's; of tokens, where each has its own"""
    largest_difference: float | None = None
    """of a logit from the reference's; infinity where one of them is no number"""
    standard_error: float | None = None
    """of the accuracy less that of the reference, in points; None where the metric is no share of samples. Both answer
    the same samples, so it stems from those alone that one of them has right and the other wrong."""


def figures_of(record: Mapping[str, Any]) -> Figures:
    """Figures as export.json has them, where null is written for what is not finite."""
    return Figures(
        **{key: math.nan if value is None and key != "standard_error" else value for key, value in record.items()}
    )


def agrees(found: Figures, reference: Figures, measure: Measure) -> bool:
    """Whether what was found is the network of the reference, but for rounding; `measure` tells what accuracy is.

    What is not finite agrees with nothing.
    """
    assert found.agreement is not None
    if not math.isfinite(found.accuracy) or not math.isfinite(found.largest_difference or 0.0):
        return False
    return found.agreement >= LEAST_AGREEMENT and not measure.better(_least(reference, measure), found.accuracy)


def _least(reference: Figures, measure: Measure) -> float:
    """The worst accuracy that a file may have."""
    loss = LARGEST_LOSS if measure.unit else abs(reference.accuracy) * LARGEST_LOSS / 100
    return reference.accuracy + (loss if measure.lower_is_better else -loss)


def require(name: str, found: Figures, reference: Figures, measure: Measure) -> None:
    """Refuse a file that does not do what its network does.

    Raises:
        RunError: with the figures.
    """
    if not agrees(found, reference, measure):
        raise RunError(
            f"{name} disagrees with the network: {found.agreement:.2f} % of the predictions are the same (at least "
            f"{LEAST_AGREEMENT:g} wanted), {measure.name} {measure.told(found.accuracy)} beside "
            f"{measure.told(reference.accuracy)} (at most {LARGEST_LOSS:g}{'' if measure.unit else ' %'} "
            f"{'below' if measure.unit else 'worse'}); nothing was kept"
        )

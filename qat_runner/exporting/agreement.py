"""Whether a file computes what its network computes: the figures of both, and how far they may differ."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qat_runner.config.tasks import Measure
from qat_runner.errors import RunError

LEAST_AGREEMENT = 95.0
"""Percent of the predictions that a file must share with the network.

Libraries round differently, so a value on the boundary between two codes may be rounded to the other one. With few bits
this also changes some predictions.
"""

LARGEST_LOSS = 0.5
"""Percentage points by which the accuracy of a file may be below the network's.

If the metric is a plain number, percent by which it may be worse.
"""


@dataclass(frozen=True)
class Figures:
    """The results on the validation set."""

    accuracy: float
    """the task's metric"""
    agreement: float | None = None
    """percent of samples for which all predictions equal those of the reference; of tokens, if each has a prediction"""
    largest_difference: float | None = None
    """largest difference of a logit from that of the reference; infinity if one of them is NaN, or only one infinite"""
    standard_error: float | None = None
    """standard error of the difference in accuracy from the reference, in percentage points; None if the metric is not
    a share of samples. Both predict the same samples, so only samples that exactly one of them gets right count."""


def figures_of(record: Mapping[str, Any]) -> Figures:
    """Return figures from a record in export.json, which has null for a number that is not finite."""
    return Figures(
        **{key: math.nan if value is None and key != "standard_error" else value for key, value in record.items()}
    )


def agrees(found: Figures, reference: Figures, measure: Measure) -> bool:
    """Whether figures agree with those of the reference, up to rounding; `measure` describes the accuracy.

    Figures that are not finite never agree.
    """
    assert found.agreement is not None
    if not math.isfinite(found.accuracy) or not math.isfinite(found.largest_difference or 0.0):
        return False
    return found.agreement >= LEAST_AGREEMENT and not measure.better(_least(reference, measure), found.accuracy)


def _least(reference: Figures, measure: Measure) -> float:
    """Return the worst accuracy that a file may have."""
    loss = LARGEST_LOSS if measure.unit else abs(reference.accuracy) * LARGEST_LOSS / 100
    return reference.accuracy + (loss if measure.lower_is_better else -loss)


def require(name: str, found: Figures, reference: Figures, measure: Measure) -> None:
    """Check that a file computes what its network computes.

    Raises:
        RunError: it does not; the message contains the figures.
    """
    if not agrees(found, reference, measure):
        raise RunError(
            f"{name} disagrees with the network: {found.agreement:.2f} % of the predictions are the same (at least "
            f"{LEAST_AGREEMENT:g} required), {measure.name} {measure.describe(found.accuracy)} instead of "
            f"{measure.describe(reference.accuracy)} (at most {LARGEST_LOSS:g}"
            f"{' percentage points' if measure.unit else ' %'} {'lower' if measure.unit else 'worse'} allowed); "
            f"no new file was kept"
        )

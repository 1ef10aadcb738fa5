"""Whether a file does what its network does: the figures of both, and how far they may lie apart."""

from dataclasses import dataclass

from qat_runner.errors import RunError

LEAST_AGREEMENT = 95.0
"""Percent of the predictions that a file must share with the network. Rounding differs from library to library, and a
value on the edge between two codes then falls to the other side; at few bits that changes some predictions, too."""

LARGEST_LOSS = 0.5
"""Points that its accuracy may lie below the network's."""


@dataclass(frozen=True)
class Figures:
    """What came out over the validation set."""

    accuracy: float
    """the task's metric, percent"""
    agreement: float | None = None
    """percent of samples for which all predictions are the reference's"""
    largest_difference: float | None = None
    """of a logit from the reference's"""
    standard_error: float | None = None
    """of the accuracy less that of the reference, in points; None where the metric is no share of samples. Both answer
    the same samples, so it stems from those alone that one of them has right and the other wrong."""


def agrees(found: Figures, reference: Figures) -> bool:
    """Whether what was found is the network of the reference, but for rounding."""
    assert found.agreement is not None
    return found.agreement >= LEAST_AGREEMENT and found.accuracy >= reference.accuracy - LARGEST_LOSS


def require(name: str, found: Figures, reference: Figures) -> None:
    """Refuse a file that does not do what its network does.

    Raises:
        RunError: with the figures.
    """
    if not agrees(found, reference):
        raise RunError(
            f"{name} disagrees with the network: {found.agreement:.2f} % of the predictions are the same (at least "
            f"{LEAST_AGREEMENT:g} wanted), accuracy {found.accuracy:.2f} % beside {reference.accuracy:.2f} % (at most "
            f"{LARGEST_LOSS:g} below); nothing was kept"
        )

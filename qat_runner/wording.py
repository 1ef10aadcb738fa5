"""Numbers as people read them."""


def digits(x: float, count: int = 3) -> str:
    """A number to so many significant digits, never in powers of ten where it is large: 0.0123, 12.3, 1340."""
    told = f"{x:.{count}g}"
    return f"{x:.0f}" if "e+" in told else told


def percent(share: float, count: int = 2) -> str:
    """A share, 0 to 1, in percent: so many significant digits, and 100 for nothing but all."""
    told = digits(100 * share, count)
    if share < 1 and told == "100":
        told = f"{min(100 * share, 99.99):.2f}"
    return f"{told} %"

"""How one side's times compare with the other's."""

import statistics
from typing import Any


def ratios(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Their time over ours: of the medians, and the spread of the pairs."""
    pairs = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    ratio = statistics.median(theirs) / statistics.median(ours)
    return {"times_faster": round(ratio, 3), "least": round(pairs[0], 3), "most": round(pairs[-1], 3)}

"""A straight line through measured points: does a cost grow as theory says?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Line:
    """``y = intercept + slope * x``, and the share of the spread of y that it explains."""

    intercept: float
    slope: float
    r_squared: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line | None:
    """The least-squares line; None with fewer than two different x."""
    if len(set(x)) < 2:
        return None
    slope, intercept = np.polyfit(x, y, 1)
    values = np.asarray(y, dtype=float)
    residual = values - (intercept + slope * np.asarray(x, dtype=float))
    spread = float(((values - values.mean()) ** 2).sum())
    r_squared = 1.0 - float((residual**2).sum()) / spread if spread else 1.0
    return Line(float(intercept), float(slope), r_squared)

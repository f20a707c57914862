"""A straight-line cost fitted to measured times.

In: feature rows and seconds. Out: coefficients of at least 0 and how far the fit is off. Pure.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from shared.errors import SettingsError

FloatArray = npt.NDArray[np.float64]


class Fit(BaseModel):
    """Seconds as `coefficients @ features`; errors are |predicted - measured| / measured.

    `r_squared` is the share of the measured times' variance that the fit explains; 1 is all of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    coefficients: tuple[float, ...] = Field(min_length=1)
    num_samples: int = Field(0, ge=0)
    mean_error: float = Field(0.0, ge=0)
    median_error: float = Field(0.0, ge=0)
    max_error: float = Field(0.0, ge=0)
    r_squared: float = Field(1.0, le=1)

    def seconds(self, *features: float) -> float:
        """The predicted time; the first feature, 1, is left out."""
        constant, *slopes = self.coefficients
        return constant + sum(a * b for a, b in zip(slopes, features, strict=True))

    def times(self, factor: float) -> Fit:
        """Of what takes so many times as long."""
        scaled = tuple(factor * each for each in self.coefficients)
        return self.model_copy(update={"coefficients": scaled})

    def errors(self, rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> FloatArray:
        """The relative error of each sample; rows without the leading 1."""
        predicted = np.array([self.seconds(*row) for row in rows])
        measured = np.array(seconds)
        errors: FloatArray = np.abs(predicted - measured) / measured
        return errors


def fit(name: str, rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> Fit:
    """Least squares of the relative error, no coefficient below 0. Raises `SettingsError`.

    A time that falls as work grows would tempt the optimiser, hence the bound. With so few
    coefficients every set of non-zero ones is tried, which gives the exact optimum.
    """
    measured = np.array(seconds, dtype=np.float64)
    features = np.array([(1.0, *row) for row in rows], dtype=np.float64)
    num_columns = features.shape[1] if features.ndim == 2 else 1
    if len(measured) < num_columns or len(features) != len(measured):
        raise SettingsError(
            f"{name}: {len(features)} rows and {len(measured)} times were measured, "
            f"at least {num_columns} of each are needed"
        )
    if not np.isfinite(features).all() or not np.isfinite(measured).all() or measured.min() <= 0:
        raise SettingsError(f"{name}: a measured time or feature is not finite, or is not above 0")
    weighted = features / measured[:, None]
    best = _best_of_subsets(weighted)
    fitted = Fit(coefficients=tuple(map(float, best)), num_samples=len(measured))
    errors = fitted.errors(rows, seconds)
    return fitted.model_copy(
        update={
            "mean_error": float(errors.mean()),
            "median_error": float(np.median(errors)),
            "max_error": float(errors.max()),
            "r_squared": _r_squared(errors * measured, measured),
        }
    )


def _r_squared(residuals: FloatArray, measured: FloatArray) -> float:
    variance = float(np.square(measured - measured.mean()).sum())
    return 1.0 - float(np.square(residuals).sum()) / variance if variance else 1.0


def _best_of_subsets(weighted: FloatArray) -> FloatArray:
    """Coefficients of at least 0 with the least squared distance of `weighted @ c` from 1."""
    num_columns = weighted.shape[1]
    best, least = np.zeros(num_columns), float(len(weighted))
    for size in range(1, num_columns + 1):
        for columns in itertools.combinations(range(num_columns), size):
            chosen = weighted[:, columns]
            scale = np.linalg.norm(chosen, axis=0)
            if not scale.all():
                continue
            values = np.linalg.lstsq(chosen / scale, np.ones(len(chosen)), rcond=None)[0] / scale
            residual = float(np.square(chosen @ values - 1.0).sum())
            if values.min() >= 0 and residual < least:
                best, least = np.zeros(num_columns), residual
                best[list(columns)] = values
    return best

"""Means of right and wrong answers with their standard errors, over training seeds and over questions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mean_and_error(right: np.ndarray, groups: Sequence[str]) -> tuple[float, float]:
    """The mean of ``right`` and its standard error, if seeds and images were drawn at random.

    Seeds and images are crossed: every model answers the same questions. In a model ``right = mean + seed + image +
    rest``, the variance of the mean is ``V(seed) / S + V(image) / J + V(rest) / SJ``, estimated here from the mean
    squares of a two-way analysis of variance.

    Args:
        right: [S, Q] answers of the models of S seeds to Q questions; 0 or 1, or differences of these.
        groups: the image of each of the Q questions. Questions of one image are not independent, so the images count.

    Returns:
        The standard error is NaN with a single image. With a single seed, it covers the images only.
    """
    right = np.asarray(right, dtype=np.float64)
    seeds, questions = right.shape
    mean = float(right.mean())
    names = sorted(set(groups))
    number = {name: index for index, name in enumerate(names)}
    # Sums over the questions of an image [S, J]; images with more questions weigh more in the mean.
    sums = np.zeros((seeds, len(names)))
    np.add.at(sums.T, [number[group] for group in groups], (right - mean).T)
    return mean, crossed_error(sums) * len(names) / questions


def crossed_error(values: np.ndarray) -> float:
    """Standard error of the mean of ``values`` [S, J], where rows and columns are both random."""
    values = np.asarray(values, dtype=np.float64)
    num_rows, num_columns = values.shape
    if num_columns < 2:
        return float("nan")
    mean, rows, columns = values.mean(), values.mean(axis=1), values.mean(axis=0)
    of_columns = float(((columns - mean) ** 2).sum() / (num_columns - 1) / num_columns)
    if num_rows == 1:
        return float(np.sqrt(of_columns))
    of_rows = float(((rows - mean) ** 2).sum() / (num_rows - 1) / num_rows)
    rest = values - rows[:, None] - columns[None] + mean
    of_rest = float((rest**2).sum() / ((num_rows - 1) * (num_columns - 1)) / (num_rows * num_columns))
    # Both of the first contain the rest once. Where a component is estimated below 0, it counts as 0.
    return float(np.sqrt(max(of_rows + of_columns - of_rest, of_rows, of_columns)))

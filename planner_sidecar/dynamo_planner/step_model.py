"""Step-time models fitted online: seconds = sum of non-negative coefficients times features.

Samples are kept as operating points (a bucket per octave half of the main feature), so that hours at one load do not
wash out what other loads taught; everything fades, and a sample far from its point counts for little. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations

import numpy as np

_FADE = 0.995  # weight that every point keeps per sample anywhere: about 200 samples are remembered
_MAX_POINT_WEIGHT = 20.0  # one point never drowns the others
_HUBER = 3.0  # samples further than this many spreads away are pulled in
_MIN_WEIGHT = 5.0
_FIRST_SPREAD = 0.5  # relative, before a point knows its own
_RIDGE = 1e-9
_LEAST_SECONDS, _MOST_SECONDS, _MOST_FEATURE = 1e-6, 1e5, 1e9


@dataclass(frozen=True)
class Point:
    """One operating point: faded weight, mean features, mean seconds and mean relative deviation."""

    bucket: int
    weight: float
    features: tuple[float, ...]
    seconds: float
    spread: float


@dataclass(frozen=True)
class StepModel:
    """All that is known about one kind of step. Features begin with the constant 1; the second one is the main one."""

    points: tuple[Point, ...] = ()

    @property
    def weight(self) -> float:
        return sum(point.weight for point in self.points)

    @property
    def mean_features(self) -> tuple[float, ...] | None:
        """The faded mean of the features, or None before the first sample."""
        total = self.weight
        if total <= 0:
            return None
        columns = zip(*((point.weight * x for x in point.features) for point in self.points), strict=True)
        return tuple(sum(column) / total for column in columns)


def learn_step(model: StepModel, features: Sequence[float], seconds: float) -> StepModel:
    """One more sample; one that is not a number, or beyond all sense, changes nothing."""
    if not _is_sane(features, seconds):
        return model
    key = bucket_of(features[1])
    points = {point.bucket: replace(point, weight=point.weight * _FADE) for point in model.points}
    old = points.get(key)
    if old is None or len(old.features) != len(features):
        points[key] = Point(key, 1.0, tuple(features), seconds, _FIRST_SPREAD)
    else:
        points[key] = _folded(old, features, seconds)
    kept = (point for _, point in sorted(points.items()) if point.weight > 1e-3)
    return StepModel(tuple(kept))


def learn_steps(model: StepModel, samples: Sequence[tuple[tuple[float, ...], float]]) -> StepModel:
    """What many engines saw at one moment: the middle one of each operating point, and the others not at all."""
    groups: dict[int, list[tuple[float, tuple[float, ...]]]] = {}
    for features, seconds in samples:
        if _is_sane(features, seconds):
            groups.setdefault(bucket_of(features[1]), []).append((seconds, features))
    for _, group in sorted(groups.items()):
        seconds, features = sorted(group)[len(group) // 2]
        model = learn_step(model, features, seconds)
    return model


def _is_sane(features: Sequence[float], seconds: float) -> bool:
    return _LEAST_SECONDS <= seconds <= _MOST_SECONDS and all(0 <= x <= _MOST_FEATURE for x in features)


def bucket_of(x: float) -> int:
    """Two buckets per doubling; everything below 1 shares one."""
    return 0 if x < 1 else 1 + int(2 * math.log2(x))


@lru_cache(maxsize=64)  # asked for several times a tick, and it changes once
def coefficients(model: StepModel) -> tuple[float, ...] | None:
    """Non-negative least squares over the points, relative errors weighing equally; None before there is enough.

    Points without spread in the main feature give the line through the origin: it overstates growth, the safe side.
    """
    if model.weight < _MIN_WEIGHT or not model.points:
        return None
    features = np.array([point.features for point in model.points], dtype=float)
    seconds = np.array([point.seconds for point in model.points], dtype=float)
    root = np.sqrt([point.weight for point in model.points]) / seconds
    main = features[:, 1]
    mean = float(np.average(main, weights=[point.weight for point in model.points]))
    free = list(range(features.shape[1]))
    if mean > 0 and float(main.max() - main.min()) <= 0.05 * mean:
        free = free[1:]
    return _non_negative(features * root[:, None], seconds * root, free)


def predict(fitted: Sequence[float], features: Sequence[float]) -> float:
    """Seconds at `features`."""
    return float(sum(a * x for a, x in zip(fitted, features, strict=True)))


def _folded(old: Point, features: Sequence[float], seconds: float) -> Point:
    # Inside a bucket time grows with the features; compare at equal main feature.
    expected = old.seconds * (features[1] / old.features[1] if features[1] > 0 and old.features[1] > 0 else 1.0) ** 0.5
    deviation = (seconds - expected) / expected
    limit = _HUBER * max(old.spread, 0.02)
    pull = min(1.0, limit / abs(deviation)) if deviation else 1.0
    weight = min(old.weight, _MAX_POINT_WEIGHT - 1.0)
    share = pull / (weight + pull)
    return Point(
        old.bucket,
        min(old.weight + pull, _MAX_POINT_WEIGHT),
        tuple(a + share * (b - a) for a, b in zip(old.features, features, strict=True)),
        old.seconds + share * (seconds - old.seconds),
        old.spread + share * (min(abs(deviation), limit) - old.spread),
    )


def _non_negative(features: np.ndarray, seconds: np.ndarray, free: list[int]) -> tuple[float, ...]:
    """The best of all subsets of at most three features whose coefficients come out non-negative."""
    best, best_error = np.zeros(features.shape[1]), math.inf
    for size in range(len(free), 0, -1):
        for chosen in combinations(free, size):
            columns = features[:, list(chosen)]
            scale = np.maximum(np.linalg.norm(columns, axis=0), 1e-300)
            gram = (columns / scale).T @ (columns / scale) + _RIDGE * np.eye(size)
            found = np.linalg.solve(gram, (columns / scale).T @ seconds) / scale
            if (found < 0).any():
                continue
            error = float(np.sum((seconds - columns @ found) ** 2))
            if error < best_error - 1e-12:
                best = np.zeros(features.shape[1])
                best[list(chosen)] = found
                best_error = error
    return tuple(float(value) for value in best)

"""Demand at the horizon: level, damped trend and optional daily profile on log rates, with conformal bounds.

How much of the trend and of the profile is believed is itself learnt (two weights, recursive least squares), and so is
the error: past forecasts wait for their moment and leave a residual; the bounds are quantiles of these residuals whose
level is moved until the promised share of truths lies inside. Pure: a frozen state in, a frozen state out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

_DAY_SECONDS = 86_400.0
_TREND_SLOWER = 2.0  # than the level: a trend that is seen a start-up later is of no use
_TREND_DAMPING = 1.0  # horizons after which a trend has lost 63 % of its push
_RLS_FADE = 0.999
_PROFILE_SHARE = 0.3  # of a new day in the profile
_MIN_RESIDUALS = 12
_LEVEL_STEP = 0.02
_FIRST_MARGIN = math.log(1.25)  # before there are residuals; until there are enough it counts as two of them
_FIRST_WEIGHT = 2.0
_BOUND_DEVIATIONS = 1.645  # of a normal error: 95 % lie below
_FLOOR = 1e-3  # requests/s that stand for none: the logarithm needs one
_FLOOR_OF_PEAK = 0.05  # an outage must not teach that demand can grow a thousandfold
_CEILING_OF_PEAK = 1.25  # nor a burst that it goes on: what passes this is seen when it comes
_PEAK_SECONDS = 86_400.0
_ABSURD_RATE, _ABSURD_SECONDS = 1e12, 1e9  # no demand is seen through these: noise that would overflow the sums


@dataclass(frozen=True)
class ForecastRule:
    """How to forecast. `step_seconds` is the grid; `horizon_steps` of it lie between a decision and its effect."""

    step_seconds: float = 30.0
    horizon_steps: int = 4
    level_seconds: float = 60.0
    upper: float = 0.95
    window: int = 288
    daily: bool = True
    bins_per_day: int = 144
    is_flat: bool = False
    """Forecast the level alone, without trend and profile: the yardstick."""


@dataclass(frozen=True)
class Pending:
    """A forecast whose truth is still to come: due step, point forecast, bounds, and the terms that made it."""

    due: int
    point: float
    upper: float
    lower: float
    level: float
    terms: tuple[float, float]


@dataclass(frozen=True)
class ForecastState:
    """All that one step hands to the next; rates are natural logarithms."""

    step: int = -1
    filling: float = 0.0
    filled_seconds: float = 0.0
    level: float | None = None
    peak: float = 0.0
    """The highest rate of about the last day, in requests/s."""
    trend: float = 0.0
    weights: tuple[float, float] = (0.5, 0.0)
    covariance: tuple[float, float, float] = (1.0, 0.0, 1.0)
    profile: tuple[float | None, ...] = ()
    pending: tuple[Pending, ...] = ()
    residuals: tuple[float, ...] = ()
    upper_level: float = 0.95
    lower_level: float = 0.05
    hits: tuple[int, int] = (0, 0)
    """Truths at or under the upper bound, and truths: the cover that was reached."""
    terms: tuple[float, float] = field(default=(0.0, 0.0))


@dataclass(frozen=True)
class Outlook:
    """Requests per second at the horizon: upper bound, point and lower bound."""

    upper: float
    point: float
    lower: float


def fold(state: ForecastState, rule: ForecastRule, rate: float, seconds: float, now: float) -> ForecastState:
    """`rate` requests/s were seen over the last `seconds`, up to `now` (seconds since midnight are `now` modulo a day).

    Steps nobody saw are not guessed: forecasts that were due in a gap are dropped.
    """
    if not (0 <= rate <= _ABSURD_RATE and 0 < seconds <= _ABSURD_SECONDS and math.isfinite(now)):
        return state
    step = int(now // rule.step_seconds)
    if state.step < 0 or step < state.step:  # the first look, or a clock that went back
        return replace(state, step=step, filling=rate * seconds, filled_seconds=seconds, pending=())
    if step == state.step:
        return replace(state, filling=state.filling + rate * seconds, filled_seconds=state.filled_seconds + seconds)
    if state.filled_seconds > 0:
        state = _close_step(state, rule, state.filling / state.filled_seconds)
    kept = tuple(entry for entry in state.pending if entry.due >= step)
    return replace(state, step=step, filling=rate * seconds, filled_seconds=seconds, pending=kept)


def outlook(state: ForecastState, rule: ForecastRule) -> Outlook | None:
    """The demand `horizon_steps` after the last closed step, or None before one was closed."""
    if state.level is None:
        return None
    ahead = _ahead(state, rule, state.step - 1)
    return Outlook(_rate(ahead.upper), _rate(ahead.point), _rate(ahead.lower))


def check_forecast(state: ForecastState) -> None:
    """Raise AssertionError if an invariant is broken."""
    dues = [entry.due for entry in state.pending]
    assert dues == sorted(set(dues)), "pending forecasts are out of order"
    assert 0 <= state.hits[0] <= state.hits[1], "more hits than truths"
    assert all(math.isfinite(value) for value in state.residuals), "a residual is not finite"


def _close_step(state: ForecastState, rule: ForecastRule, rate: float) -> ForecastState:
    peak = max(rate, state.peak * math.exp(-rule.step_seconds / _PEAK_SECONDS))
    x = math.log(max(rate, _FLOOR, _FLOOR_OF_PEAK * peak))
    state = replace(_settle(state, rule, x), peak=peak)
    level, trend = state.level, state.trend
    if level is None:
        level, trend = x, 0.0
    else:
        gain = 1.0 - math.exp(-rule.step_seconds / rule.level_seconds)
        new = level + gain * (x - level)
        slow = gain / _TREND_SLOWER
        trend += slow * ((new - level) - trend)
        level = new
    state = replace(state, level=level, trend=trend, profile=_profiled(state, rule, level))
    ahead = _ahead(state, rule, state.step)
    # A horizon that has become shorter overtakes older forecasts; those lose their turn.
    kept = tuple(entry for entry in state.pending if entry.due < ahead.due)
    return replace(state, terms=ahead.terms, pending=(*kept, ahead))


def _ahead(state: ForecastState, rule: ForecastRule, step: int) -> Pending:
    level = state.level if state.level is not None else 0.0
    steps = max(1, rule.horizon_steps)
    damped = steps * _TREND_DAMPING * (1.0 - math.exp(-1.0 / _TREND_DAMPING))
    terms = (state.trend * damped, _daily_change(state, rule, step, step + steps)) if not rule.is_flat else (0.0, 0.0)
    point = level + state.weights[0] * terms[0] + state.weights[1] * terms[1]
    if len(state.residuals) < _MIN_RESIDUALS:
        margin = _first_margin(state.residuals)
        upper, lower = point + margin, point - margin
    else:
        errors = np.asarray(state.residuals)
        upper = point + float(np.quantile(errors, state.upper_level))
        lower = point + float(np.quantile(errors, state.lower_level))
    most = math.log(max(_CEILING_OF_PEAK * state.peak, _FLOOR))
    upper = min(upper, most)
    return Pending(step + steps, point, upper, min(upper, lower), level, terms)


def _first_margin(residuals: tuple[float, ...]) -> float:
    """Errors that are too few for a quantile tell their spread at least."""
    scale = _FIRST_WEIGHT * _FIRST_MARGIN**2
    seen = sum((_BOUND_DEVIATIONS * error) ** 2 for error in residuals)
    return math.sqrt((scale + seen) / (_FIRST_WEIGHT + len(residuals)))


def _settle(state: ForecastState, rule: ForecastRule, x: float) -> ForecastState:
    """Compare the forecast that is due now with the truth `x`, and learn from it."""
    due = next((entry for entry in state.pending if entry.due == state.step), None)
    if due is None:
        return state
    weights, covariance = _rls(state.weights, state.covariance, due.terms, x - due.level)
    upper, lower, hits = state.upper_level, state.lower_level, state.hits
    if len(state.residuals) >= _MIN_RESIDUALS:
        miss = 1.0 - rule.upper
        upper = min(max(upper + _LEVEL_STEP * ((x > due.upper) - miss), 0.5), 0.999)
        lower = min(max(lower - _LEVEL_STEP * ((x < due.lower) - miss), 0.001), 0.5)
        hits = (hits[0] + (x <= due.upper), hits[1] + 1)
    return replace(
        state,
        weights=weights,
        covariance=covariance,
        residuals=(*state.residuals, x - due.point)[-rule.window :],
        upper_level=upper,
        lower_level=lower,
        hits=hits,
        pending=tuple(entry for entry in state.pending if entry.due > state.step),
    )


def _rls(
    weights: tuple[float, float], covariance: tuple[float, float, float], terms: tuple[float, float], y: float
) -> tuple[tuple[float, float], tuple[float, float, float]]:
    """One step of recursive least squares on two terms; weights stay between nothing and full belief."""
    p = np.array([[covariance[0], covariance[1]], [covariance[1], covariance[2]]])
    h, w = np.array(terms), np.array(weights)
    if float(np.abs(h).max()) < 1e-9:
        return weights, covariance
    gain = p @ h / (0.05 + float(h @ p @ h))  # 0.05: log-rate noise of a step, so that early points do not rule
    w = np.clip(w + gain * (y - float(h @ w)), 0.0, (1.5, 1.0))
    p = np.clip((p - np.outer(gain, h @ p)) / _RLS_FADE, -10.0, 10.0)
    return (float(w[0]), float(w[1])), (float(p[0, 0]), float(p[0, 1]), float(p[1, 1]))


def _bin(rule: ForecastRule, step: int) -> int:
    return int((step * rule.step_seconds % _DAY_SECONDS) / _DAY_SECONDS * rule.bins_per_day) % rule.bins_per_day


def _profiled(state: ForecastState, rule: ForecastRule, level: float) -> tuple[float | None, ...]:
    if not rule.daily:
        return ()
    profile: list[float | None] = [None] * rule.bins_per_day
    if len(state.profile) == rule.bins_per_day:
        profile = list(state.profile)
    place = _bin(rule, state.step)
    steps_per_bin = max(1.0, _DAY_SECONDS / rule.bins_per_day / rule.step_seconds)
    old = profile[place]
    profile[place] = level if old is None else old + _PROFILE_SHARE / steps_per_bin * (level - old)
    return tuple(profile)


def _daily_change(state: ForecastState, rule: ForecastRule, start: int, end: int) -> float:
    """What other days did between the two times of day; 0 while one of them is unknown."""
    if len(state.profile) != rule.bins_per_day:
        return 0.0
    before, after = state.profile[_bin(rule, start)], state.profile[_bin(rule, end)]
    return 0.0 if before is None or after is None else after - before


def _rate(log_rate: float) -> float:
    rate = math.exp(min(log_rate, 50.0))
    return 0.0 if rate <= 2 * _FLOOR else rate

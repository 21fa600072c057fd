"""Learns the coefficients of the cost rule from what requests show: first-token times, token times, output lengths.

Least squares with forgetting over two to three terms each. A fit may move a coefficient only within its bounds, and it
starts with the weight of a few observations at the values it was given, so that one odd answer moves little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .policy import CostModel, Load

_FORGET = 0.995  # of the weight of what was seen before, per observation
_FORGET_FETCHES = 0.95
_PRIOR_OBSERVATIONS = 8.0
_PUBLISH_EVERY = 16  # observations between two models
# Short prefills say more about fixed cost than about the price of a token.
_MIN_PREFILL_TOKENS = 256
_KILO, _MEGA = 1e3, 1e6  # terms are scaled to be about 1
_MOST_TIMES_PREDICTED = 20.0  # beyond it an answer was held up by something that no rule can know


class Fit:
    """Recursive least squares: y = sum of coefficient * term, never below `floors`."""

    def __init__(self, start: Sequence[float], scales: Sequence[float], floors: Sequence[float]) -> None:
        self.coefficients = list(start)
        self._floors = floors
        size = len(self.coefficients)
        # The prior: as if each term had been seen alone, a few times, at its usual size.
        self._spread = [
            [1 / (_PRIOR_OBSERVATIONS * scales[row] ** 2) if row == column else 0.0 for column in range(size)]
            for row in range(size)
        ]

    def predict(self, terms: Sequence[float]) -> float:
        return sum(coefficient * term for coefficient, term in zip(self.coefficients, terms, strict=True))

    def observe(self, terms: Sequence[float], value: float) -> None:
        spread, size = self._spread, len(terms)
        reach = [sum(spread[row][column] * terms[column] for column in range(size)) for row in range(size)]
        weight = _FORGET + sum(term * part for term, part in zip(terms, reach, strict=True))
        error = value - self.predict(terms)
        for row in range(size):
            moved = self.coefficients[row] + reach[row] / weight * error
            self.coefficients[row] = max(moved, self._floors[row])
            for column in range(size):
                spread[row][column] = (spread[row][column] - reach[row] * reach[column] / weight) / _FORGET
        # A term that stops varying must not gain weight without end.
        if max(spread[row][row] for row in range(size)) > 1e3:
            for row in range(size):
                for column in range(size):
                    spread[row][column] *= 0.5

    def check(self) -> None:
        for coefficient, floor in zip(self.coefficients, self._floors, strict=True):
            assert coefficient >= floor, f"a coefficient of {coefficient}, below {floor}"
        assert all(row[index] >= 0 for index, row in enumerate(self._spread)), "a negative variance"


class CostLearner:
    """The cost model as observations make it. `model` is replaced now and then, never changed."""

    def __init__(self, model: CostModel | None = None) -> None:
        self.model = model or CostModel()
        start = self.model
        # First token: fixed part, seconds per 1,000 tokens, seconds per million token pairs.
        self._prefill = Fit((start.t_0, start.t_p * _KILO, start.t_a * _MEGA), (1.0, 4.0, 16.0), (0.0, 1e-3, 0.0))
        # Token: fixed part, and how many times the load's share by the model we started with. Sequences and cached
        # tokens rise and fall together, so that no fit can tell their prices apart.
        self._start = start
        self._decode = Fit((start.t_0, 1.0), (1.0, 0.01), (1e-4, 0.0))
        self._output_tokens = start.expected_output_tokens
        self._seen = 0
        #: What a token that a peer holds is worth, of one that the engine holds itself; 0 from the start: nothing.
        self.peer_worth = 0.0
        self._saved = self._possible = 0.0  # seconds, of late

    @property
    def counts_peers(self) -> bool:
        """Whether what peers hold is worth anything, ever."""
        return self._possible > 0

    def expect_of_peers(self, worth: float) -> None:
        """What to go by until reads from peers were seen."""
        self.peer_worth, self._saved, self._possible = worth, worth, 1.0

    def fetched(
        self, seconds: float, queued_tokens: int, new_tokens: int, peer_tokens: int, prompt_tokens: int
    ) -> None:
        """A first token came; of its prompt the engine lacked `new_tokens`, and a peer held `peer_tokens` of them."""

        def expected(new: int) -> float:
            pairs = new * (prompt_tokens - new / 2)
            return self._prefill.predict((1.0, (queued_tokens + new) / _KILO, pairs / _MEGA))

        alone = expected(new_tokens)
        possible = alone - expected(max(0, new_tokens - peer_tokens))
        if possible <= 0 or not self.counts_peers:
            return
        self._saved = self._saved * _FORGET_FETCHES + max(-possible, min(alone - seconds, possible))
        self._possible = self._possible * _FORGET_FETCHES + possible
        self.peer_worth = max(0.0, self._saved / self._possible)

    def first_token(self, seconds: float, queued_tokens: int, new_tokens: int, prompt_tokens: int) -> None:
        """A first token came `seconds` after its request was placed behind `queued_tokens` of others' prefill."""
        tokens = queued_tokens + new_tokens
        if tokens < _MIN_PREFILL_TOKENS or seconds <= 0:
            return
        terms = (1.0, tokens / _KILO, new_tokens * (prompt_tokens - new_tokens / 2) / _MEGA)
        most = _MOST_TIMES_PREDICTED * max(self._prefill.predict(terms), 0.01)
        self._prefill.observe(terms, min(seconds, most))
        self._count()

    def stream_ended(self, seconds: float, events: int, load: Load, prefill_seconds: float) -> None:
        """A stream gave `events` within `seconds` after its first, beside such a load.

        Meanwhile its engine prefilled others for `prefill_seconds`: that is no decode time.
        """
        if events < 2 or seconds <= 0:
            return
        self._output_tokens += 0.02 * (events - self._output_tokens)
        decoding = max(seconds - prefill_seconds, seconds / 10)
        share = self._start.t_d * load.in_flight + self._start.t_k * load.active_tokens
        self._decode.observe((1.0, share), min(decoding / (events - 1), 10.0))
        self._count()

    def _count(self) -> None:
        self._seen += 1
        if self._seen % _PUBLISH_EVERY:
            return
        _, per_kilo, per_mega = self._prefill.coefficients
        t_0, times = self._decode.coefficients
        self.model = replace(
            self.model,
            t_p=min(per_kilo / _KILO, 0.1),
            t_a=min(per_mega / _MEGA, 1e-5),
            t_0=min(t_0, 5.0),
            t_d=min(times * self._start.t_d, 1.0),
            t_k=min(times * self._start.t_k, 1e-3),
            expected_output_tokens=max(1.0, self._output_tokens),
        )

    def check(self) -> None:
        self._prefill.check()
        self._decode.check()
        assert self.model.t_p > 0, "a prefill token costs nothing"
        assert 0 <= self.peer_worth <= 1, f"a peer's token is worth {self.peer_worth}"

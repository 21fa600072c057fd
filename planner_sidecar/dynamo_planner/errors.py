"""The planner's own errors. Every text says what is wrong and what to do about it."""


class PlannerError(Exception):
    """Base of all errors raised by this package."""


class ConfigError(PlannerError):
    """A setting is missing, wrong or contradictory. The command line turns it into one line and exit code
    2.
    """


class ObservationError(PlannerError):
    """A peer could not be read. `reason` is a short word fit for a metric label."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class ActuationError(PlannerError):
    """An order cannot be carried out. `reason` is a short word fit for a metric label."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class KubeError(ActuationError):
    """The Kubernetes API refused, or could not be asked."""


class IllegalTransitionError(PlannerError):
    """A replica's life has no such step; the text names the state and the event."""


class LogError(PlannerError):
    """A decision log cannot be read back; the text names the line."""

"""Errors of the proxy, by who is at fault. Their text carries the remedy; none of them reaches a user as a
traceback.
"""


class ProxyError(Exception):
    """Base of every error the proxy raises on purpose."""


class ConfigError(ProxyError):
    """The operator gave a value that cannot work; the text says what to do."""


class ListenError(ProxyError):
    """A listening socket could not be opened."""


class DiscoveryError(ProxyError):
    """A source of engines cannot be asked."""


class UnknownEngineError(ProxyError):
    """An admin call named an engine that the proxy does not have."""


class EngineSettingsError(ProxyError):
    """An admin call added an engine that is here with other settings."""


class EngineBusyError(ProxyError):
    """An engine cannot be removed while requests are in flight on it."""


class EventDecodeError(ProxyError):
    """A KV event message does not have a shape we know. `reason` is a short metric label."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class RequestError(ProxyError):
    """The client's request cannot be served: HTTP status, a short code, and the sentence the client reads."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class LimitError(RequestError):
    """A caller has used up what it may use: the client may try again after a while."""

    def __init__(self, retry_after_seconds: float, message: str) -> None:
        super().__init__(429, "rate_limit_exceeded", message)
        self.retry_after_seconds = retry_after_seconds


class ProtocolError(RequestError):
    """Bytes that are not HTTP/1.1 as we accept it: the connection cannot go on."""

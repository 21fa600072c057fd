"""The file of API keys: who may call, and how much. It holds hashes, never keys, and is read again when it changes.

# NAME sha256:HEX [requests-per-minute=N] [tokens-per-minute=N] [slo-classes=NAME,...]
alice sha256:9f86d0... requests-per-minute=600 tokens-per-minute=200000
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .errors import ConfigError
from .limits import Bucket, CallerLimits

_LINE = "NAME sha256:HEX [requests-per-minute=N] [tokens-per-minute=N] [slo-classes=NAME,...]"
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")
_CLASSES = "slo-classes"
_RATES = {"requests-per-minute": "requests", "tokens-per-minute": "tokens"}


@dataclass(slots=True, eq=False)
class Caller:
    """One key of the file. `rates` are per minute; `classes` are those that it may name, None: all."""

    name: str
    digest: bytes
    rates: dict[str, float] = field(default_factory=dict)
    classes: frozenset[str] | None = None
    limits: CallerLimits = field(default_factory=CallerLimits)

    @property
    def number(self) -> int:
        """How proxies that share the file call it when they talk."""
        return int.from_bytes(self.digest[:8], "big")


class KeyRing:
    """The keys of a file that may change."""

    def __init__(self, path: Path, now: float, classes: Collection[str] = ()) -> None:
        """Read the file. `classes`: that there are. Raises ConfigError."""
        self._path = path
        self._classes = classes
        self._callers: dict[bytes, Caller] = {}
        self._numbered: dict[int, Caller] = {}
        self._seen: tuple[int, int] = (0, 0)
        self.reload(now)

    def __len__(self) -> int:
        return len(self._callers)

    def __iter__(self) -> Iterator[Caller]:
        return iter(self._callers.values())

    def numbered(self, number: int) -> Caller | None:
        return self._numbered.get(number)

    def find(self, key: bytes) -> Caller | None:
        """The caller with this key. Hashes are looked up and compared, never keys: time tells nothing of them."""
        digest = hashlib.sha256(key).digest()
        caller = self._callers.get(digest)
        return caller if caller is not None and hmac.compare_digest(caller.digest, digest) else None

    def reload(self, now: float) -> bool:
        """Read the file if it changed. Raises ConfigError and keeps what it had. Callers keep what they have used."""
        try:
            status = self._path.stat()
            seen = (status.st_mtime_ns, status.st_size)
            if seen == self._seen:
                return False
            text = self._path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read the API keys in {self._path} ({error}); name a file of lines {_LINE}"
            ) from None
        self._seen = seen
        try:
            fresh = parse_keys(text, self._classes)
        except ConfigError as error:
            raise ConfigError(f"API keys in {self._path}, {error}") from None
        if not fresh:
            raise ConfigError(f"no API key is in {self._path}; fill it with lines {_LINE}, or serve without it")
        known = {caller.name: caller for caller in self._callers.values()}
        for caller in fresh:
            old = known.get(caller.name)
            same = old is not None and old.rates == caller.rates
            caller.limits = old.limits if same and old is not None else _full(caller.rates, now)
        self._callers = {caller.digest: caller for caller in fresh}
        self._numbered = {caller.number: caller for caller in fresh}
        return True

    def check(self) -> None:
        for digest, caller in self._callers.items():
            assert digest == caller.digest, "a caller is filed under another's digest"
            caller.limits.check()


def _full(rates: dict[str, float], now: float) -> CallerLimits:
    return CallerLimits(**{name: Bucket.full(rate, now) for name, rate in rates.items()})


def parse_keys(text: str, classes: Collection[str] = ()) -> list[Caller]:
    """The callers in a file's text, who may name some of these SLO classes. Raises ConfigError naming the line."""
    callers: list[Caller] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        digest = _DIGEST.fullmatch(words[1]) if len(words) > 1 else None
        if digest is None:
            raise ConfigError(f"line {number}: not {_LINE} (the hash: printf %s KEY | sha256sum)")
        named = [word for word in words[2:] if word.startswith(f"{_CLASSES}=")]
        rates = _rates([word for word in words[2:] if word not in named], number)
        allowed = _named_classes(named, classes, number)
        caller = Caller(words[0], bytes.fromhex(digest[1]), rates, allowed)
        if any(caller.name == other.name or caller.digest == other.digest for other in callers):
            raise ConfigError(f"line {number}: this name or key is there already; name each once")
        callers.append(caller)
    return callers


def _named_classes(words: list[str], classes: Collection[str], number: int) -> frozenset[str] | None:
    named = [name for word in words for name in word.partition("=")[2].split(",") if name]
    for name in named:
        if name not in classes:
            raise ConfigError(f"line {number}: there is no SLO class {name!r}; --slo-class {name},ttft=... makes it")
    return frozenset(named) if words else None


def _rates(words: list[str], number: int) -> dict[str, float]:
    rates = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in _RATES or not value.isdigit() or not int(value):
            known = f"{', '.join(_RATES)} = a number above 0, {_CLASSES}=NAME,..."
            raise ConfigError(f"line {number}: {word!r} is not one of {known}")
        rates[_RATES[name]] = float(value)
    return rates

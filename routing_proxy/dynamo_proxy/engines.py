"""The engines the proxy may send to: their states, models and numbers. A plain registry; health.py moves the
states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any, NamedTuple

from . import dialects
from .breaker import Breaker
from .config import EngineAddress, Timeouts
from .dialects import ServedModels
from .errors import EngineBusyError, UnknownEngineError
from .handoff import ROOM_ROUTES
from .ledger import Ledger
from .policy import Load
from .upstream import UpstreamPool

_MAX_FLEETS = 256  # clients may ask for models that nobody serves


class Health(Enum):
    """What the last probes and requests say."""

    STARTING = "starting"  # never seen ready, and not looked for long
    READY = "ready"
    DOWN = "down"


# What decides which engine takes a request.
_DECISIVE = frozenset(("health", "draining", "models", "peer_name", "runs_connector"))
_TOGETHER_SECONDS = 5.0
_PREFILLS = ("prefill", "both")


NO_PEERS: Mapping[int, str] = MappingProxyType({})


class Fleet(NamedTuple):
    """The engines that may take a request: their loads, and a bitmask of their slots."""

    loads: tuple[Load, ...]
    mask: int
    readers: tuple[int, ...] = ()  # those of them that read from peers
    peers: Mapping[int, str] = NO_PEERS  # whose host memory they can read, and by which name


@dataclass(slots=True, eq=False)
class Engine:
    """One engine. `slot` is its small number: its bit in every mask, and its name towards clients."""

    slot: int
    address: EngineAddress
    pool: UpstreamPool
    timeouts: Timeouts = field(default_factory=Timeouts)
    breaker: Breaker = field(default_factory=Breaker)
    health: Health = Health.STARTING
    was_ready: bool = False  # at some time
    draining: bool = False
    models: ServedModels | None = None  # None: not known, so any model may be served
    event_feeds: int = 0
    events_complete: bool = False
    events_lost: bool = False
    bootstrap_port: int = 0  # where SGLang's decode engines meet this prefill engine
    runs_connector: bool = False  # ours, so it understands hints
    peer_name: str | None = None  # by which its peers may be sent to it; empty: it serves none; None: not known
    name: str = field(init=False)  # what clients and metrics see; it tells no address
    label: bytes = field(init=False)
    credential: str = field(default="", repr=False)  # the key that the engine wants; empty: none
    host_lines: bytes = field(init=False, repr=False)  # what every request to it begins with
    root_url: bytes = field(init=False)
    role: str = field(init=False)  # of config.ROLES, or empty
    hands_over: bool = field(init=False)  # another engine may compute its prompts
    on_change: Callable[[], None] = field(init=False, default=lambda: None)  # something in _DECISIVE was set

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name in _DECISIVE and hasattr(self, "on_change"):
            self.on_change()

    def __post_init__(self) -> None:
        self.name = f"engine-{self.slot}"
        self.label = self.name.encode()
        self.role = self.address.options.role
        self.hands_over = self.role in ("decode", "both")
        self.root_url = self.address.url.encode("latin-1") + b"/"
        self.host_lines = b"host: %b\r\n" % self.address.authority.encode("latin-1")
        if self.credential:
            self.host_lines += b"authorization: Bearer %b\r\n" % self.credential.encode("latin-1")

    @property
    def takes_requests(self) -> bool:
        return self.health is Health.READY and not self.draining

    @property
    def state(self) -> str:
        if self.draining:
            return "draining"
        return "tripped" if self.health is Health.READY and self.breaker.blocks else self.health.value

    @property
    def knowledge(self) -> str:
        if self.events_lost:
            return "degraded"
        return "exact" if self.event_feeds and self.events_complete else "approximate"

    def may_tape(self, path: str) -> bool:
        """True if streams of this route can go on at another engine."""
        return self.models is not None and path in dialects.ON_TAPE.get(self.models.kind, ())

    @property
    def kind(self) -> str:
        """What it says it is; empty: it does not say."""
        return self.models.kind if self.models is not None else ""

    def needs_room(self, path: str) -> bool:
        """True if an SGLang decode engine serves this route, and only together with a prefill engine."""
        if self.role != "decode" or self.models is None:
            return False
        return self.models.kind == "sglang" and path in ROOM_ROUTES

    def serves(self, model: str) -> bool:
        return not model or self.models is None or model in self.models.ids

    def may_serve(self, model: str) -> bool:
        """True if it serves this model or can be expected to: nothing is, of one that was down from the start."""
        return self.serves(model) and (self.was_ready or self.health is not Health.DOWN)


class EngineRegistry:
    """Engines by slot. A slot is reused only after its engine was removed."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._engines: dict[int, Engine] = {}
        self._leaving: set[int] = set()  # slots of engines that were removed but have parts still open
        self.loras: frozenset[str] = frozenset()
        self._fleets: dict[str, Fleet] = {}  # by model; emptied whenever an engine changes
        self.warming: dict[int, float] = {}  # engines that are new among others, and since when
        self.ready_since: dict[int, float] = {}
        self.has_prefill = False  # an engine computes prompts for others

    def __iter__(self) -> Iterator[Engine]:
        return iter(list(self._engines.values()))

    def __len__(self) -> int:
        return len(self._engines)

    def at(self, slot: int) -> Engine:
        return self._engines[slot]

    def find(self, address: EngineAddress) -> Engine:
        """The engine at an address. Raises UnknownEngineError."""
        for engine in self._engines.values():
            if engine.address == address:
                return engine
        raise UnknownEngineError(f"no engine {address.url} here; GET /engines lists them")

    def free_slot(self) -> int:
        slot = 0
        while slot in self._engines or slot in self._leaving:
            slot += 1
        return slot

    def add(self, engine: Engine) -> None:
        assert engine.slot not in self._engines, f"slot {engine.slot} is taken"
        self._engines[engine.slot] = engine
        self._ledger.load(engine.slot)
        engine.on_change = engine.breaker.on_change = self._fleets.clear
        self._roles_changed()

    def remove(self, engine: Engine) -> None:
        """Take an engine out; its slot stays taken until `left`. Raises EngineBusyError while requests are in
        flight on it, UnknownEngineError if it was taken out before.
        """
        if self._engines.get(engine.slot) is not engine:
            raise UnknownEngineError(f"no engine {engine.address.url} here; GET /engines lists them")
        in_flight = self._ledger.own(engine.slot).in_flight
        if in_flight:
            raise EngineBusyError(f"{in_flight} requests are in flight on {engine.address.url}; drain it and wait")
        del self._engines[engine.slot]
        self.warming.pop(engine.slot, None)
        self.ready_since.pop(engine.slot, None)
        self._roles_changed()
        self._leaving.add(engine.slot)
        self.models_changed()

    def left(self, engine: Engine) -> None:
        """Nothing of a removed engine is left: its slot may be used again."""
        self._leaving.discard(engine.slot)
        self._ledger.forget_slot(engine.slot)

    def became_ready(self, engine: Engine, now: float) -> None:
        """An engine takes requests from now on; a new one among others that do so already gets less at first."""
        self.warming.pop(engine.slot, None)
        others = [other.slot for other in self if other.takes_requests and other is not engine]
        # Those that are found within seconds of each other started together, or it is the proxy that is new.
        if any(now - self.ready_since.get(slot, now) >= _TOGETHER_SECONDS for slot in others):
            self.warming[engine.slot] = now
        self.ready_since[engine.slot] = now
        engine.health, engine.was_ready = Health.READY, True

    def _roles_changed(self) -> None:
        self._fleets.clear()
        self.has_prefill = any(e.role in _PREFILLS for e in self._engines.values())

    def models_changed(self) -> None:
        """Recompute which served models are LoRA adapters."""
        self.loras = frozenset().union(*(e.models.loras for e in self._engines.values() if e.models is not None))

    def fleet(self, model: str, tried: int) -> Fleet:
        """The engines that may take a request for `model`, without the slots of the bitmask `tried`."""
        if tried:
            return self._fleet(model, tried)
        fleet = self._fleets.get(model)
        if fleet is None:
            if len(self._fleets) >= _MAX_FLEETS:
                self._fleets.clear()
            fleet = self._fleets[model] = self._fleet(model, 0)
        return fleet

    def _fleet(self, model: str, tried: int) -> Fleet:
        fit = [e for e in self._fit(model, tried) if e.role != "prefill"]
        # A doubtful engine is better than none.
        return self._as_fleet(model, [e for e in fit if not e.breaker.blocks] or fit)

    def prefill_fleet(self, model: str, but_slot: int, in_room: bool) -> Fleet:
        """The engines that may compute a prompt for another one, the doubtful left out, unless it cannot do without."""
        fit = self._prefills(model, but_slot, in_room)
        sure = [e for e in fit if not e.breaker.blocks]
        return self._as_fleet(model, sure or fit if in_room else sure)

    def has_prefill_for(self, model: str, but_slot: int, in_room: bool) -> bool:
        """True if there is such an engine, doubtful or not."""
        return bool(self._prefills(model, but_slot, in_room))

    def _prefills(self, model: str, but_slot: int, in_room: bool) -> list[Engine]:
        fit = self._fit(model, 1 << but_slot)
        return [e for e in fit if e.role in _PREFILLS and (e.bootstrap_port or not in_room)]

    def _fit(self, model: str, tried: int) -> list[Engine]:
        engines = self._engines.values()
        return [e for e in engines if e.takes_requests and not tried >> e.slot & 1 and e.serves(model)]

    def _as_fleet(self, model: str, engines: list[Engine]) -> Fleet:
        readers = tuple(e.slot for e in engines if e.runs_connector)
        peers = self._peers(model) if readers else NO_PEERS
        mask = sum(1 << e.slot for e in engines)
        return Fleet(tuple(self._ledger.load(e.slot) for e in engines), mask, readers, peers)

    def _peers(self, model: str) -> dict[int, str]:
        """The engines whose host memory others can read, and their names. Who drains is one still."""
        ready = (e for e in self._engines.values() if e.health is Health.READY and e.serves(model))
        return {e.slot: e.peer_name for e in ready if e.peer_name}

    def any_ready(self) -> bool:
        """True if an engine is ready that answers clients."""
        return any(engine.takes_requests and engine.role != "prefill" for engine in self._engines.values())

    def check(self) -> None:
        assert self.warming.keys() <= self._engines.keys(), "an engine that is not here is new"
        assert not self._leaving & self._engines.keys(), "an engine has the slot of one that still leaves"
        addresses = [engine.address for engine in self._engines.values()]
        assert len(set(addresses)) == len(addresses), "an address is listed twice"
        for slot, engine in self._engines.items():
            assert engine.slot == slot, f"engine {engine.slot} is filed under {slot}"
            assert not (engine.events_complete and engine.events_lost), f"{engine.name}: events complete and lost"
            engine.pool.check()
            engine.breaker.check()
        for model, fleet in self._fleets.items():
            assert fleet == self._fleet(model, 0), f"the fleet for {model!r} is out of date"

"""Who may ask what: API keys, limits per key, routes that control engines, fields that only proxies may send."""

from __future__ import annotations

import asyncio
import logging
import re

from .api_keys import Caller, KeyRing
from .errors import ConfigError, LimitError, RequestError
from .http1 import Request
from .spending import Spending
from .text_chain import Prompt

_CREDENTIAL = re.compile(rb"^(authorization|x-api-key):[ \t]*(.*?)[ \t]*\r\n", re.IGNORECASE | re.MULTILINE)
_USAGE = re.compile(rb'"total_tokens":\s?(\d{1,12})')
_RELOAD_SECONDS = 2.0
# What engines serve for their operators: it changes an engine's state or tells addresses.
_CONTROL = re.compile(
    r"/(v1/)?((un)?load_lora_adapter|abort_requests?$|pause|resume|is_paused|continue_generation|sleep|wake_up|is_sleeping"
    r"|collective_rpc|(start|stop)_profile|(start|stop|dump)_expert|dump|reset_|release_|flush_|init_weight|(\w+_)?weights?(_|$|/)"
    r"|update_weight|(is_)?scal(e|ing)_elastic|fault_tolerance|slow_down|set_|configure_|freeze_gc|(get_)?hicache|clear_hicache"
    r"|pd_role|(add|remove|list)_external|(get_)?server_info|kv_event_sources|(get_)?remote_instance|get_internal|(get_)?loads?$"
    r"|tokenizer_info|get_world_size|shutdown|rpc|engine)"
)
log = logging.getLogger("dynamo_proxy")


class Meter:
    """What one request of a caller with a token limit costs."""

    __slots__ = ("_caller", "_last", "_prompt_tokens", "_reads", "_spending")

    def __init__(self, caller: Caller, prompt_tokens: int, spending: Spending) -> None:
        self._caller = caller
        self._spending = spending
        self._prompt_tokens = prompt_tokens
        self._last = b""
        self._reads = 0

    def saw(self, data: bytes) -> None:
        """Bytes of the answer."""
        self._last = self._last[-512:] + data if len(data) < 512 else data
        self._reads += 1

    def over(self, now: float) -> None:
        """Charge the answer: by its usage if it tells, else a token per read (an event carries one, mostly)."""
        found = _USAGE.findall(self._last)
        answer = int(found[-1]) - self._prompt_tokens if found else self._reads
        if self._caller.limits.tokens is not None:
            self._caller.limits.tokens.spend(answer, now)
            self._spending.granted(self._caller)


class Guard:
    """Admits requests. Without keys it only takes credentials off that are not the engines' business."""

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys
        self.spending = Spending(keys)
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = self._loop.create_task(self._watch())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _watch(self) -> None:
        """Read the file again when it changes. A file that cannot be used changes nothing."""
        told = ""
        while True:
            await asyncio.sleep(_RELOAD_SECONDS)
            try:
                if self._keys.reload(self._loop.time()):
                    log.info("API keys read again: %d keys", len(self._keys))
                told = ""
            except ConfigError as error:
                if str(error) != told:
                    log.warning("%s; the keys read before stay in force", error)
                told = str(error)

    def admit(self, request: Request) -> tuple[Request, Caller]:
        """Who sent this, and the request without its key. Raises RequestError."""
        head = request.head
        found = _CREDENTIAL.findall(head.passing)
        keys = {_key(name, value) for name, value in found}
        if len(keys) != 1:
            message = "give one API key, as Authorization: Bearer KEY or x-api-key: KEY"
            raise RequestError(401, "invalid_api_key", message)
        caller = self._keys.find(keys.pop())
        if caller is None:
            raise RequestError(401, "invalid_api_key", "this API key is not known here; check it")
        return without_credentials(request), caller

    def charge(self, caller: Caller, prompt: Prompt, prompt_tokens: int) -> Meter | None:
        """Take a request from its caller's limits. Raises RequestError for an SLO class that is not the caller's, and
        LimitError.
        """
        if prompt.slo is not None and caller.classes is not None and prompt.slo.name not in caller.classes:
            message = f"this API key may not ask for service_tier {prompt.slo.name!r}; leave it out"
            raise RequestError(400, "service_tier_not_allowed", message)
        wait = caller.limits.take(prompt_tokens, self._loop.time())
        if wait:
            raise LimitError(wait, f"the limits of this API key are used up; try again in {wait:.1f} s")
        if caller.rates:
            self.spending.granted(caller)
        return Meter(caller, prompt_tokens, self.spending) if caller.limits.tokens is not None else None

    def check(self) -> None:
        self._keys.check()
        assert self._task is None or not self._task.done(), "nobody reads the API keys again"


def _key(name: bytes, value: bytes) -> bytes:
    if name[:1] in b"aA":
        scheme, _, key = value.partition(b" ")
        return key.strip() if scheme.lower() == b"bearer" else b""
    return value


def without_credentials(request: Request) -> Request:
    """The request for engines that have a key of their own."""
    head = request.head
    return Request(head._replace(passing=_CREDENTIAL.sub(b"", head.passing)), request.body)


def is_control_route(path: str) -> bool:
    """True for routes by which operators run an engine."""
    return _CONTROL.match(path) is not None

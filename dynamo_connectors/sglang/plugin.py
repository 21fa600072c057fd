"""Registers `--hicache-storage-backend dynamo` and our flags with SGLang, through its supported plugin hooks.

A launch that asks for us either gets us or stops with one line; a launch that does not is never disturbed.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from dynamo_connectors.config import flag_of, refuse_tiny
from dynamo_connectors.errors import DynamoConnectorsError, PluginError
from dynamo_connectors.host_limits import check_host
from dynamo_connectors.sglang import chains, compat, handoff_plugin, live
from dynamo_connectors.sglang.settings import (
    BACKEND,
    BACKEND_FLAG,
    SGLANG_SETTINGS,
    Launch,
    Translation,
    asks_for_us,
    translate,
)

logger = logging.getLogger(__name__)
_DEST = "hicache_storage_backend"
_USAGE_ERROR = 2

Hook = Callable[..., Any]


def install() -> None:
    """Called by SGLang in each of its processes, before arguments are parsed."""
    try:
        hooks = _all_hooks()
    except PluginError as error:
        if asks_for_us(sys.argv[1:]):
            _stop(error)
        # SGLang swallows a plugin's exception and would go on without us: harmless for those who did not ask.
        logger.warning("dynamo: the plugin is off: %s", error)
        return
    registry = compat.hook_registry()
    for target, hook, kind in hooks:
        registry.HookRegistry.register(target, hook, registry.HookType[kind])


def _all_hooks() -> list[tuple[str, Hook, str]]:
    """(target, hook, type). Every target is looked up first, because SGLang only logs one that it cannot find."""
    compat.hook_registry()
    handoff = handoff_plugin.hooks()
    arguments: list[tuple[str, Hook, str]] = [
        (f"{compat.SERVER_ARGS}.add_cli_args", _add_flags, "AFTER"),
        (f"{compat.SERVER_ARGS}.from_cli_args", _translate_flags, "BEFORE"),
        (compat.resolution_hook(), _translate_record, "BEFORE"),
    ]
    for target, _, _ in arguments:
        compat.resolve(target)
    weights: list[tuple[str, Hook, str]] = []
    if compat.is_scheduler_process():
        weights = [(target, _weights_change, "BEFORE") for target in compat.weight_update_hooks()]
        weights.append((compat.FLUSH_CACHE, _cache_flushed, "AFTER"))
    return [*arguments, *handoff, *weights, *_storage_hooks()]


def _storage_hooks() -> list[tuple[str, Hook, str]]:
    """Of the scheduler: what a storage backend needs around its calls."""
    if not compat.is_scheduler_process():
        return []
    hooks: list[tuple[str, Hook, str]] = [
        (compat.ATTACH, _attach, "AROUND"),
        (compat.PUBLISH_EVENTS, _publish_events, "AFTER"),
        *((target, _looked_up, "AFTER") for target in compat.LOOKUPS),
    ]
    for target, _, _ in hooks:
        compat.resolve(target)
    hooks += chains.prefix_hooks()
    seed = compat.hash_seed_hook()
    return hooks if seed is None else [*hooks, (seed, compat.seed_page_hash, "BEFORE")]


def _add_flags(_result: object, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
    action = next((known for known in parser._actions if BACKEND_FLAG in known.option_strings), None)
    if action is None or (action.choices is not None and "dynamic" not in action.choices):
        if asks_for_us(sys.argv[1:]):
            _stop(compat.drift(f"{BACKEND_FLAG} dynamic"))
        return
    if action.choices is not None and BACKEND not in action.choices:
        action.choices = [*action.choices, BACKEND]
    for setting, text in SGLANG_SETTINGS.items():
        # Kept as text: the value is judged once, in `translate`, with one line instead of argparse's page of usage.
        parser.add_argument(flag_of(setting), default=None, help=text)


def _translate_flags(_cls: type, arguments: Any, *_: object, **__: object) -> None:
    try:
        translated = _translate(arguments, {setting: getattr(arguments, setting, None) for setting in SGLANG_SETTINGS})
    except DynamoConnectorsError as error:
        _stop(error)
    if translated is not None:
        arguments.hicache_storage_backend = "dynamic"
        arguments.hicache_storage_backend_extra_config = translated.extra_config


def _translate_record(record: Any, *_: object, **__: object) -> None:
    """`Engine(hicache_storage_backend="dynamo", ...)`: no command line, so errors are exceptions."""
    translated = _translate(record, {})
    if translated is not None:
        record.hicache_storage_backend = "dynamic"
        record.hicache_storage_backend_extra_config = translated.extra_config


def _translate(given: Any, flags: dict[str, object]) -> Translation | None:
    launch = Launch(
        backend=getattr(given, _DEST, None),
        extra_config=getattr(given, f"{_DEST}_extra_config", None),
        flags=flags,
        is_used=bool(
            getattr(given, "enable_hierarchical_cache", False)
            or getattr(given, "disaggregation_decode_enable_offload_kvcache", False)
        ),
        workers=_worker_count(given),
    )
    translated = translate(launch)
    if translated is not None:
        refuse_tiny("kvbm_nvme_gb", translated.config.nvme_bytes)
        check_host(translated.config)
        compat.require_storage_interface()
        compat.refuse_unsupported(given)
        compat.weight_update_hooks()
    return translated


def _attach(attach: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    """`PUT /hicache/storage-backend` with our name: translated as a launch is; a mistake is its answer."""
    try:
        translated = _translate(_Attachment(request, compat.server_args()), {})
    except DynamoConnectorsError as error:
        return compat.attach_refused(str(error))
    if translated is not None:
        request.hicache_storage_backend = "dynamic"
        request.hicache_storage_backend_extra_config_json = translated.extra_config
    return attach(scheduler, request)


class _Attachment:
    """An attach request, read like the launch it amends."""

    def __init__(self, request: Any, launched_with: Any) -> None:
        self._launched_with = launched_with
        self.hicache_storage_backend = request.hicache_storage_backend
        self.hicache_storage_backend_extra_config = request.hicache_storage_backend_extra_config_json

    def __getattr__(self, name: str) -> Any:
        return getattr(self._launched_with, name)


def _publish_events(_result: object, publisher: Any) -> None:
    for backend in live.backends.all():
        compat.publish_events(publisher, *backend.take_events())


def _looked_up(result: Any, _controller: object, operation: Any) -> None:
    request = str(getattr(operation.request_id, "rid", operation.request_id))
    for backend in live.backends.all():
        backend.note_use(request, compat.page_hashes(operation, result), operation.prefix_keys)
    found = compat.looked_up(operation, result)
    if found is not None:
        for backend in live.backends.all():
            backend.describe(*found, operation.last_hash)


def _worker_count(given: Any) -> int:
    """Scheduler processes that will own a slab. Attention-DP ranks lie inside TP; plain DP replicas do not."""
    size = max(1, getattr(given, "tp_size", None) or 1) * max(1, getattr(given, "pp_size", None) or 1)
    attention_dp = getattr(given, "enable_dp_attention", False) or (getattr(given, "attn_dp_size", None) or 1) > 1
    return size if attention_dp else size * max(1, getattr(given, "dp_size", None) or 1)


def _weights_change(*_: object, **__: object) -> None:
    live.backends.suspend_all()


def _cache_flushed(result: object, *_: object, **__: object) -> None:
    if result:
        live.backends.resume_all()
        for backend in live.backends.all():
            backend.routers_forgot()


def _stop(error: DynamoConnectorsError) -> NoReturn:
    sys.stderr.write(f"dynamo: {error}\n")
    sys.stderr.flush()
    raise SystemExit(_USAGE_ERROR)

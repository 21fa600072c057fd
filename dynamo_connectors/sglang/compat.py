"""Where SGLang 0.5.14 to 0.5.23 keep what we hook, and the one line for a version that keeps it elsewhere.

Nothing here imports an engine module before it is asked to.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from dynamo_connectors.errors import PluginError
from dynamo_connectors.sglang.settings import BACKEND, BACKEND_FLAG

SUPPORTED = "0.5.14 to 0.5.23"

SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
SCHEDULER_MODULE = "sglang.srt.managers.scheduler"
_SCHEDULER = f"{SCHEDULER_MODULE}.Scheduler"
_WEIGHT_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
#: A cache flush ends the suspension that a change of weights begins.
FLUSH_CACHE = f"{_SCHEDULER}.flush_cache"
_WEIGHT_UPDATES = tuple(
    f"{_WEIGHT_UPDATER}.update_weights_from_{source}" for source in ("disk", "distributed", "tensor", "ipc")
)
#: Since 0.5.23 only: opens a session in which weights arrive piece by piece.
_WEIGHT_SESSION = f"{_WEIGHT_UPDATER}.begin_weight_update"
_STORAGE_METHODS = ("batch_get_v1", "batch_set_v1", "batch_exists", "register_mem_pool_host")


def engine_version() -> str:
    try:
        return str(importlib.import_module("sglang.version").__version__)
    except (ImportError, AttributeError):
        return "of unknown version"


def drift(what: str) -> PluginError:
    """The error for an SGLang that lacks `what`."""
    return PluginError(
        f"SGLang {engine_version()} does not offer {what}; {BACKEND_FLAG} {BACKEND} works with "
        f"SGLang {SUPPORTED}: install one of these, or drop the flag"
    )


def hook_registry() -> Any:
    """SGLang's `HookRegistry` module. Raises `PluginError`."""
    module = _import("sglang.srt.plugins.hook_registry")
    for name in ("HookRegistry", "HookType"):
        if not hasattr(module, name):
            raise drift(f"plugins.hook_registry.{name}")
    if not hasattr(module.HookRegistry, "register"):
        raise drift("HookRegistry.register")
    return module


def resolution_hook() -> str:
    """The method that turns given arguments into final ones: `resolve_once` since 0.5.23, `__post_init__` before."""
    name = "resolve_once" if hasattr(resolve(SERVER_ARGS), "resolve_once") else "__post_init__"
    target = f"{SERVER_ARGS}.{name}"
    resolve(target)
    return target


def weight_update_hooks() -> list[str]:
    """Everything through which weights may change. Imports the scheduler. Raises `PluginError`."""
    for target in (FLUSH_CACHE, *_WEIGHT_UPDATES):
        resolve(target)
    updater = resolve(_WEIGHT_UPDATER)
    session = [_WEIGHT_SESSION] if hasattr(updater, _WEIGHT_SESSION.rsplit(".", 1)[1]) else []
    return [*_WEIGHT_UPDATES, *session]


def is_scheduler_process() -> bool:
    """Whether this process has the scheduler's code; importing it only to hook it would slow `--help` down."""
    return SCHEDULER_MODULE in sys.modules


def require_storage_interface() -> None:
    """Raises `PluginError` unless the backend's base class and the `dynamic` route to it are there."""
    base = resolve("sglang.srt.mem_cache.hicache_storage.HiCacheStorage")
    for name in _STORAGE_METHODS:
        if not hasattr(base, name):
            raise drift(f"HiCacheStorage.{name}")
    resolve("sglang.srt.mem_cache.storage.backend_factory.StorageBackendFactory._create_dynamic_backend")


def require_weight_hooks() -> None:
    """Raises `PluginError` unless a change of weights reaches us: stale KV must never be served."""
    for target in (FLUSH_CACHE, *weight_update_hooks()):
        if not hasattr(resolve(target), "__wrapped__"):
            raise PluginError(
                f"the {BACKEND} plugin is not active in this process, so a change of weights would go unnoticed; "
                f"add {BACKEND} to SGLANG_PLUGINS or unset it"
            )


def storage_metrics_class() -> Any:
    return resolve("sglang.srt.observability.metrics_collector.StorageMetrics")


def resolve(path: str) -> Any:
    """The object at a dotted path: module, then class, then attribute. Raises `PluginError`."""
    parts = path.split(".")
    split = next((index for index, part in enumerate(parts) if part[:1].isupper()), len(parts) - 1)
    found = _import(".".join(parts[:split]))
    for part in parts[split:]:
        if not hasattr(found, part):
            raise drift(path.removeprefix("sglang.srt."))
        found = getattr(found, part)
    return found


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise drift(f"{module.removeprefix('sglang.srt.')} ({error})") from error

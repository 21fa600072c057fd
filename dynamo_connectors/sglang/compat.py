"""Where SGLang 0.5.14 to 0.5.23 keep what we hook, and the one line for a version that keeps it elsewhere.

Nothing here imports an engine module before it is asked to.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynamo_connectors.blocks import BlockKey
from dynamo_connectors.errors import ConfigError, PluginError
from dynamo_connectors.sglang.l3_events import Removed, Stored
from dynamo_connectors.sglang.pool_match import PoolMatch
from dynamo_connectors.sglang.settings import BACKEND, BACKEND_FLAG
from dynamo_connectors.weights import weights_identity

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
#: Attaching at run time knows SGLang's own names only.
ATTACH = f"{_SCHEDULER}.attach_hicache_storage_wrapped"
#: SGLang publishes the events of its own levels here.
PUBLISH_EVENTS = (
    "sglang.srt.managers.scheduler_components.kv_events_publisher.SchedulerKvEventsPublisher.publish_kv_events"
)
#: Where a prompt's page hashes meet its tokens.
LOOKUPS = (
    "sglang.srt.managers.cache_controller.HiCacheController._storage_hit_query",
    "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController._storage_hit_query",
)
#: Before 0.5.23 a page hash says nothing of the LoRA adapter or of `extra_key`: we seed it.
_HASH_PAGE = "sglang.srt.mem_cache.radix_cache.RadixKey.hash_page"
_SEED_TAG = b"dynamo-kvbm-namespace-v1"
#: Settings that change what the KV of the same weights and tokens is.
_KV_SETTINGS = (
    "dtype",
    "kv_cache_dtype",
    "quantization",
    "quantization_param_path",
    "torchao_config",
    "rl_quant_profile",
    "json_model_override_args",
    "context_length",
    "load_format",
    "model_impl",
    "enable_fp32_lm_head",
    "speculative_algorithm",
)
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


def hash_seed_hook() -> str | None:
    """The method to hook so that adapters and tenants never share a page hash; None where SGLang sees to it."""
    if hasattr(_import("sglang.srt.mem_cache.utils"), "storage_namespace_seed"):
        return None
    resolve(_HASH_PAGE)
    return _HASH_PAGE


def seed_page_hash(key: Any, start: int, end: int, prior_hash: str | None = None) -> Any:
    """Before `hash_page`: the first page of a chain gets the chain's namespace as its parent."""
    if prior_hash is None and key.extra_key is not None:
        prior_hash = hashlib.sha256(_SEED_TAG + key.extra_key.encode()).hexdigest()
    return (key, start, end, prior_hash), {}


def refuse_unsupported(given: Any) -> None:
    """Raises `ConfigError` for what this SGLang cannot do with a storage backend without storing wrong bytes."""
    if hash_seed_hook() is None:
        return
    version = engine_version()
    if getattr(given, "speculative_algorithm", None) is not None:
        raise ConfigError(
            f"SGLang {version} does not hand a draft model's cache to {BACKEND_FLAG} {BACKEND}; "
            "use SGLang 0.5.23, or drop --speculative-algorithm or the flag"
        )
    if getattr(given, "disaggregation_decode_enable_offload_kvcache", False) and getattr(given, "enable_lora", False):
        raise ConfigError(
            f"SGLang {version} does not tell LoRA adapters apart in what a decode worker offloads; "
            "use SGLang 0.5.23, or drop --disaggregation-decode-enable-offload-kvcache"
        )


def server_args() -> Any:
    """What the operator asked for, in a scheduler process."""
    try:
        return resolve("sglang.srt.runtime_context.get_server_args")()
    except PluginError:
        return resolve("sglang.srt.server_args.get_global_server_args")()


def engine_facts() -> dict[str, str]:
    """What decides how stored KV must be read, beyond the storage config, by `Namespace` field."""
    given = server_args()
    revision = getattr(given, "revision", None)
    # What a page means inside may change with the version.
    rules = [("version", engine_version()), *((name, str(getattr(given, name, None))) for name in _KV_SETTINGS)]
    return {
        "model": str(given.model_path),
        "revision": str(revision or ""),
        "weights": _weights(given, revision),
        "key_rules": repr(rules),
    }


def _weights(given: Any, revision: str | None) -> str:
    """The model's, and those of all that adds to its KV. A draft model's pages are kept beside the model's.

    Page hashes name an adapter of the launch by its path; one that is loaded later has a name nobody else has.
    """
    load_format, seed = str(getattr(given, "load_format", "")), int(getattr(given, "random_seed", 0) or 0)
    names = [weights_identity(_model_place(str(given.model_path), revision), load_format, seed)]
    draft = getattr(given, "speculative_draft_model_path", None)
    if draft is not None:
        names.append(weights_identity(_model_place(str(draft), None), load_format, seed))
    adapters = getattr(given, "lora_paths", None) or ()
    given_as = adapters.values() if isinstance(adapters, Mapping) else adapters
    paths = {_adapter_path(each) for each in given_as}
    names += [weights_identity(_model_place(path, None), "lora", 0) for path in sorted(paths)]
    return " ".join(names)


def _adapter_path(given: Any) -> str:
    """SGLang's own record, or what the user wrote: [NAME=]PATH."""
    if hasattr(given, "lora_path"):
        return str(given.lora_path)
    name, _, path = str(given).partition("=")
    return path or name


def _model_place(model_path: str, revision: str | None) -> Path | None:
    """The model's folder or file on this machine; None when its weights come from elsewhere."""
    if Path(model_path).exists():
        return Path(model_path)
    found = resolve("huggingface_hub.try_to_load_from_cache")
    try:
        config = found(model_path, "config.json", revision=revision)
    except ValueError:  # no name of a model on the hub
        return None
    return Path(config).parent if isinstance(config, str) else None


def has_draft_model() -> bool:
    return getattr(server_args(), "speculative_algorithm", None) is not None


def publishes_kv_events(storage_config: Any) -> bool:
    """Whether SGLang publishes KV events from this process."""
    ranks = (storage_config.tp_rank, storage_config.pp_rank, storage_config.attn_cp_rank)
    return ranks == (0, 0, 0) and bool(getattr(server_args(), "kv_events_config", None))


def publish_events(publisher: Any, events: Sequence[Stored | Removed], page_tokens: int) -> None:
    """Sends our events through SGLang's own publisher: same stream, same sequence, same replay."""
    if not events or not publisher.enable_kv_cache_events:
        return
    module = _import("sglang.srt.disaggregation.kv_events")
    batch = [_engine_event(module, event, page_tokens) for event in events]
    publisher.kv_event_publisher.publish(module.KVEventBatch(ts=time.time(), events=batch))


def _engine_event(module: Any, event: Stored | Removed, page_tokens: int) -> Any:
    hashes = [_event_hash(key) for key in event.keys]
    if isinstance(event, Removed):
        return module.BlockRemoved(block_hashes=hashes, medium=event.medium)
    return module.BlockStored(
        block_hashes=hashes,
        parent_block_hash=None if event.parent is None else _event_hash(event.parent),
        token_ids=list(event.tokens),
        block_size=page_tokens,
        lora_id=None,
        medium=event.medium,
    )


def _event_hash(key: BlockKey) -> int:
    return int(resolve("sglang.srt.mem_cache.utils.hash_str_to_int64")(key.decode()))


def page_hashes(operation: Any, result: Any) -> list[str]:
    """Of a lookup: all that were asked about; before 0.5.23 those that were found."""
    hashes: list[str] | None = getattr(operation, "all_hash_values", None)
    found: list[str] = result[0]
    return found if hashes is None else hashes


def looked_up(operation: Any, result: Any) -> tuple[list[str], list[int]] | None:
    """Page hashes and tokens of a lookup; None for an adapter's or a tenant's, which SGLang's events hash otherwise."""
    key = operation.token_ids
    if not hasattr(key, "raw_token_ids") or key.is_bigram:
        return None
    if key.extra_key is not None or getattr(key, "cache_salt", None) is not None:
        return None
    return page_hashes(operation, result), list(key.raw_token_ids())


def attach_refused(message: str) -> Any:
    """SGLang's answer to an attach request that cannot be met."""
    return resolve("sglang.srt.managers.io_struct.AttachHiCacheStorageReqOutput")(success=False, message=message)


def pool_transfer_result(match: PoolMatch) -> Any:
    """SGLang's record of a lookup over several pools. Since 0.5.23 it lists every usable length."""
    record = resolve("sglang.srt.mem_cache.hicache_storage.PoolTransferResult")(match.pages, dict(match.reach))
    if hasattr(record, "restorable_prefix_pages"):
        record.restorable_prefix_pages = list(match.lengths)
    return record


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

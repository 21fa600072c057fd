"""`--kv-connector` and the `--kvbm-*` flags: how they become one `KVTransferConfig`, and what is refused.

vLLM has no hook for a plugin's flags, but it loads plugins right before it fills its parser ("plugin may update the
parser", `AsyncEngineArgs.add_cli_args`), so wrapping three methods of `EngineArgs` is enough: 0.24 to 0.33 have them.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from dynamo_connectors.config import SETTINGS, flag_of, parse_config, refuse_tiny_tiers
from dynamo_connectors.errors import ConfigError, PluginError
from dynamo_connectors.host_limits import check_host
from dynamo_connectors.vllm.compat import require_supported_engine

CONNECTOR_NAME = "dynamo"
_WRAPPED = "_dynamo_wrapped"


def install(engine_args: Any) -> None:
    """Wraps `vllm.engine.arg_utils.EngineArgs`. Raises `PluginError` when it is not what it was. Idempotent."""
    if getattr(engine_args, _WRAPPED, False):
        return
    for method in ("add_cli_args", "from_cli_args", "create_engine_config"):
        if not callable(getattr(engine_args, method, None)):
            raise PluginError(
                f"this vLLM has no EngineArgs.{method}, so --kv-connector cannot be added; "
                'use --kv-transfer-config \'{"kv_connector":"dynamo","kv_role":"kv_both"}\''
            )
    original_add, original_from = engine_args.add_cli_args, engine_args.from_cli_args.__func__
    original_create = engine_args.create_engine_config

    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original_add(parser)
        add_flags(parser)
        return parser

    def from_cli_args(cls: Any, args: argparse.Namespace) -> Any:
        try:
            merge_into(args)
            check_settings(args.kv_transfer_config)
            if connector_of(args.kv_transfer_config) == CONNECTOR_NAME:
                refuse_parallelism(args)
        except (ConfigError, PluginError) as error:
            sys.stderr.write(f"vllm: error: {error}\n")
            raise SystemExit(2) from None
        return original_from(cls, args)

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if connector_of(self.kv_transfer_config) and isinstance(self.kv_transfer_config, Mapping):
            self.kv_transfer_config = _as_config(self.kv_transfer_config)
        check_settings(self.kv_transfer_config)
        return original_create(self, *args, **kwargs)

    engine_args.add_cli_args = staticmethod(add_cli_args)
    engine_args.from_cli_args = classmethod(from_cli_args)
    engine_args.create_engine_config = create_engine_config
    setattr(engine_args, _WRAPPED, True)


def add_flags(parser: argparse.ArgumentParser) -> None:
    if "--kv-connector" in parser._option_string_actions:
        return
    group = parser.add_argument_group("dynamo-connectors", "KV tiering below HBM (added by dynamo-connectors).")
    group.add_argument(
        "--kv-connector",
        metavar="NAME",
        default=None,
        help="Shorthand for --kv-transfer-config with kv_connector=NAME and kv_role=kv_both; `dynamo` tiers KV.",
    )
    for setting, text in SETTINGS.items():
        group.add_argument(flag_of(setting), dest=setting, metavar="VALUE", default=None, help=text)


def merge_into(args: argparse.Namespace) -> None:
    """Moves our flags of `args` into `args.kv_transfer_config`; afterwards `args` is what stock vLLM knows."""
    connector = _take(args, "kv_connector")
    flags = {setting: _take(args, setting) for setting in SETTINGS}
    flags = {setting: value for setting, value in flags.items() if value is not None}
    current = getattr(args, "kv_transfer_config", None)
    named = connector_of(current)
    if connector is None and not flags:
        args.kv_transfer_config = current
        return
    if connector is not None and named not in (None, connector):
        raise ConfigError(
            f"--kv-connector {connector} contradicts --kv-transfer-config, which names {named}; keep one of them"
        )
    chosen = connector or named
    if flags and chosen != CONNECTOR_NAME:
        raise ConfigError(f"{flag_of(next(iter(flags)))} needs --kv-connector dynamo")
    args.kv_transfer_config = _merged(current, str(chosen), flags)


def connector_of(transfer_config: Any) -> str | None:
    """The connector's name in a `KVTransferConfig`, a dict of its fields, or None."""
    if isinstance(transfer_config, Mapping):
        return transfer_config.get("kv_connector")
    return getattr(transfer_config, "kv_connector", None)


def check_settings(transfer_config: Any) -> None:
    """Checks a `KVTransferConfig` that names dynamo against this host, and sets our load-failure policy.

    vLLM's own default, "fail", turns a lost block into HTTP 500, and its config does not tell a default from a choice.
    For a cache a lost block is a recompute, always.
    """
    if isinstance(transfer_config, Mapping):
        return
    for settings in _our_settings(transfer_config):
        require_supported_engine()
        config = parse_config(settings)
        refuse_tiny_tiers(config)
        check_host(config)
        transfer_config.kv_load_failure_policy = "recompute"


def _as_config(fields: Mapping[str, Any]) -> Any:
    """What vLLM makes of a plain dict later than we need it: `EngineArgs` in Python takes both."""
    from vllm.config import KVTransferConfig

    return KVTransferConfig(**fields)


def _our_settings(transfer_config: Any) -> list[Mapping[str, object]]:
    """dynamo's settings in a `KVTransferConfig`: alone, or beside other connectors under vLLM's `MultiConnector`."""
    extra = getattr(transfer_config, "kv_connector_extra_config", None) or {}
    named = connector_of(transfer_config)
    if named == CONNECTOR_NAME:
        return [extra]
    if named != "MultiConnector":
        return []
    children = extra.get("connectors") or ()
    return [child.get("kv_connector_extra_config") or {} for child in children if connector_of(child) == CONNECTOR_NAME]


def refuse_parallelism(sizes: object) -> None:
    """Raises `ConfigError` for what cannot be tiered yet; `sizes` are vLLM's arguments or its parallel configuration.

    With context parallelism a block of the scheduler is not a block of each worker: it spans several of them (DCP), or
    only its owner fills it (PCP).
    """
    for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if (getattr(sizes, name, None) or 1) > 1:
            raise ConfigError(f"dynamo cannot tier with {flag_of(name)} above 1 yet; start without it")


def _take(args: argparse.Namespace, name: str) -> Any:
    value = getattr(args, name, None)
    if hasattr(args, name):
        delattr(args, name)
    return value


def _merged(current: Any, connector: str, flags: Mapping[str, object]) -> Any:
    from vllm.config import KVTransferConfig

    if isinstance(current, Mapping):
        fields = dict(current)
    elif current is not None:
        fields = {field.name: getattr(current, field.name) for field in dataclasses.fields(current) if field.init}
    else:
        fields = {}
    extra = dict(fields.get("kv_connector_extra_config") or {})
    for setting, value in flags.items():
        if setting in extra and str(extra[setting]) != str(value):
            raise ConfigError(
                f"{flag_of(setting)} {value} contradicts --kv-transfer-config, which says {extra[setting]}; keep one"
            )
        extra[setting] = value
    fields.update(kv_connector=connector, kv_connector_extra_config=extra)
    fields["kv_role"] = fields.get("kv_role") or "kv_both"
    return KVTransferConfig(**fields)

"""What a user asks of SGLang, translated into the `dynamic` storage backend that SGLang supports. Imports no engine.

Host DRAM is SGLang's own second level (`--hicache-ratio`, `--hicache-size`); only the nvme_ssd tier is ours.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from dynamo_connectors.config import (
    HBM,
    HOST_DRAM,
    NVME_SSD,
    OBJECT_STORE,
    SETTINGS,
    KvbmConfig,
    flag_of,
    parse_config,
)
from dynamo_connectors.errors import ConfigError

BACKEND = "dynamo"
BACKEND_FLAG = "--hicache-storage-backend"
DEFAULT_NVME_GB = 10.0
#: The settings that mean something under SGLang -> what `--help` says.
SGLANG_SETTINGS = {
    "kvbm_nvme_path": f"({BACKEND}) {SETTINGS['kvbm_nvme_path']}",
    "kvbm_nvme_gb": f"({BACKEND}) {SETTINGS['kvbm_nvme_gb'].rstrip('.')} (default {DEFAULT_NVME_GB:g}).",
    "kvbm_compression": f"({BACKEND}) Not under SGLang yet; only off.",
    **{setting: f"({BACKEND}) {text}" for setting, text in SETTINGS.items() if setting.startswith("kvbm_object_")},
}
#: SGLang's own setting: tell the storage which pages come before the ones it is asked about.
_PASS_PREFIX = "hicache_storage_pass_prefix_keys"
#: Between how many workers the disk space is shared; written by the launcher, read by every scheduler process.
WORKERS_KEY = "dynamo_workers"
_DYNAMIC_BACKEND = {
    "backend_name": BACKEND,
    "module_path": "dynamo_connectors.sglang.hicache",
    "class_name": "DynamoHiCache",
    "interface_v1": 1,
}


@dataclass(frozen=True)
class Launch:
    """What bears on the storage backend in one launch. `flags` holds our own flags; None means not given."""

    backend: str | None
    extra_config: str | None
    flags: Mapping[str, object]
    is_used: bool
    workers: int = 1


@dataclass(frozen=True)
class Translation:
    """`extra_config` is what SGLang's `dynamic` backend is given; `config` what the host is asked for."""

    extra_config: str
    config: KvbmConfig


def translate(launch: Launch) -> Translation | None:
    """None when the launch does not ask for us. Raises `ConfigError`, one line, for the first thing that is wrong."""
    given = {key: value for key, value in launch.flags.items() if value is not None}
    if launch.backend != BACKEND:
        if given:
            raise ConfigError(f"{flag_of(next(iter(given)))} needs {BACKEND_FLAG} {BACKEND}")
        return None
    if not launch.is_used:
        raise ConfigError(f"{BACKEND_FLAG} {BACKEND} needs --enable-hierarchical-cache")
    extra = read_extra_config(launch.extra_config)
    for key in given:
        if key in extra:
            raise ConfigError(f"{flag_of(key)} is also in {BACKEND_FLAG}-extra-config; give it once")
    extra.update(given)
    config = parse_storage_settings(extra)
    if extra.setdefault(_PASS_PREFIX, True) is not True and config.object_url is not None:
        raise ConfigError(f"--kvbm-object-url needs {_PASS_PREFIX} true in {BACKEND_FLAG}-extra-config; drop it there")
    merged = {**extra, **_DYNAMIC_BACKEND, WORKERS_KEY: launch.workers}
    return Translation(json.dumps(merged), config)


def parse_storage_settings(settings: Mapping[str, object]) -> KvbmConfig:
    """The nvme_ssd tier of the whole engine, and the object_store below it if it has a URL. Raises `ConfigError`."""
    for key in settings:
        if key.startswith("kvbm_") and key not in SGLANG_SETTINGS:
            hint = "; SGLang sizes host memory with --hicache-ratio or --hicache-size" if "dram" in key else ""
            raise ConfigError(f"{key!r} is no setting under SGLang{hint}; known: {', '.join(SGLANG_SETTINGS)}")
    if settings.get("kvbm_nvme_path") is None:
        raise ConfigError(f"{BACKEND_FLAG} {BACKEND} needs --kvbm-nvme-path DIR")
    given = {key: value for key, value in settings.items() if key.startswith("kvbm_") and value is not None}
    lone = next((key for key in given if key.startswith("kvbm_object_")), None)
    if lone is not None and "kvbm_object_url" not in given:
        raise ConfigError(f"{flag_of(lone)} needs --kvbm-object-url")
    tiers = [HBM, HOST_DRAM, NVME_SSD, *([OBJECT_STORE] if "kvbm_object_url" in given else [])]
    config = parse_config({"kvbm_nvme_gb": DEFAULT_NVME_GB, **given, "kvbm_storage_tiers": ",".join(tiers)})
    if config.compression is not None:
        raise ConfigError(
            f"--kvbm-compression {config.compression} is not there under SGLang yet: what its host memory holds are "
            "its own bytes; drop the flag"
        )
    return replace(config, host_dram_bytes=0)


def worker_storage(extra_config: Mapping[str, object], ranks: int) -> KvbmConfig:
    """The tiers of one worker: an equal share. `ranks` counts if the launcher left no count."""
    if not extra_config.get("interface_v1"):
        raise ConfigError(f'the {BACKEND} storage backend needs "interface_v1": 1 in {BACKEND_FLAG}-extra-config')
    config = parse_storage_settings(extra_config)
    workers = extra_config.get(WORKERS_KEY, ranks)
    if not isinstance(workers, int) or workers < 1:
        raise ConfigError(f"{WORKERS_KEY} {workers!r} in {BACKEND_FLAG}-extra-config must be a whole number above 0")
    return replace(config, nvme_bytes=config.nvme_bytes // workers, object_bytes=config.object_bytes // workers)


def read_extra_config(text: str | None) -> dict[str, object]:
    """SGLang's three spellings: nothing, a JSON object, or `@file` with the ending .json, .yaml, .yml or .toml."""
    if not text:
        return {}
    name = f"{BACKEND_FLAG}-extra-config"
    try:
        content = _read_file(Path(text[1:])) if text.startswith("@") else json.loads(text)
    except OSError as error:
        raise ConfigError(f"{name} {text} cannot be read ({error.strerror})") from error
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{name} {text} cannot be parsed ({reason})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{name} {text} must hold settings by name, not {type(content).__name__}")
    return content


def asks_for_us(arguments: list[str]) -> bool:
    """Whether a command line names our backend, directly or in its `--config` file. Never raises."""
    for position, argument in enumerate(arguments):
        name, has_value, value = argument.partition("=")
        if not has_value:
            value = arguments[position + 1] if position + 1 < len(arguments) else ""
        # argparse takes any unambiguous beginning of a flag.
        if value == BACKEND and len(name) > len("--hicache-s") and BACKEND_FLAG.startswith(name):
            return True
        if name == "--config" and _config_file_asks(Path(value)):
            return True
    return False


def _config_file_asks(path: Path) -> bool:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return False
    if not isinstance(content, dict):
        return False
    wanted = BACKEND_FLAG[2:]
    return any(str(key).replace("_", "-") == wanted and value == BACKEND for key, value in content.items())


def _read_file(path: Path) -> object:
    text = path.read_text()
    if path.suffix in (".yaml", ".yml"):
        return yaml.safe_load(text)
    if path.suffix == ".toml":
        try:
            toml = importlib.import_module("tomllib")
        except ModuleNotFoundError:
            raise ValueError("TOML needs Python 3.11; write JSON or YAML") from None
        return toml.loads(text)
    if path.suffix == ".json":
        return json.loads(text)
    raise ValueError("its name must end in .json, .yaml, .yml or .toml")

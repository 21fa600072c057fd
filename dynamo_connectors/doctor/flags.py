"""What a launch line needs besides room: an engine here that takes it as it stands, and a way to speak to peers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from dynamo_connectors.config import parse_config
from dynamo_connectors.doctor.finding import Finding, Level
from dynamo_connectors.doctor.plan import Plan
from dynamo_connectors.doctor.versions import ENGINES, installed_version
from dynamo_connectors.errors import ConfigError
from dynamo_connectors.host_limits import read_secret
from dynamo_connectors.peer_config import PEER_SETTINGS, PeerConfig
from dynamo_connectors.sglang.settings import parse_storage_settings
from dynamo_connectors.transport.agent import require_nixl
from dynamo_connectors.transport.channel import require_curve

DETAILS = "docs/disaggregation.md says what an engine with a role needs"


def examine_flags(plan: Plan) -> list[Finding]:
    engines = [engine for engine in ENGINES if installed_version(engine) is not None]
    return [*examine_peers(plan.peer), *judge_spelling(plan, engines)]


def judge_spelling(plan: Plan, engines: Collection[str]) -> list[Finding]:
    """A warning when none of these engines takes the flags as they stand: each wants tiers told in its own way."""
    if not plan.given:
        return []
    refusals = {engine: _refusal(engine, plan) for engine in engines}
    if None in refusals.values():
        return []
    remedies = {
        "vllm": f"name them, with their sizes: --kvbm-storage-tiers {','.join(plan.tiers)}",
        "sglang": "see docs/sglang.md",
    }
    return [
        Finding(Level.WARN, f"{engine} flags", f"refused as they stand: {refusal}", remedies[engine])
        for engine, refusal in refusals.items()
    ]


def _refusal(engine: str, plan: Plan) -> str | None:
    parsers: dict[str, Callable[[Mapping[str, object]], object]] = {
        "vllm": parse_config,
        "sglang": parse_sglang_settings,
    }
    try:
        parsers[engine](plan.given)
    except ConfigError as error:
        return str(error)
    return None


def parse_sglang_settings(given: Mapping[str, object]) -> None:
    """The role is a flag of SGLang's own there, so what belongs to it may stand alone."""
    storage = {setting: value for setting, value in given.items() if setting not in PEER_SETTINGS}
    if storage:
        parse_storage_settings(storage)


def examine_peers(peer: PeerConfig) -> list[Finding]:
    """What an engine with that role asks of this host at its start."""
    if not peer.role:
        return []
    try:
        read_secret(peer)
        require_nixl()
        require_curve()
    except ConfigError as error:
        return [Finding(Level.FAIL, "peers", str(error), DETAILS)]
    trusted = "this host alone" if peer.is_local else "who knows the secret"
    return [Finding(Level.OK, "peers", f"{peer.role}, with {trusted}")]

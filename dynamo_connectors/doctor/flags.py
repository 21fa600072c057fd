"""What a launch line needs besides room: an engine here that takes it as it stands, and a way to speak to peers."""

from __future__ import annotations

from collections.abc import Collection

from dynamo_connectors.config import parse_config
from dynamo_connectors.doctor.finding import Finding, Level
from dynamo_connectors.doctor.plan import Plan
from dynamo_connectors.doctor.versions import ENGINES, installed_version
from dynamo_connectors.errors import ConfigError
from dynamo_connectors.peer_config import PeerConfig
from dynamo_connectors.transport.agent import require_nixl
from dynamo_connectors.transport.channel import require_curve

DETAILS = "docs/disaggregation.md says what an engine with a role needs"


def examine_flags(plan: Plan) -> list[Finding]:
    engines = [engine for engine in ENGINES if installed_version(engine) is not None]
    return [*examine_peers(plan.peer), *judge_spelling(plan, engines)]


def judge_spelling(plan: Plan, engines: Collection[str]) -> list[Finding]:
    """A warning when vLLM, the only engine here, refuses the flags as they stand. What SGLang says is its adapter's."""
    if not plan.given or list(engines) != ["vllm"]:
        return []
    try:
        parse_config(plan.given)
    except ConfigError as error:
        remedy = f"name them, with their sizes: --kvbm-storage-tiers {','.join(plan.tiers)}"
        return [Finding(Level.WARN, "vllm flags", f"refused as they stand: {error}", remedy)]
    return []


def examine_peers(peer: PeerConfig) -> list[Finding]:
    """What an engine with that role asks of this host at its start."""
    if not peer.role:
        return []
    try:
        require_nixl()
        require_curve()
    except ConfigError as error:
        return [Finding(Level.FAIL, "peers", str(error), DETAILS)]
    trusted = "this host alone" if peer.is_local else "who knows the secret"
    return [Finding(Level.OK, "peers", f"{peer.role}, with {trusted}")]

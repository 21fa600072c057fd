"""NIXL: which build is installed, and which of its plugins really load here.

A plugin that cannot load is still listed by NIXL, so each one is created for real, in a child process of its own:
a missing library is an error there, and a crash stays there.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib import metadata, util

from dynamo_connectors.doctor.child import Outcome, run_python
from dynamo_connectors.doctor.finding import Finding, Level
from dynamo_connectors.doctor.versions import OURS

# `nixl` only picks one of the other two by CUDA version; either may be installed alone.
BUILDS = {"nixl": "nixl", "nixl_cu12": "nixl-cu12", "nixl_cu13": "nixl-cu13"}
PROBE_TIMEOUT_SECONDS = 60.0

PROBE = """
import importlib, sys
module, plugin = sys.argv[1:]
api = importlib.import_module(module + "._api")
agent = api.nixl_agent("doctor", api.nixl_agent_config(enable_prog_thread=False, backends=[]))
options = {"bucket": "doctor", "scheme": "http", "endpoint_override": "127.0.0.1:9",
           "access_key": "x", "secret_key": "x"} if plugin == "OBJ" else {}
agent.create_backend(plugin, options)
"""

# Plugin -> (what we use it for, level when it does not load, what to do).
PLUGINS = {
    "UCX": ("peers", Level.FAIL, "reinstall NIXL: pip install --force-reinstall 'nixl>=1.3'"),
    "POSIX": ("files", Level.WARN, "the nvme_ssd tier works without it; reinstall NIXL to have it"),
    "OBJ": ("object stores", Level.ABSENT, "nixl-cu12 has an OBJ plugin that needs no cuObject library"),
    "GDS": ("GPU-direct storage", Level.ABSENT, "needs CUDA with libcufile and a GPU"),
}


def installed_build() -> tuple[str, str] | None:
    """(module, version) of the NIXL that would be imported; a meta package without a build does not count."""
    present = {module: name for module, name in BUILDS.items() if util.find_spec(module) is not None}
    if set(present) == {"nixl"}:
        return None
    for module, distribution in present.items():
        try:
            return module, metadata.version(distribution)
        except metadata.PackageNotFoundError:
            return module, "unknown version"
    return None


def judge_plugin(plugin: str, outcome: Outcome) -> Finding:
    purpose, level, remedy = PLUGINS[plugin]
    name = f"NIXL {plugin}"
    if outcome.ok:
        return Finding(Level.OK, name, f"loads ({purpose})")
    return Finding(level, name, f"does not load ({purpose}): {outcome.complaint}", remedy)


def examine_transfer() -> list[Finding]:
    build = installed_build()
    if build is None:
        detail = "not installed: no transfers between engines (disaggregation, peer tier)"
        return [Finding(Level.ABSENT, "NIXL", detail, f"pip install '{OURS}[nixl]'")]
    module, version = build

    def probe(plugin: str) -> Finding:
        return judge_plugin(plugin, run_python(PROBE, module, plugin, timeout_seconds=PROBE_TIMEOUT_SECONDS))

    with ThreadPoolExecutor(2) as pool:
        plugins = list(pool.map(probe, PLUGINS))
    return [Finding(Level.OK, "NIXL", f"{version} ({module})"), *plugins]

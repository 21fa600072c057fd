"""All probes, in the order of the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from dynamo_connectors.doctor.finding import Finding, Plan
from dynamo_connectors.doctor.gpu import examine_gpu
from dynamo_connectors.doctor.memory import examine_memory
from dynamo_connectors.doctor.nvme import examine_nvme
from dynamo_connectors.doctor.object_store import examine_object_store
from dynamo_connectors.doctor.plugins import examine_plugins
from dynamo_connectors.doctor.transfer import examine_transfer
from dynamo_connectors.doctor.versions import examine_versions


def examine(plan: Plan, environment: Mapping[str, str]) -> list[Finding]:
    """Probes side by side: the slow ones wait for child processes."""
    probes: list[Callable[[], list[Finding]]] = [
        examine_versions,
        lambda: examine_plugins(environment),
        examine_gpu,
        examine_transfer,
        lambda: examine_memory(plan.host_dram_gb),
        lambda: examine_nvme(plan.nvme_path, plan.nvme_gb),
        lambda: examine_object_store(plan.object_url, plan.object_endpoint_url),
    ]
    with ThreadPoolExecutor(len(probes)) as pool:
        return [finding for findings in pool.map(lambda probe: probe(), probes) for finding in findings]

"""A resource of somebody else's with a scale subresource, on the real API: `make test-kubernetes` runs this.

Its controller, played here, keeps a Deployment of the same size; the planner knows PLURAL.VERSION.GROUP/NAME only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
import yaml
from dynamo_planner.errors import ObservationError
from dynamo_planner.kube_access import find_access
from dynamo_planner.kube_client import KubeClient

from planner_sidecar.kubernetes.cluster import RUN, Cluster, cluster, workload
from planner_sidecar.kubernetes.real_api import hands
from tests.planner.planner_fakes import FakeProxy, served

KIND = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: modelservers.serving.example.org}
spec:
  group: serving.example.org
  scope: Namespaced
  names: {kind: ModelServer, plural: modelservers, singular: modelserver}
  versions:
    - name: v1alpha1
      served: true
      storage: true
      schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
      subresources:
        status: {}
        scale:
          specReplicasPath: .spec.engines
          statusReplicasPath: .status.engines
          labelSelectorPath: .status.selector
"""
ROLE = {
    "metadata": {"name": "modelservers"},
    "rules": [{"apiGroups": ["serving.example.org"], "resources": ["modelservers/scale"], "verbs": ["get", "update"]}],
}
BINDING = {
    "metadata": {"name": "modelservers"},
    "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "modelservers"},
    "subjects": [{"kind": "ServiceAccount", "name": "dynamo-planner", "namespace": "default"}],
}
RIGHTS = "/apis/rbac.authorization.k8s.io/v1/namespaces/default"
BASE = "/apis/serving.example.org/v1alpha1/namespaces/default/modelservers"
DEPLOYMENTS = "/apis/apps/v1/namespaces/default/deployments"


async def control(made: Cluster) -> None:
    """One round of its controller, and of the kubelet."""
    wanted = (await made.must("GET", f"{BASE}/llm"))["spec"]["engines"]
    merge = "application/merge-patch+json"
    await made.must("PATCH", f"{DEPLOYMENTS}/llm", {"spec": {"replicas": wanted}}, merge)
    await made.must("PATCH", f"{BASE}/llm/status", {"status": {"engines": wanted, "selector": "app=llm"}}, merge)
    await made.kubelet()


async def until(made: Cluster, true: Callable[[], Any], look: Callable[[], Any] | None = None) -> None:
    end = time.monotonic() + 90
    while not true():
        assert time.monotonic() < end, "it never came"
        await control(made)
        if look is not None:
            await look()
        await asyncio.sleep(0.05)


def test_a_foreign_kind_goes_up_and_is_drained_down() -> None:
    async def story() -> None:
        proxy = FakeProxy()
        async with cluster() as made, served(proxy.app()) as admin, aiohttp.ClientSession() as session:
            await made.ask("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", yaml.safe_load(KIND))
            end = time.monotonic() + 60
            while (await made.ask("GET", BASE))[0] != 200:
                assert time.monotonic() < end, "the kind is never served"
                await asyncio.sleep(0.1)
            thing = {"apiVersion": "serving.example.org/v1alpha1", "kind": "ModelServer"}
            await made.must("POST", BASE, thing | {"metadata": {"name": "llm"}, "spec": {"engines": 1}})
            await made.must("POST", DEPLOYMENTS, workload("Deployment", "llm", 1))
            client = KubeClient(session, find_access(RUN / "planner.kubeconfig"), 5.0)
            actuator = hands(client, session, admin, ("modelservers.v1alpha1.serving.example.org", "llm"), [0.0])
            try:
                await control(made)
                with pytest.raises(ObservationError, match="modelservers/scale"):
                    await actuator.refresh()
                await made.must("POST", f"{RIGHTS}/roles", ROLE)
                await made.must("POST", f"{RIGHTS}/rolebindings", BINDING)
                await until(made, lambda: list(actuator.states().values()) == ["ready"], actuator.refresh)
                assert (await actuator.apply(1, 3, False)).accepted
                await until(made, lambda: list(actuator.states().values()) == ["ready"] * 3, actuator.refresh)
                proxy.in_flight = dict.fromkeys(proxy.states, 1)
                assert (await actuator.apply(3, 2, False)).accepted
                await until(made, lambda: "draining" in proxy.states.values())
                assert (await made.must("GET", f"{BASE}/llm"))["spec"]["engines"] == 3, "nothing is ordered yet"
                proxy.in_flight = {}
                await until(made, lambda: len(actuator.states()) == 2, actuator.refresh)
                assert (await made.must("GET", f"{BASE}/llm"))["spec"]["engines"] == 2
            finally:
                await actuator.close()
                for path in (f"{BASE}/llm", f"{DEPLOYMENTS}/llm", f"{RIGHTS}/roles/modelservers"):
                    await made.ask("DELETE", path)
                await made.ask("DELETE", f"{RIGHTS}/rolebindings/modelservers")

    asyncio.run(story())

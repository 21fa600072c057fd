"""A real API server as its administrator sees it, a kubelet that makes pods true, and the planner's own rights."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from dynamo_planner.kube_access import find_access

RUN = Path(os.environ["KUBE_RUN"])
HERE = Path(__file__).resolve().parent
PODS = "/api/v1/namespaces/default/pods"
GROUP_LABEL = "leaderworkerset.sigs.k8s.io/"
GROUP_SIZE = 2

LWS = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata:
  name: leaderworkersets.leaderworkerset.x-k8s.io
  annotations: {api-approved.kubernetes.io: "https://github.com/kubernetes-sigs/lws/pull/1"}
spec:
  group: leaderworkerset.x-k8s.io
  scope: Namespaced
  names: {kind: LeaderWorkerSet, plural: leaderworkersets, singular: leaderworkerset}
  versions:
    - name: v1
      served: true
      storage: true
      schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}
      subresources:
        status: {}
        scale:
          specReplicasPath: .spec.replicas
          statusReplicasPath: .status.replicas
          labelSelectorPath: .status.hpaPodSelector
"""


def workload(kind: str, name: str, replicas: int) -> dict[str, Any]:
    labels = {"app": name}
    pod = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "engine", "image": "engine"}]}}
    spec: dict[str, Any] = {"replicas": replicas, "selector": {"matchLabels": labels}, "template": pod}
    if kind == "StatefulSet":
        spec |= {"serviceName": name, "podManagementPolicy": "Parallel"}
    return {"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}


@dataclass
class Cluster:
    """The administrator's view, and the kubelet. `stuck` pods are never made ready; `groups` are paths of
    LeaderWorkerSets, whose controller is played here too.
    """

    session: aiohttp.ClientSession
    url: str
    tls: ssl.SSLContext
    stuck: bool = False
    hosts: dict[str, str] = field(default_factory=dict)
    groups: list[str] = field(default_factory=list)

    async def ask(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> tuple[int, Any]:
        headers = {"Authorization": "Bearer admin-token", "Content-Type": kind}
        data = None if body is None else json.dumps(body)
        async with self.session.request(method, self.url + path, data=data, headers=headers, ssl=self.tls) as answer:
            text = await answer.text()  # what is not served yet is refused in plain words
            return answer.status, json.loads(text) if text.startswith("{") else text

    async def must(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:
        status, answer = await self.ask(method, path, body, kind)
        assert status < 300, (method, path, status, answer)
        return answer

    async def kubelet(self) -> None:
        """One round: bind and ready what is new, end what leaves."""
        for path in self.groups:
            await self._control_groups(path)
        for pod in (await self.must("GET", PODS))["items"]:
            name, meta = pod["metadata"]["name"], pod["metadata"]
            if meta.get("deletionTimestamp"):
                await self.ask("DELETE", f"{PODS}/{name}", {"gracePeriodSeconds": 0})
            elif not self.stuck and not pod["status"].get("podIP"):
                await self.make_ready(name, meta["uid"])

    async def make_ready(self, name: str, uid: str) -> None:
        target = {"apiVersion": "v1", "kind": "Node", "name": "node"}
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target}
        await self.ask("POST", f"{PODS}/{name}/binding", binding)
        self.hosts.setdefault(uid, f"127.0.2.{len(self.hosts) + 1}")
        kinds = ("Initialized", "Ready", "ContainersReady", "PodScheduled")
        status = {
            "phase": "Running",
            "podIP": self.hosts[uid],
            "podIPs": [{"ip": self.hosts[uid]}],
            "conditions": [{"type": kind, "status": "True"} for kind in kinds],
        }
        await self.ask("PATCH", f"{PODS}/{name}/status", {"status": status}, "application/strategic-merge-patch+json")

    async def _control_groups(self, path: str) -> None:
        """A leader and its workers for every replica; the highest groups go first, leaders and workers together."""
        status, plain = await self.ask("GET", path)
        name, wanted = path.rpartition("/")[2], plain["spec"]["replicas"] if status == 200 else 0
        pods = (await self.must("GET", f"{PODS}?labelSelector={GROUP_LABEL}name%3D{name}"))["items"]
        there = {pod["metadata"]["name"]: pod["metadata"] for pod in pods}
        for index in range(wanted):
            for worker in range(GROUP_SIZE):
                own = f"{name}-{index}" + (f"-{worker}" if worker else "")
                if own not in there:
                    places = {"name": name, "group-index": str(index), "worker-index": str(worker)}
                    labels = {GROUP_LABEL + key: value for key, value in places.items()}
                    spec = {"containers": [{"name": "engine", "image": "engine"}]}
                    await self.must("POST", PODS, {"metadata": {"name": own, "labels": labels}, "spec": spec})
        for own, meta in there.items():
            if int(meta["labels"][GROUP_LABEL + "group-index"]) >= wanted and not meta.get("deletionTimestamp"):
                await self.ask("DELETE", f"{PODS}/{own}")
        if status == 200:
            selector = f"{GROUP_LABEL}name={name},{GROUP_LABEL}worker-index=0"
            said = {"status": {"replicas": wanted, "hpaPodSelector": selector}}
            await self.ask("PATCH", path + "/status", said, "application/merge-patch+json")

    async def replicas(self, target: str) -> int:
        return int((await self.must("GET", target))["spec"]["replicas"])


@asynccontextmanager
async def cluster() -> AsyncIterator[Cluster]:
    """An empty default namespace with a node, the LWS kind and the planner's own role."""
    access = find_access(RUN / "admin.kubeconfig")
    assert access.tls is not None
    async with aiohttp.ClientSession() as session:
        made = Cluster(session, access.url, access.tls)
        await made.ask("POST", "/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node"}})
        await made.ask("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", yaml.safe_load(LWS))
        paths = {"Role": "roles", "RoleBinding": "rolebindings"}
        for document in yaml.safe_load_all((HERE / "rbac.yaml").read_text()):
            if document["kind"] in paths:
                for subject in document.get("subjects", ()):
                    subject["namespace"] = "default"
                path = f"/apis/rbac.authorization.k8s.io/v1/namespaces/default/{paths[document['kind']]}"
                await made.ask("POST", path, document)
        yield made
